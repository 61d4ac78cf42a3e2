"""preprocess_mitbih.py: records to features to a data set."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb
from conftest import BEAT_COUNT, make_record, refusal, write_atr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preprocess_mitbih as pre
from fhe_mlp import ecg
from fhe_mlp.cli import InputError
from fhe_mlp.dataset import draw_probability, load_dataset
from fhe_mlp.scaling import CLIP_SD, apply_scaler
from preprocess_mitbih import main

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
UNSEEN = ("--split", "inter-patient", "--abnormal", "S", "V", "F")
BESIDE = "usable beats beside a time that is no RR interval"
UNDEFINED = "annotations of a code that WFDB does not define"
DEFINED, RATE = ["## annotation type definitions", "42 z odd beat", "## end of definitions"], "## time resolution: "


def build(records, folder, *options):
    main(["--records-dir", str(records), "--data-dir", str(folder), *map(str, options)])
    return json.loads((folder / "dataset.json").read_text()), pd.read_csv(folder / "beats.csv", dtype=str)


def read(folder, **options):
    """Return the result of read_record for a record of make_record, and the samples of the beats in its signal."""
    samples = make_record(folder, "r", **options)
    return pre.read_record(str(folder / "r")), samples


# ------------------------------------------------------------------------------------------------------ the data set
@pytest.mark.parametrize(
    ("abnormal", "limit", "drawn"),
    [("SVFQ", 40, [40, 5, 10, 2, 23]), ("SVF", 200, [17, 5, 10, 2, 0]), ("VQ", 6, [6, 0, 6, 0, 0])],
)
def test_a_draw_takes_rare_classes_first_and_fills_with_q(abnormal, limit, drawn):
    aami = np.array(list("N" * 100 + "S" * 5 + "V" * 10 + "F" * 2 + "Q" * 50))
    got = aami[pre.draw_balanced(aami, abnormal, limit, np.random.default_rng(1))]
    assert [(got == c).sum() for c in "NSVFQ"] == drawn


def test_the_command_writes_checked_disjoint_balanced_arrays(records, tmp_path, capsys):
    description, beats = build(records, tmp_path / "d")
    data = load_dataset(tmp_path / "d")
    assert not beats.duplicated(["record", "sample"]).any()
    assert len(beats) == 2 * 4 * 19  # every third beat is abnormal; the last beat, which is dropped, is one of them
    for split, part in data.parts.items():
        rows = beats[beats["split"] == split]
        assert part.X.shape == (len(rows), 32)
        assert np.abs(part.X).max() <= CLIP_SD
        np.testing.assert_array_equal(part.y, rows["aami"] != "N")
        assert abs(part.y.mean() - 0.5) < 0.02
        assert description["counts"][split] == {c: int((rows["aami"] == c).sum()) for c in "NSVFQ"}
    assert len(data.test.y) == int(np.ceil(0.3 * len(beats)))
    assert abs(data.train.X.mean()) < 0.05
    assert description["recipe"]["beats_dropped"]["first or last beat"] == 8
    assert "only" in capsys.readouterr().out  # the default 12,074 a class are not there, and it says so
    again, _ = build(records, tmp_path / "d", "--workers", 1)
    assert again == description
    other, _ = build(records, tmp_path / "d", "--seed", 7)
    assert other["sha256"] != description["sha256"]


def test_the_inter_patient_split_separates_patients(records, tmp_path):
    make_record(records, "201", seed=9)
    make_record(records, "202", seed=10)
    _, beats = build(records, tmp_path / "d", *UNSEEN)
    groups = beats.groupby(["record", "patient", "split"])["sample"].nunique()
    assert (groups == BEAT_COUNT - 2).all()  # every usable beat, in one part
    assert len(beats) == groups.sum()
    records, patients, splits = zip(*groups.index)
    assert (records, patients) == (
        ("100", "101", "103", "106", "201", "202"),
        ("100", "101", "103", "106", "201", "201"),
    )
    assert [record for record, split in zip(records, splits) if split == "test"] == ["100", "103", "202"]
    assert set(splits) == {"train", "val", "test"}
    X, probability = load_dataset(tmp_path / "d").train.X, draw_probability(beats[beats["split"] == "train"])
    free = np.abs(X).max(axis=0) < CLIP_SD  # columns in which nothing was clipped
    np.testing.assert_allclose(probability @ X[:, free], 0, atol=1e-5)
    assert not np.allclose(X[:, free].mean(axis=0), 0, atol=1e-2)


def test_training_records_of_many_s_beats_have_copies_in_which_these_are_the_majority(records, tmp_path, capsys):
    for seed, name in enumerate(("101", "106", "108", "100")):
        make_record(records, name, seed=seed, symbols=["N", "A", "N", "N", "V"] * 33)
    description, beats = build(records, tmp_path / "a", *UNSEEN, "--s-majority", 0.3, 2)
    data = load_dataset(tmp_path / "a")
    originals = beats[beats["record"] == beats["patient"]]
    trained = sorted(originals.loc[originals["split"] == "train", "record"].unique())
    names = [f"{record}-S{ratio}" for record in trained for ratio in ("0.3", "2")]
    assert description["recipe"]["s_majority_copies"] == names
    assert len(names) == 4
    assert set(beats["record"]) == {*originals["record"], *names}
    assert set(data.train.beats["record"][data.train.copied]) == set(names)
    for name, copy in beats.drop(originals.index).groupby("record"):
        record, ratio = name.split("-S")
        own = originals[originals["record"] == record]
        after_s = set(own.loc[own["aami"].shift() == "S", "sample"])
        normal = set(copy.loc[copy["aami"] == "N", "sample"])
        assert copy["aami"].value_counts().to_dict() == {"S": 33, "N": round(33 * float(ratio))}
        assert (normal < after_s) if ratio == "0.3" else (after_s < normal)
        assert (set(copy["split"]), set(copy["patient"])) == ({"train"}, {record})
        assert set(zip(copy["sample"], copy["symbol"])) <= set(zip(own["sample"], own["symbol"]))
        alone = pre.read_record(str(records / record), s_majority=[float(ratio)])
        rows = (alone.beats["record"] == name).to_numpy()
        np.testing.assert_array_equal(alone.beats["sample"][rows].astype(str), copy["sample"])
        scaled = data.train.X[data.train.beats["record"] == name]
        np.testing.assert_array_equal(scaled, apply_scaler(alone.X[rows], description["scaler"]))
    assert not pre.read_record(str(records / "100"), s_majority=[0.3]).beats["copy"].any()  # of DS2

    for options in (["--split", "inter-patient", "--s-majority"], ["--split", "random"]):
        _, beats = build(records, tmp_path / "b", *options)
        assert not beats["record"].str.contains("-").any()
    base = ["--records-dir", records, "--data-dir", tmp_path / "c"]
    assert "needs --split inter-patient" in refusal(main, [*base, "--s-majority", 0.5], capsys)
    assert "--per-class" in refusal(main, [*base, "--split", "inter-patient", "--per-class", "all"], capsys)


def test_options_compose_and_other_leads_are_said_and_counted(records, tmp_path, capsys):
    make_record(records, "102", symbols=["/", "N", "V"] * 20, names=("V2", "V5"))
    description, beats = build(records, tmp_path / "a", "--exclude-paced", "--abnormal", "V", "--per-class", "20")
    assert description["recipe"]["leads"] == {record: ["MLII", "V1"] for record in ("100", "101", "103", "106")}
    assert beats["aami"].value_counts().to_dict() == {"N": 20, "V": 20}
    capsys.readouterr()
    description, beats = build(records, tmp_path / "b", "--abnormal", "V", "Q", "--per-class", "all")
    assert (beats["symbol"] == "/").sum() == 19  # the record's first beat is dropped
    shown = capsys.readouterr()
    assert shown.err.count("has the leads") == 1
    assert "record 102 has the leads V5 and V2, not MLII and V1 or V2 or V4 or V5" in shown.err
    assert f" {(beats['record'] == '102').sum()}" in next(x for x in shown.out.splitlines() if x.startswith("all"))
    assert description["recipe"]["records_with_other_leads"] == ["102"]
    assert description["recipe"]["leads"]["102"] == ["V5", "V2"]


def test_unsuited_records_are_named_and_left_out_and_companion_files_are_no_records(records, tmp_path, capsys):
    make_record(records, "one", leads=1)
    make_record(records, "silent", annotate=False)
    make_record(records, "flat", edit=lambda x: x * [1, 0])
    make_record(records, "slow", fs=50.0)
    for suffix in (".hea", ".dat", ".atr"):
        (records / f"._100{suffix}").write_bytes(b"\0\5\x16\7 Mac OS X")
    description, beats = build(records, tmp_path / "d")
    error, left_out = capsys.readouterr().err, description["recipe"]["records_left_out"]
    reasons = {"one": "1 ECG signals (MLII in mV)", "silent": ".atr", "flat": "flat", "slow": "50"}
    assert left_out.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in left_out[name]
        assert f"record {name} is left out" in error
    assert set(beats["record"]) == {"100", "101", "103", "106"} == set(description["recipe"]["records"])


def test_refusals_and_a_full_disk_leave_the_data_set_that_was_there(records, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "d"
    build(records, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    base = ["--data-dir", folder, "--records-dir"]
    assert "no records here" in refusal(main, [*base, tmp_path / "nowhere", "--no-download"], capsys)
    assert "--per-class" in refusal(main, [*base, records, "--per-class", "0"], capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("x")
    assert "no WFDB header" in refusal(main, [*base, tmp_path / "other"], capsys)
    save = np.save

    def no_room(path, array):
        if "test_y" in path.name:  # the last array
            raise OSError(28, "No space left on device", str(path))
        save(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", no_room)
        why = refusal(main, [*base, records, "--seed", "3"], capsys)
    assert "test_y.npy: cannot be written (No space left on device); free space" in why
    whole = (records / "100.hea").read_text()
    (records / "100.hea").write_text("no header\n")
    assert "100: cannot be read" in refusal(main, [*base, records], capsys)
    (records / "100.hea").write_text(whole)
    mine = folder / "Arryth_MITBIH_val_y.npy"  # of others, in the place of ours
    np.save(mine, np.array([-1.0, 1.0]))
    own = mine.read_bytes()
    assert f"{folder}: holds {mine.name}, which is others' or was changed" in refusal(main, [*base, records], capsys)
    assert mine.read_bytes() == own
    mine.write_bytes(before[mine.name])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_published_columns_are_an_option_and_in_millivolts(records, tmp_path):
    description, _ = build(records, tmp_path / "d", "--features", "published")
    assert description["features"] == ecg.PUBLISHED
    make_record(tmp_path, "r")
    make_record(tmp_path, "u", units=("uV", "uV"), edit=lambda x: 1000 * x)
    X, again = (pre.read_record(str(tmp_path / name), "published").X for name in ("r", "u"))
    np.testing.assert_allclose(again[:, 4], X[:, 4], atol=0.01)
    assert X[:, 4].max() < 2


# ------------------------------------------------------------------------------------------------------- annotations
def test_beat_codes_have_their_class_and_other_codes_are_left_out(tmp_path):
    expected, samples = read(tmp_path, symbols=["N"] * 60)
    symbols, defined = ["N", *"NLRBAaJSVrFejnE/fQ?" * 3, "N", "N"], [(0, '"', note) for note in DEFINED]
    others = [(samples[10] + 100 + k, code) for k, code in enumerate(["x", "(", "p", "s", 15, 42, 49])]

    def marks(samples, _):
        return [*defined, *sorted([*zip(samples, symbols), *others], key=lambda mark: mark[0])]

    got, _ = read(tmp_path, symbols=["N"] * 60, clock=360, marks=marks)
    np.testing.assert_array_equal(got.X, expected.X)
    classes = {"N": "NLRBejn", "S": "AaJS", "V": "VEr", "F": "F", "Q": "/fQ?"}
    assert dict(zip(got.beats["symbol"], got.beats["aami"])) == {c: name for name in classes for c in classes[name]}
    assert got.paced
    assert got.noted[UNDEFINED] == 3


@few
@given(st.sampled_from([100, 128, 250, 360, 500, 1000]), st.sampled_from([125, 250, 360.5, 500, 1000]))
def test_annotations_run_on_their_own_clock(tmp_path, fs, clock):
    expected, samples = read(tmp_path, fs=float(fs))
    got, _ = read(tmp_path, fs=float(fs), clock=clock)
    assert np.abs(got.beats["sample"] - samples[1:-1]).max() <= 0.5 * fs / clock + 1
    np.testing.assert_allclose(got.X[:, 0], expected.X[:, 0], atol=2 / fs + 1 / clock)


@few
@given(st.data())
def test_annotations_of_each_lead_in_any_order_are_one_beat_each(tmp_path, data):
    def marks(samples, symbols):
        once = [(s, c, ("chan", 0)) for s, c in zip(samples, symbols)]
        twice = [(s + late, c, ("chan", 1), ("num", 3)) for s, c, late in zip(samples, symbols, delays)]
        return data.draw(st.permutations([*once, *twice]))

    delays = data.draw(st.lists(st.integers(0, 40), min_size=60, max_size=60))
    expected, _ = read(tmp_path)
    got, _ = read(tmp_path, marks=marks)
    np.testing.assert_array_equal(got.X, expected.X)
    pd.testing.assert_frame_equal(got.beats, expected.beats)
    assert got.dropped["annotated twice"] == 60
    assert got.noted["annotations out of order"] > 0


def test_a_beat_of_two_classes_is_dropped_but_ends_its_neighbours_intervals(tmp_path):
    expected, _ = read(tmp_path)
    got, _ = read(tmp_path, marks=lambda s, c: [*zip(s[:21], c), (s[20] + 9, "N"), *zip(s[21:], c[21:])])
    assert got.dropped["annotated as two classes"] == 1
    np.testing.assert_array_equal(got.X, np.delete(expected.X, 19, axis=0))


@pytest.mark.parametrize(("outside", "at"), [(1, None), (3, -1), (3, 10**9), (4, -1), (40, 10**9)])
def test_beats_outside_the_signal_are_dropped_or_too_many(tmp_path, outside, at):
    expected, _ = read(tmp_path)
    at = wfdb.rdheader(str(tmp_path / "r")).sig_len if at is None else at  # None: as wfdb's sampto leaves
    got, _ = read(tmp_path, marks=lambda s, c: [*zip(s, c), *[(at, "N")] * outside])
    if outside > 3:
        assert f"{outside} of {60 + outside} beats outside" in got
    else:
        assert got.dropped["outside the signal"] == outside
        np.testing.assert_array_equal(got.X, expected.X)


@pytest.mark.parametrize(
    ("more", "lost", "beside", "usable"),
    [
        ([], [], 0, 58),
        ([(20, 90, "["), (23, 90, "]")], [21, 22, 23], 2, 55),
        ([(20, 90, "["), (20, 150, "!"), (23, 90, "]")], [21, 22, 23], 2, 55),
        ([(20, 90, "!"), (23, 90, "!")], [21, 22, 23], 2, 55),  # flutter waves alone
        ([(20, 90, "]")], [21, 22, 23], 2, 55),  # begun before the annotations
        ([(40, 90, "[")], [], 1, 40),  # never closed
        ([(20, 90, "~", ("sub", -1)), (23, 90, "~", ("sub", 0))], [21, 22, 23], 2, 55),
        ([(20, 90, "~", ("sub", 3)), (20, 150, "~", ("sub", 0))], [], 0, 58),  # noisy, but readable
        ([], range(21, 40), 2, 39),  # 16 s without a beat
    ],
)
def test_flutter_unreadable_signal_and_lapses_are_breaks(tmp_path, more, lost, beside, usable):
    def marks(samples, symbols):
        beats = [mark for k, mark in enumerate(zip(samples, symbols)) if k not in lost]
        extra = [(samples[k] + late, code, *item) for k, late, code, *item in more]
        return sorted([*beats, *extra], key=lambda mark: mark[0])

    got, _ = read(tmp_path, symbols=["N"] * 60, marks=marks)
    assert got.X[:, 0].max() < 0.95
    assert got.X[:, :2].max() < 1.2
    assert (got.noted[BESIDE], len(got.X)) == (beside, usable)


@pytest.mark.parametrize(
    "notes",
    [["## any"], [RATE + "360"] * 2, [RATE + "x"], [RATE + "0"], DEFINED[2:], [DEFINED[0] + "x"]],
)
def test_notes_that_wfdb_would_read_for_ever_or_that_state_no_clock_are_refused(tmp_path, notes):
    make_record(tmp_path, "r")
    write_atr(tmp_path / "r.atr", [*((0, '"', note) for note in notes), (400, "N"), (800, "N")])
    with pytest.raises(InputError, match="no clock" if notes == [RATE + "0"] else "notes of a program"):
        pre.read_record(str(tmp_path / "r"))


def test_an_annotation_file_cut_anywhere_is_refused(tmp_path):
    make_record(tmp_path, "r")
    path, whole = tmp_path / "r.atr", (tmp_path / "r.atr").read_bytes()
    assert len(ecg.read_annotations(str(tmp_path / "r"), 360)[0]) == 61
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises((ValueError, IndexError)):
            ecg.read_annotations(str(tmp_path / "r"), 360)
    with pytest.raises(InputError, match=r"damaged.*get a new copy"):
        pre.read_record(str(tmp_path / "r"))


# ----------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize(
    "names",
    [
        ("MLII", "V1"),
        ("V5", "V2"),
        ("ECG lead II", "aVF"),
        ("ECG1", "ECG2"),
        ("ECG", "ECG"),
        ("x", "V1"),
        ("ml 2", "v5"),
    ],
)
def test_swapping_the_two_leads_changes_nothing(tmp_path, names):
    expected, _ = read(tmp_path, names=names)
    got, _ = read(tmp_path, names=names[::-1], edit=lambda signal: signal[:, ::-1])
    np.testing.assert_array_equal(got.X, expected.X)
    assert got.leads == expected.leads == list(names)
    assert ecg.are_expected(names) == (names in [("MLII", "V1"), ("ml 2", "v5")])


def test_the_two_ecg_leads_of_more_signals_are_used(tmp_path):
    expected, _ = read(tmp_path)
    more = {"names": ("V1", "ABP", "EEG C4", "MLII", "V6"), "units": ("uV", "mmHg", "mV", "mV", "V"), "leads": 5}
    got, _ = read(tmp_path, edit=lambda x: np.column_stack([x[:, 1] * 1000, x, x[:, 0], x[:, 0] / 1000]), **more)
    assert got.leads == ["MLII", "V1"]
    np.testing.assert_allclose(got.X, expected.X, atol=0.02)
    for units in (("mV", "mmHg"), ("NU", "mV"), ("mV", "bpm")):
        got, _ = read(tmp_path, units=units)
        assert "has 1 ECG signals" in got
        assert "mmHg" in got or "mmHg" not in units


@pytest.mark.parametrize(("second", "atol"), [(4, 0.001), (2, 0.2)])  # V1 at 360 and at 180 Hz
@pytest.mark.parametrize("clock", [None, 360])
def test_leads_of_several_samples_a_frame_come_at_their_own_rate(tmp_path, second, atol, clock):
    """360 Hz as 4 samples in each of 90 frames a second; the other lead at 180 Hz, a pressure once a frame."""
    expected, samples = read(tmp_path, symbols=["N"] * 60)
    digital = wfdb.rdrecord(str(tmp_path / "r"), physical=False).d_signal
    digital = digital[: len(digital) // 4 * 4].astype("<i2")
    v1 = digital[:: 4 // second, 1].reshape(-1, second)
    frames = np.hstack([digital[:, 0].reshape(-1, 4), v1, np.zeros((len(v1), 1))]).astype("<i2")
    frames.tofile(tmp_path / "m.dat")
    lines = [f"m 3 90 {len(frames)}"]
    lines += [f"m.dat 16x{k} 9000(0)/mV 16 0 0 0 0 {name}" for k, name in ((4, "MLII"), (second, "V1"))]
    (tmp_path / "m.hea").write_text("\n".join([*lines, "m.dat 16 1/mmHg 16 0 0 0 0 ABP"]) + "\n")
    write_atr(tmp_path / "m.atr", [(round(s * (clock or 90) / 360), "N") for s in samples], clock)
    got = pre.read_record(str(tmp_path / "m"))
    assert np.abs(got.beats["sample"] * 4 / second - samples[1:-1]).max() <= (1 if clock else 4)
    np.testing.assert_allclose(got.X[:, 0], expected.X[:, 0], atol=0.006 if clock else 0.013)  # a sample
    if clock:
        np.testing.assert_allclose(got.X[:, 2:16], expected.X[:, 2:16], atol=atol)


@pytest.mark.parametrize("layout", ["fixed", "variable", "others"])
def test_segments_are_one_record_or_refused(tmp_path, layout):
    expected, _ = read(tmp_path)
    whole = wfdb.rdrecord(str(tmp_path / "r"))
    half, gain = whole.sig_len // 2, {"adc_gain": whole.adc_gain, "baseline": whole.baseline}
    for name, rows in (("r_1", slice(0, half)), ("r_2", slice(half, None))):
        names, signal = ["V1", "MLII"] if (layout, name) == ("others", "r_2") else ["MLII", "V1"], whole.p_signal[rows]
        wfdb.wrsamp(name, 360, ["mV", "mV"], names, signal, fmt=["16"] * 2, write_dir=str(tmp_path), **gain)
    lines = [f"r_1 {half}", f"r_2 {whole.sig_len - half}"]
    if layout == "variable":
        lines.insert(0, "r_0 0")
        (tmp_path / "r_0.hea").write_text("r_0 2 360 0\n~ 0 200/mV 16 0 0 0 0 V1\n~ 0 200/mV 16 0 0 0 0 MLII\n")
    (tmp_path / "r.hea").write_text(f"r/{len(lines)} 2 360 {whole.sig_len}\n" + "\n".join(lines) + "\n")
    if layout == "others":
        with pytest.raises(InputError, match="segments hold other"):
            pre.read_record(str(tmp_path / "r"))
        return
    got = pre.read_record(str(tmp_path / "r"))
    np.testing.assert_allclose(got.X, expected.X, atol=1e-5)
    assert got.leads == ["MLII", "V1"]


TWO_LEADS = "\nr.dat 16{} 200/mV 16 0 0 0 0 MLII\nr.dat 16 200/mV 16 0 0 0 0 V1\n"


@pytest.mark.parametrize(
    "header",
    [
        "r 2 360 1000000000000" + TWO_LEADS.format(""),
        "r 1000000 360 100" + TWO_LEADS.format(""),
        "r/1000000 2 360 100" + TWO_LEADS.format(""),
        "r/2 2 360 100000000000\nr 50000000000\nr 50000000000\n",
        "r 2 360 100" + TWO_LEADS.format("x1000000000"),
        "r 2 360 100" + TWO_LEADS.format(":10000000000"),
        "r 2 360 100\n" + "#" * 1_000_000,
    ],
)
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path, header):
    make_record(tmp_path, "r")
    (tmp_path / "r.hea").write_text(header)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be read"):
            pre.read_record(str(tmp_path / "r"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("fmt", ["16", "24", "32", "80", "212", "516"])
def test_formats_line_ends_and_encodings_are_read_and_truncated_signals_refused_in_one_line(tmp_path, fmt):
    expected, _ = read(tmp_path)
    got, _ = read(tmp_path, fmt=fmt)
    header, path = (tmp_path / "r.hea").read_bytes(), tmp_path / "r.dat"
    (tmp_path / "r.hea").write_bytes(header.replace(b"\n", b"\r\n") + "# Müller, 心電図\r\n".encode())
    np.testing.assert_array_equal(pre.read_record(str(tmp_path / "r")).X, got.X)
    np.testing.assert_allclose(got.X[:, 0], expected.X[:, 0], rtol=1e-6)
    if fmt != "80":  # 8 bits
        np.testing.assert_allclose(got.X, expected.X, atol=0.1)
    whole = path.read_bytes()
    for length in (30, 5000, len(whole) - 300):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"r: cannot be read as a WFDB record, truncated or damaged [^\n]*$"):
            pre.read_record(str(tmp_path / "r"))
