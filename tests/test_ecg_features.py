"""Features of a beat: what they measure, what they do not depend on, and which beats have none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fhe_mlp import ecg_features as ef
from fhe_mlp import published_features as pf
from fhe_mlp import records

NAMES = [feature["name"] for feature in ef.FEATURES]
BUMPS = ((0.2, -0.18, 0.02), (-0.15, -0.04, 0.012), (1, 0, 0.012), (-0.3, 0.04, 0.012), (0.4, 0.3, 0.04))  # P Q R S T


def ecg(times, fs, bumps=BUMPS, noise=0.002, seed=0):
    """Two leads in mV, (samples, 2), with a beat of `bumps` (height mV, centre s, width s) at each of `times` (s)."""
    t = np.arange(int((times[-1] + 1) * fs)) / fs
    x = np.zeros_like(t)
    for beat in times:
        for height, centre, width in bumps:
            x += height * np.exp(-0.5 * ((t - beat - centre) / width) ** 2)
    return np.outer(x, [1, 0.5]) + np.random.default_rng(seed).normal(0, noise, (len(t), 2))


def features(signal, fs, beats, breaks=()):
    X, index, dropped = ef.beat_features(signal, fs, beats, breaks)
    assert X.dtype == np.float32
    assert np.isfinite(X).all()
    return pd.DataFrame(X, columns=NAMES, index=index), dropped


def regular(fs=360.0, beats=40, rr=0.8):
    times = 1.0 + rr * np.arange(beats)
    return times, np.rint(times * fs).astype(int)


@pytest.mark.parametrize("table", [ef.FEATURES, pf.PUBLISHED])
def test_32_columns_each_with_name_unit_formula_and_source(table):
    assert len({feature["name"] for feature in table}) == 32
    assert all(feature["unit"] in ("1", "s", "mV") and feature["formula"] and feature["source"] for feature in table)


def test_published_columns_are_in_the_published_order():
    names = [feature["name"] for feature in pf.PUBLISHED]
    kinds = "pre_RR post_RR P_peak T_peak R_peak S_peak Q_peak".split()
    assert names[:7] == [f"ch0_{kind}" for kind in kinds]
    assert names[16:23] == [f"ch1_{kind}" for kind in kinds]


@pytest.mark.parametrize("fs", [360.0, 250.0, 1000.0])
def test_published_features_measure_what_the_record_holds(fs):
    times, _ = regular(fs)
    times[15:] -= 0.3  # beat 15 comes early
    X, index, _ = pf.published_features(ecg(times, fs), fs, np.rint(times * fs).astype(int))
    table = pd.DataFrame(X, columns=[feature["name"] for feature in pf.PUBLISHED], index=index)
    assert table.loc[15, "ch0_pre_RR"] == table.loc[15, "ch1_pre_RR"] == pytest.approx(0.5, abs=0.01)
    assert table.loc[14, "ch0_post_RR"] == pytest.approx(0.5, abs=0.01)
    row = table.loc[5]
    assert row["ch0_PQ_interval"] == pytest.approx(0.14, abs=0.012)
    assert row["ch0_QRS_interval"] == pytest.approx(0.08, abs=0.012)
    assert row["ch0_ST_interval"] == pytest.approx(0.26, abs=0.015)
    assert row["ch0_R_peak"] > row["ch0_T_peak"] > row["ch0_P_peak"] > 0 > row["ch0_Q_peak"] > row["ch0_S_peak"]
    assert row["ch0_R_peak"] == pytest.approx(2 * row["ch1_R_peak"], rel=0.05)
    assert row["ch0_QRS_morph_0"] == pytest.approx(row["ch0_Q_peak"])
    assert row["ch0_QRS_morph_4"] == pytest.approx(row["ch0_S_peak"])


@pytest.mark.parametrize("fs", [360.0, 128.0, 1000.0])
def test_an_early_beat_stands_out_in_the_rhythm_and_a_wide_one_in_shape(fs):
    times, _ = regular(fs)
    times[15:] -= 0.3
    signal = ecg(times, fs)
    wide = tuple((h, c * 2.2, w * 2.2) for h, c, w in BUMPS)
    signal[: int((times[20] + 1) * fs)] += (
        ecg(times[20:21], fs, wide, noise=0)[: int((times[20] + 1) * fs)]
        - ecg(times[20:21], fs, noise=0)[: int((times[20] + 1) * fs)]
    )
    table, dropped = features(signal, fs, np.rint(times * fs).astype(int))
    assert dropped["first or last beat"] == 2
    assert list(table.index) == list(range(1, 39))
    assert table.loc[15, "pre_RR"] == pytest.approx(0.5, abs=0.01)
    assert table.loc[15, ["pre_local", "pre_long"]].to_numpy() == pytest.approx([0.5 / 0.8] * 2, abs=0.02)
    assert table.loc[15, "pre_post"] == pytest.approx(np.log(0.5 / 0.8), abs=0.03)
    assert table.loc[16, "pre_previous"] == pytest.approx(np.log(0.8 / 0.5), abs=0.03)
    assert table.loc[5, ["pre_local", "post_long", "pre_mean"]].to_numpy() == pytest.approx([1, 1, 1], abs=0.03)
    for name in ("shape_corr", "ch0_QRS_corr", "ch0_QRS_sharpness"):
        assert table[name].idxmin() == 20, name
    for name in ("ch0_QRS_residual", "ch1_QRS_residual", "ch0_QRS_interval"):
        assert table[name].idxmax() == 20, name


def test_amplitudes_are_relative_to_the_recording():
    times, beats = regular()
    signal = ecg(times, 360.0)
    one, _ = features(signal, 360.0, beats)
    for scaled in (signal * 1000, signal * [1, 7]):  # microvolts; another gain of one lead
        other, _ = features(scaled, 360.0, beats)
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_chosen_beats_are_measured_against_each_other_on_the_whole_records_clock():
    times, _ = regular()
    times -= 0.3 * (np.arange(len(times))[:, None] >= [9, 17, 25, 33]).sum(axis=1)  # these four come early
    signal, beats = ecg(times, 360.0), np.rint(times * 360).astype(int)
    whole, _ = features(signal, 360.0, beats)
    X, index, _ = ef.beat_features(signal, 360.0, beats, only=np.arange(len(beats)))
    np.testing.assert_array_equal(X, whole)
    X, index, _ = ef.beat_features(signal, 360.0, beats, only=np.array([33, 25, 17, 9, 5]))
    few = pd.DataFrame(X, columns=NAMES, index=index)
    assert list(few.index) == [5, 9, 17, 25, 33]
    for name in ("pre_RR", "pre_post", "pre_previous"):
        np.testing.assert_array_equal(few[name], whole.loc[few.index, name], name)
    assert few.loc[9, ["pre_local", "pre_mean"]].to_numpy() == pytest.approx([1, 0.5 / 0.56], abs=0.02)
    assert whole.loc[9, "pre_local"] == pytest.approx(0.5 / 0.8, abs=0.02)
    assert (few["corr_previous"] != whole.loc[few.index, "corr_previous"]).all()
    with pytest.raises(ValueError, match="asked for"):
        ef.beat_features(signal, 360.0, beats, only=np.array([0]))


@settings(deadline=None, max_examples=15)
@given(st.integers(8, 30), st.floats(1.2, 9), st.sampled_from(["break", "gap", "pause"]))
def test_what_is_no_rr_interval_enters_no_feature_and_its_beats_are_kept(at, seconds, kind):
    fs = 360.0
    times, _ = regular(fs)
    times[at:] += seconds
    beats, signal, breaks = np.rint(times * fs).astype(int), ecg(times, fs), []
    inside = slice(beats[at - 1] + int(0.5 * fs), beats[at] - int(0.45 * fs))
    if kind == "break":
        breaks = [(inside.start, inside.stop)]
    if kind == "gap":
        signal[inside, 0] = np.nan
    table, _ = features(signal, fs, beats, breaks)
    assert list(table.index) == list(range(1, 39))
    known = min(seconds + 0.8, ef.PAUSE_S) if kind == "pause" else 0.8
    assert table.loc[at, "pre_RR"] == pytest.approx(known, abs=0.01)
    others = table.drop(index=at)
    assert others["pre_RR"].to_numpy() == pytest.approx(0.8, abs=0.01)
    assert others["pre_local"].to_numpy() == pytest.approx(1, abs=0.02)
    if kind != "pause" or seconds + 0.8 > ef.PAUSE_S:
        assert others["pre_mean"].to_numpy() == pytest.approx(1, abs=0.02)


def test_beats_outside_or_in_missing_or_flat_signal_are_dropped_and_counted():
    times, beats = regular()
    signal = ecg(times, 360.0)
    signal[beats[5] + 10, 0] = np.nan
    signal[beats[9] - 150 : beats[9] + 200, 1] = 0.5
    table, dropped = features(signal, 360.0, beats)
    assert not {5, 9} & set(table.index)
    assert dropped["signal missing or flat"] == 2
    table, dropped = features(signal, 360.0, np.concatenate([[10, 70], beats[1:]]))
    assert dropped["window leaves the record"] == 1
    _, dropped = features(signal, 360.0, beats, [(beats[20] - 50, beats[22] + 50)])
    assert dropped["inside an episode without beats"] == 3


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 38), min_size=1, max_size=5, unique=True), st.integers(0, 40), st.randoms())
def test_marks_of_one_beat_count_once_and_their_order_does_not_matter(twice, apart, random):
    times, beats = regular()
    signal = ecg(times, 360.0)
    expected, _ = features(signal, 360.0, beats)
    again = [*beats, *(beats[twice] + apart)]
    random.shuffle(again)
    table, dropped = features(signal, 360.0, np.array(again))
    assert dropped["annotated twice"] == len(twice)
    np.testing.assert_array_equal(np.array(again)[table.index], beats[expected.index])
    np.testing.assert_array_equal(table.to_numpy(), expected.to_numpy())


@pytest.mark.parametrize("count", [3, 4, 10])
def test_records_of_few_beats_have_features(count):
    times, beats = regular(beats=count)
    table, _ = features(ecg(times, 360.0), 360.0, beats)
    assert len(table) == count - 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s, b: (s, b[:2]), "fewer than three"),
        (lambda s, b: (s * [1, np.nan], b), "missing signal"),
        (lambda s, b: (s * [1, 0], b), "flat signal"),
        (lambda s, b: (np.where(np.arange(len(s))[:, None] > 400, np.nan, s), b), "no usable beat"),
    ],
)
def test_records_without_usable_signal_say_why(spoil, reason):
    times, beats = regular()
    with pytest.raises(ValueError, match=reason):
        ef.beat_features(*(lambda s, b: (s, 360.0, b))(*spoil(ecg(times, 360.0), beats)))


def test_amplitudes_beyond_all_numbers_are_refused():
    times, beats = regular()
    for features in (ef.beat_features, pf.published_features):
        with pytest.raises(ValueError, match="no voltages"), np.errstate(all="ignore"):
            features(1e299 * ecg(times, 360.0), 360.0, beats)


def test_lead_names_decide_the_order():
    for names, order in (
        (["MLII", "V5"], (0, 1)),
        (["V5", "MLII"], (1, 0)),
        (["V1", "II"], (1, 0)),
        (["v2", "V5"], (1, 0)),
        (["ECG lead II", "aVF", "V1"], (0, 2)),
    ):
        assert records.choose_leads(names) == order, names
    assert records.are_expected(["MLII", "V1"])
    assert records.are_expected(["ml 2", "v5"])
    assert not records.are_expected(["V5", "V2"])
