"""fhe_mlp/ecg: what features measure and do not depend on, which beats have none; figures of EC57, the threshold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fhe_mlp import ecg

NAMES = [feature["name"] for feature in ecg.FEATURES]
BUMPS = ((0.2, -0.18, 0.02), (-0.15, -0.04, 0.012), (1, 0, 0.012), (-0.3, 0.04, 0.012), (0.4, 0.3, 0.04))  # P Q R S T
FS = 360.0


def heart(times, fs=FS, bumps=BUMPS, noise=0.002):
    """Two leads in mV, (samples, 2), with a beat of `bumps` (height mV, centre s, width s) at each of `times` (s)."""
    t = np.arange(int((times[-1] + 1) * fs)) / fs
    x = np.zeros_like(t)
    for beat in times:
        for height, centre, width in bumps:
            x += height * np.exp(-0.5 * ((t - beat - centre) / width) ** 2)
    return np.outer(x, [1, 0.5]) + np.random.default_rng(0).normal(0, noise, (len(t), 2))


def features(signal, beats, breaks=(), fs=FS):
    X, index, dropped = ecg.beat_features(signal, fs, beats, breaks)
    assert X.dtype == np.float32
    assert np.isfinite(X).all()
    return pd.DataFrame(X, columns=NAMES, index=index), dropped


def regular(fs=FS, beats=40):
    times = 1.0 + 0.8 * np.arange(beats)
    return times, np.rint(times * fs).astype(int)


def test_32_columns_each_with_name_unit_formula_and_source():
    for table in (ecg.FEATURES, ecg.PUBLISHED):
        assert len({feature["name"] for feature in table}) == 32
        assert all(f["unit"] in ("1", "s", "mV") and f["formula"] and f["source"] for f in table)


@pytest.mark.parametrize("fs", [360.0, 250.0, 1000.0])
def test_published_features_measure_what_the_record_holds(fs):
    times, _ = regular(fs)
    times[15:] -= 0.3  # beat 15 comes early
    X, index, _ = ecg.published_features(heart(times, fs), fs, np.rint(times * fs).astype(int))
    names, kinds = [feature["name"] for feature in ecg.PUBLISHED], "pre_RR post_RR P_peak T_peak R_peak S_peak Q_peak"
    assert (names[:7], names[16:23]) == tuple([f"ch{c}_{kind}" for kind in kinds.split()] for c in (0, 1))
    table = pd.DataFrame(X, columns=names, index=index)
    for row, name in ((15, "ch0_pre_RR"), (15, "ch1_pre_RR"), (14, "ch0_post_RR")):
        assert table.loc[row, name] == pytest.approx(0.5, abs=0.01)
    row = table.loc[5].filter(like="ch0_").rename(lambda name: name[4:])
    intervals = row[["PQ_interval", "QRS_interval", "ST_interval"]].to_list()
    assert intervals == pytest.approx([0.14, 0.08, 0.26], abs=0.015)
    assert row["R_peak"] > row["T_peak"] > row["P_peak"] > 0 > row["Q_peak"] > row["S_peak"]
    assert row["R_peak"] == pytest.approx(2 * table.loc[5, "ch1_R_peak"], rel=0.05)
    assert row[["QRS_morph_0", "QRS_morph_4"]].to_list() == pytest.approx(row[["Q_peak", "S_peak"]].to_list())


@pytest.mark.parametrize("fs", [360.0, 128.0, 1000.0])
def test_an_early_beat_stands_out_in_the_rhythm_and_a_wide_one_in_shape(fs):
    times, _ = regular(fs)
    times[15:] -= 0.3
    signal, wide = heart(times, fs), tuple((h, c * 2.2, w * 2.2) for h, c, w in BUMPS)
    change = heart(times[20:21], fs, wide, noise=0) - heart(times[20:21], fs, noise=0)
    signal[: len(change)] += change
    table, dropped = features(signal, np.rint(times * fs).astype(int), fs=fs)
    assert dropped["first or last beat"] == 2
    assert list(table.index) == list(range(1, 39))
    early = table.loc[15, ["pre_RR", "pre_local", "pre_long", "pre_post"]].to_list()
    assert early == pytest.approx([0.5, 0.5 / 0.8, 0.5 / 0.8, np.log(0.5 / 0.8)], abs=0.02)
    assert table.loc[16, "pre_previous"] == pytest.approx(np.log(0.8 / 0.5), abs=0.03)
    assert table.loc[5, ["pre_local", "post_long", "pre_mean"]].to_list() == pytest.approx([1, 1, 1], abs=0.03)
    for name in ("shape_corr", "ch0_QRS_corr", "ch0_QRS_sharpness"):
        assert table[name].idxmin() == 20, name
    for name in ("ch0_QRS_residual", "ch1_QRS_residual", "ch0_QRS_interval"):
        assert table[name].idxmax() == 20, name


def test_amplitudes_are_relative_to_the_recording():
    times, beats = regular()
    signal = heart(times)
    table, _ = features(signal, beats)
    for scaled in (signal * 1000, signal * [1, 7]):  # microvolts; another gain of one lead
        np.testing.assert_allclose(table, features(scaled, beats)[0], atol=2e-3)


def test_chosen_beats_are_measured_against_each_other_on_the_whole_records_clock():
    times, _ = regular()
    times -= 0.3 * (np.arange(len(times))[:, None] >= [9, 17, 25, 33]).sum(axis=1)  # these four come early
    signal, beats = heart(times), np.rint(times * FS).astype(int)
    whole, _ = features(signal, beats)
    np.testing.assert_array_equal(ecg.beat_features(signal, FS, beats, only=np.arange(len(beats)))[0], whole)
    X, index, _ = ecg.beat_features(signal, FS, beats, only=np.array([33, 25, 17, 9, 5]))
    few = pd.DataFrame(X, columns=NAMES, index=index)
    assert list(few.index) == [5, 9, 17, 25, 33]
    for name in ("pre_RR", "pre_post", "pre_previous"):
        np.testing.assert_array_equal(few[name], whole.loc[few.index, name], name)
    assert few.loc[9, ["pre_local", "pre_mean"]].to_numpy() == pytest.approx([1, 0.5 / 0.56], abs=0.02)
    assert whole.loc[9, "pre_local"] == pytest.approx(0.5 / 0.8, abs=0.02)
    assert (few["corr_previous"] != whole.loc[few.index, "corr_previous"]).all()
    with pytest.raises(ValueError, match="asked for"):
        ecg.beat_features(signal, FS, beats, only=np.array([0]))


@settings(deadline=None, max_examples=15)
@given(st.integers(8, 30), st.floats(1.2, 9), st.sampled_from(["break", "gap", "pause"]))
@example(20, 4.0, "pause")
def test_what_is_no_rr_interval_enters_no_feature_and_its_beats_stay(at, seconds, kind):
    times, _ = regular()
    times[at:] += seconds
    beats, signal, breaks = np.rint(times * FS).astype(int), heart(times), []
    inside = slice(beats[at - 1] + int(0.5 * FS), beats[at] - int(0.45 * FS))
    if kind == "break":
        breaks = [(inside.start, inside.stop)]
    if kind == "gap":
        signal[inside, 0] = np.nan
    table, _ = features(signal, beats, breaks)
    assert list(table.index) == list(range(1, 39))
    pause = 3.0  # seconds; a longer one counts as so long
    assert table.loc[at, "pre_RR"] == pytest.approx(min(seconds + 0.8, pause) if kind == "pause" else 0.8, abs=0.01)
    others = table.drop(index=at)
    assert others["pre_RR"].to_numpy() == pytest.approx(0.8, abs=0.01)
    assert others["pre_local"].to_numpy() == pytest.approx(1, abs=0.02)
    if kind != "pause" or seconds + 0.8 > pause:
        assert others["pre_mean"].to_numpy() == pytest.approx(1, abs=0.02)


def test_beats_outside_or_in_missing_or_flat_signal_are_dropped_and_counted():
    times, beats = regular()
    signal = heart(times)
    signal[beats[5] + 10, 0] = np.nan
    signal[beats[9] - 150 : beats[9] + 200, 1] = 0.5
    table, dropped = features(signal, beats)
    assert not {5, 9} & set(table.index)
    assert dropped["signal missing or flat"] == 2
    _, dropped = features(signal, np.concatenate([[10, 70], beats[1:]]))
    assert dropped["window leaves the record"] == 1
    _, dropped = features(signal, beats, [(beats[20] - 50, beats[22] + 50)])
    assert dropped["inside an episode without beats"] == 3
    for count in (3, 4, 10):
        times, beats = regular(beats=count)
        assert len(features(heart(times), beats)[0]) == count - 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s, b: (s, b[:2]), "fewer than three"),
        (lambda s, b: (s * [1, np.nan], b), "missing signal"),
        (lambda s, b: (s * [1, 0], b), "flat signal"),
        (lambda s, b: (np.where(np.arange(len(s))[:, None] > 400, np.nan, s), b), "no usable beat"),
        (lambda s, b: (1e299 * s, b), "no voltages"),
    ],
)
@pytest.mark.parametrize("compute", [ecg.beat_features, ecg.published_features])
def test_records_without_usable_signal_say_why(compute, spoil, reason):
    times, beats = regular()
    signal, beats = spoil(heart(times), beats)
    with pytest.raises(ValueError, match=reason), np.errstate(all="ignore"):
        compute(signal, FS, beats)


# ----------------------------------------------------------------------------------------------------------- figures
def test_gross_average_and_by_record_against_numbers_by_hand():
    y, decision = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    beats = pd.DataFrame({"record": list("aabbaabc"), "aami": list("NNNNSVVF")})
    result = ecg.figures(y, decision, beats)
    assert result["counts"] == {"tp": 3, "fn": 1, "fp": 1, "tn": 3}
    assert {result[name] for name in (*ecg.FIGURES, "accuracy", "f1")} == {0.75}
    assert ecg.balanced_accuracy(decision, y) == 0.75
    assert result["found"] == {"S": 1, "V": 1, "F": 0}
    table = ecg.by_record(y, decision, beats)
    counts = [[4, 2, 1, 1, 0], [3, 2, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert table[["beats", "N", "S", "V", "F"]].to_numpy().tolist() == counts
    assert table["sensitivity"].to_list() == [1, 1, 0]
    assert table.loc[["a", "b"], "specificity"].to_list() == [1, 0.5]
    assert np.isnan(table.loc["c", "specificity"])  # it has no normal beat, and is left out of the average
    assert list(result["average"].values()) == pytest.approx([0.875, 2 / 3, 0.75, 0.75])
    assert ecg.columns(result)["found_V"] == 1
    assert ecg.columns(result)["balanced_accuracy_low95"] == result["interval95"]["balanced_accuracy"][0]
    assert list(ecg.columns(ecg.figures(y, decision, None))) == list(ecg.FIGURES)


def test_intervals_are_of_records_not_of_beats():
    beats = pd.DataFrame({"record": np.repeat(list("abcdefghij"), 100), "aami": np.tile(list("NV"), 500)})
    y = (beats["aami"] == "V").to_numpy().astype(int)
    wrong = beats["record"].isin(["a", "b"]).to_numpy()  # two of ten patients are all wrong
    low, high = ecg.figures(y, np.where(wrong, 1 - y, y), beats)["interval95"]["balanced_accuracy"]
    assert (low, high) == (pytest.approx(0.5, abs=0.11), 1.0)
    spread = np.arange(1000) % 5 == 0  # as many wrong beats in every patient
    low, high = ecg.figures(y, np.where(spread, 1 - y, y), beats)["interval95"]["balanced_accuracy"]
    assert low == high == pytest.approx(0.8)


def test_the_threshold_leaves_the_usual_one_only_where_the_patients_agree():
    rng = np.random.default_rng(0)
    patients, unknown = np.repeat(list("abcdefghij"), 200), np.full(2000, "unknown")
    y = np.tile([0, 1], 1000)
    clear = np.where(y, 0.3, 0.1) + rng.uniform(-0.05, 0.05, 2000)  # all are told apart at 0.2, none at 0.5
    assert 0.15 <= ecg.choose_threshold(clear, y, patients, 0.5) <= 0.25
    assert 0.15 <= ecg.choose_threshold(clear, y, unknown, 0.5) <= 0.25
    some = np.where(patients == "a", clear, np.where(y, 0.8, 0.2))  # one patient in ten would have it lower
    assert ecg.choose_threshold(some, y, patients, 0.5) == 0.5
    assert ecg.choose_threshold(some, y, patients, 0.7) == 0.7
    few = np.flatnonzero((y == 0) | (np.arange(2000) < 98))  # 49 abnormal beats
    assert ecg.choose_threshold(clear[few], y[few], unknown[few], 0.5) == 0.5
    single = np.where(np.arange(2000) == 1, 0.45, np.where(y, 0.8, 0.2))  # a single beat would have it lower
    assert ecg.choose_threshold(single, y, unknown, 0.5) == 0.5


def test_a_threshold_that_is_the_best_of_91_by_chance_is_not_chosen():
    moved = []
    for seed in range(40):  # data sets in which 0.5 is the best threshold for all patients
        rng = np.random.default_rng(seed)
        patients, y = np.repeat(np.arange(10), 60), rng.integers(0, 2, 600)
        logit = 1.8 * (2 * y - 1) + 1.3 * rng.normal(size=600)
        moved.append(ecg.choose_threshold(1 / (1 + np.exp(-logit)), y, patients, 0.5) != 0.5)
    assert np.mean(moved) <= 0.05  # tested as if it were the only one, the best is chosen in 0.28 of them
