"""preprocess_mitbih.py: records to features to a data set."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb
from conftest import BEAT_COUNT, ROOT, make_record, refusal, write_atr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preprocess_mitbih as pre
from fhe_mlp import arrays as arr
from fhe_mlp import cli, published_features, records
from preprocess_mitbih import main

MITDB = Path(os.environ.get("MITDB_DIR", ROOT / "data" / "mitdb"))
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CODES = "NLRBAaJSVrFejnE/fQ?"  # WFDB's beat annotations


def build(records, folder, *options):
    main(["--records-dir", str(records), "--data-dir", str(folder), *map(str, options)])
    return json.loads((folder / "dataset.json").read_text()), pd.read_csv(folder / "beats.csv", dtype=str)


def test_draw_keeps_rare_classes_and_fills_with_q():
    aami = np.array(["N"] * 100 + ["S"] * 5 + ["V"] * 10 + ["F"] * 2 + ["Q"] * 50)
    drawn = aami[pre.draw_balanced(aami, "SVFQ", 40, np.random.default_rng(1))]
    assert {c: int((drawn == c).sum()) for c in "NSVFQ"} == {"N": 40, "S": 5, "V": 10, "F": 2, "Q": 23}
    drawn = aami[pre.draw_balanced(aami, "SVF", None, np.random.default_rng(1))]
    assert {c: int((drawn == c).sum()) for c in "NSVFQ"} == {"N": 17, "S": 5, "V": 10, "F": 2, "Q": 0}
    drawn = aami[pre.draw_balanced(aami, "SVFQ", 6, np.random.default_rng(1))]
    assert (drawn == "N").sum() == 6
    assert (drawn == "Q").sum() == 0


def test_command_writes_checked_disjoint_balanced_arrays(records, tmp_path, capsys):
    description, beats = build(records, tmp_path / "d")
    data = arr.load_arrays(tmp_path / "d")
    assert not beats.duplicated(["record", "sample"]).any()
    assert len(beats) == 2 * 4 * 19  # every third beat is abnormal; the last beat, which is dropped, is one of them
    assert len(beats) == sum(len(y) for _, y in data.values())
    for split, (X, y) in data.items():
        part = beats[beats["split"] == split]
        assert X.shape == (len(part), 32)
        assert X.dtype == np.float32
        assert np.abs(X).max() <= arr.CLIP_SD
        np.testing.assert_array_equal(y, part["aami"] != "N")
        assert abs(y.mean() - 0.5) < 0.02
        assert description["counts"][split] == {c: int((part["aami"] == c).sum()) for c in "NSVFQ"}
    assert len(data["test"][1]) == int(np.ceil(0.3 * len(beats)))
    assert abs(data["train"][0].mean()) < 0.05
    assert description["recipe"]["beats_dropped"]["first or last beat"] == 8
    assert "only" in capsys.readouterr().out  # the default 12,074 a class are not there, and it says so


def test_same_records_and_seed_give_the_same_bytes(records, tmp_path):
    first, _ = build(records, tmp_path / "a", "--workers", 1)
    again, _ = build(records, tmp_path / "b", "--workers", 4)
    other, _ = build(records, tmp_path / "c", "--seed", 7)
    assert first == again
    assert first["sha256"] != other["sha256"]


def test_inter_patient_split_keeps_patients_apart(records, tmp_path):
    make_record(records, "108", seed=9)
    _, beats = build(records, tmp_path / "d", "--split", "inter-patient", "--abnormal", "S", "V", "F")
    by_split = {split: set(part["record"]) for split, part in beats.groupby("split")}
    assert by_split["test"] == {"100", "103"}
    assert by_split["train"] | by_split["val"] == {"101", "106", "108"}
    assert not by_split["train"] & by_split["val"]
    assert not beats.duplicated(["record", "sample"]).any()
    for split, own in by_split.items():
        assert (beats["split"] == split).sum() == (BEAT_COUNT - 2) * len(own)  # every usable beat
    train = beats["split"] == "train"
    X, _ = arr.load_arrays(tmp_path / "d")["train"]
    probability = arr.draw_probability(beats[train])
    free = np.abs(X).max(axis=0) < arr.CLIP_SD  # columns in which nothing was clipped
    np.testing.assert_allclose(probability @ X[:, free], 0, atol=1e-5)
    assert not np.allclose(X[:, free].mean(axis=0), 0, atol=1e-2)


def test_training_records_of_many_s_beats_have_copies_in_which_these_are_the_majority(records, tmp_path, capsys):
    symbols = ["N", "A", "N", "N", "V"] * 33
    for seed, name in enumerate(("101", "106", "108", "100")):
        make_record(records, name, seed=seed, symbols=symbols)
    description, beats = build(records, tmp_path / "a", "--split", "inter-patient", "--s-majority", 0.3, 2)
    originals = beats[~beats["record"].str.contains("-")]
    trained = sorted(originals.loc[originals["split"] == "train", "record"].unique())
    names = [f"{record}-S{ratio}" for record in trained for ratio in ("0.3", "2")]
    assert len(trained) == 2
    assert description["recipe"]["s_majority_copies"] == names
    assert set(beats["record"]) == {*originals["record"], *names}
    for name, copy in beats.drop(originals.index).groupby("record"):
        record, ratio = name.split("-S")
        own = originals[originals["record"] == record]
        after_s = set(own.loc[own["aami"].shift() == "S", "sample"])
        normal = set(copy.loc[copy["aami"] == "N", "sample"])
        assert copy["aami"].value_counts().to_dict() == {"S": 33, "N": round(33 * float(ratio))}
        assert (normal < after_s) if ratio == "0.3" else (after_s < normal)
        assert set(copy["split"]) == {"train"}
        assert set(zip(copy["sample"], copy["symbol"])) <= set(zip(own["sample"], own["symbol"]))
        alone, X = pre.read_record(str(records / record), s_majority=[float(ratio)])["copies"][name]
        np.testing.assert_array_equal(alone["sample"].astype(str), copy["sample"])
        position = np.flatnonzero((beats["record"] == name)[beats["split"] == "train"])
        scaled = arr.load_arrays(tmp_path / "a")["train"][0][position]
        np.testing.assert_array_equal(scaled, arr.apply_scaler(X, description["scaler"]))
    assert not pre.read_record(str(records / "100"), s_majority=[0.3])["copies"]  # of DS2

    for options in (["--split", "inter-patient", "--s-majority"], ["--split", "random"]):
        _, beats = build(records, tmp_path / "b", *options)
        assert not beats["record"].str.contains("-").any()
    base = ["--records-dir", records, "--data-dir", tmp_path / "c"]
    assert "needs --split inter-patient" in refusal(main, [*base, "--s-majority", 0.5], capsys)
    assert "--per-class" in refusal(main, [*base, "--split", "inter-patient", "--per-class", "all"], capsys)


def test_options_compose(records, tmp_path):
    make_record(records, "102", symbols=["/", "N", "V"] * 20)
    description, beats = build(records, tmp_path / "a", "--exclude-paced", "--abnormal", "V", "--per-class", "20")
    assert "102" not in description["recipe"]["records"]
    assert set(beats["aami"]) == {"N", "V"}
    assert len(beats) == 40
    description, beats = build(records, tmp_path / "b", "--abnormal", "V", "Q", "--per-class", "all")
    assert (beats["symbol"] == "/").sum() == 19  # the record's first beat is dropped


def test_unsuited_records_are_named_and_left_out(records, tmp_path, capsys):
    make_record(records, "one", leads=1)
    make_record(records, "silent", annotate=False)
    make_record(records, "flat", edit=lambda x: x * [1, 0])
    make_record(
        records, "lost", edit=lambda x: np.where([[False, True]] * (np.arange(len(x)) > 200)[:, None], np.nan, x)
    )
    make_record(records, "slow", fs=50.0)
    description, beats = build(records, tmp_path / "d")
    error = capsys.readouterr().err
    for name, reason in (
        ("one", "1 ECG signals (MLII in mV)"),
        ("silent", ".atr"),
        ("flat", "flat"),
        ("lost", "no usable beat"),
        ("slow", "50"),
    ):
        assert reason in description["recipe"]["records_left_out"][name]
        assert f"record {name} is left out" in error
    assert set(beats["record"]) == {"100", "101", "103", "106"}


def test_a_full_disk_leaves_the_data_set_that_was_there(records, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "d"
    build(records, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    write_bytes = pre.Path.write_bytes

    def no_room(path, content):
        if "dataset" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(pre.Path, "write_bytes", no_room)
    line = refusal(main, ["--records-dir", records, "--data-dir", folder, "--seed", "3"], capsys)
    assert "No space left" in line
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_refusals_name_the_cause_and_overwrite_nothing(records, tmp_path, capsys):
    folder = tmp_path / "d"
    build(records, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    base = ["--data-dir", folder, "--records-dir"]
    assert "no records here" in refusal(main, [*base, tmp_path / "nowhere", "--no-download"], capsys)
    assert "--per-class" in refusal(main, [*base, records, "--per-class", "0"], capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("x")
    assert "no WFDB header" in refusal(main, [*base, tmp_path / "other"], capsys)
    (records / "100.dat").write_bytes((records / "100.dat").read_bytes()[:5000])
    assert "100: cannot be read" in refusal(main, [*base, records], capsys)
    (records / "103.atr").write_bytes(b"")
    (records / "100.dat").unlink()
    (records / "100.hea").write_text("no header\n")
    assert "100: cannot be read" in refusal(main, [*base, records], capsys)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_whole_file_leaves_the_old_one_when_writing_fails(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), cli.whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def read(folder, *args, **kwargs):
    """What read_record makes of a record that make_record writes, and the samples of the beats in its signal."""
    samples = make_record(folder, "r", *args, **kwargs)
    return pre.read_record(str(folder / "r")), samples


def test_every_beat_code_counts_for_the_rhythm_and_has_its_class(tmp_path):
    want, samples = read(tmp_path, symbols=["N"] * 60)
    symbols = ["N", *CODES * 3, "N", "N"]
    got, _ = read(tmp_path, symbols=["N"] * 60, marks=lambda samples, _: zip(samples, symbols))
    np.testing.assert_array_equal(got["X"][:, 0], want["X"][:, 0])
    classes = dict(zip(got["beats"]["symbol"], got["beats"]["aami"]))
    assert classes == {**dict.fromkeys("NLRBejn", "N"), **dict.fromkeys("AaJS", "S"), **dict.fromkeys("VEr", "V")} | {
        "F": "F",
        **dict.fromkeys("/fQ?", "Q"),
    }
    assert got["paced"]


def test_codes_that_are_no_beats_are_left_out_and_unknown_ones_counted(tmp_path):
    want, samples = read(tmp_path)
    others = [(samples[10] + 100 + k, code) for k, code in enumerate(["x", "(", "p", "s", 15, 42, 49])]
    got, _ = read(tmp_path, marks=lambda samples, symbols: sorted([*zip(samples, symbols), *others]))
    np.testing.assert_array_equal(got["X"], want["X"])
    assert got["noted"]["annotations of a code that WFDB does not define"] == 3


@few
@given(st.sampled_from([100, 128, 250, 360, 500, 1000]), st.sampled_from([125, 250, 360.5, 500, 1000]))
def test_annotations_run_on_their_own_clock(tmp_path, fs, clock):
    want, samples = read(tmp_path, fs=float(fs))
    got, _ = read(tmp_path, fs=float(fs), clock=clock)
    assert np.abs(got["beats"]["sample"] - samples[1:-1]).max() <= 0.5 * fs / clock + 1
    np.testing.assert_allclose(got["X"][:, 0], want["X"][:, 0], atol=2 / fs + 1 / clock)


@few
@given(st.data())
def test_annotations_of_each_lead_in_any_order_are_one_beat_each(tmp_path, data):
    def marks(samples, symbols):
        once = [(s, c, ("chan", 0)) for s, c in zip(samples, symbols)]
        twice = [(s + late, c, ("chan", 1), ("num", 3)) for s, c, late in zip(samples, symbols, delays)]
        return data.draw(st.permutations([*once, *twice]))

    delays = data.draw(st.lists(st.integers(0, 40), min_size=60, max_size=60))
    want, samples = read(tmp_path)
    got, _ = read(tmp_path, marks=marks)
    np.testing.assert_array_equal(got["X"], want["X"])
    pd.testing.assert_frame_equal(got["beats"], want["beats"])
    assert got["dropped"]["annotated twice"] == 60
    assert got["noted"]["annotations out of order"] > 0


def test_a_beat_of_two_classes_is_dropped_but_ends_its_neighbours_intervals(tmp_path):
    want, samples = read(tmp_path)
    got, _ = read(tmp_path, marks=lambda s, c: [*zip(s[:21], c), (s[20] + 9, "N"), *zip(s[21:], c[21:])])
    assert got["dropped"]["annotated as two classes"] == 1
    np.testing.assert_array_equal(got["X"], np.delete(want["X"], 19, axis=0))


@few
@given(st.integers(1, 40), st.booleans())
def test_beats_outside_the_signal_are_dropped_or_too_many(tmp_path, outside, before):
    last = -1 if before else 10**9
    want, samples = read(tmp_path)
    got, _ = read(tmp_path, marks=lambda s, c: [*zip(s, c), *[(last, "N")] * outside])
    if outside > 3:
        assert f"{outside} of {60 + outside} beats outside" in got["skipped"]
    else:
        assert got["dropped"]["outside the signal"] == outside
        np.testing.assert_array_equal(got["X"], want["X"])
    length = wfdb.rdheader(str(tmp_path / "r")).sig_len
    got, _ = read(tmp_path, marks=lambda s, c: [*zip(s, c), (length, "N")])  # as wfdb's sampto leaves
    assert got["dropped"]["outside the signal"] == 1


def test_flutter_unreadable_signal_and_lapses_are_breaks(tmp_path):
    def noted(*more, drop=()):
        def marks(samples, symbols):
            s = samples
            extra = [(s[a] + d, code, *item) for a, d, code, *item in more]
            return sorted([*(m for k, m in enumerate(zip(s, symbols)) if k not in drop), *extra], key=lambda m: m[0])

        got, _ = read(tmp_path, symbols=["N"] * 60, marks=marks)
        assert got["X"][:, 0].max() < 0.95
        assert got["X"][:, :2].max() < 1.2
        return got["noted"]["usable beats beside a time that is no RR interval"], len(got["X"])

    assert noted() == (0, 58)
    assert noted((20, 90, "["), (23, 90, "]"), drop=(21, 22, 23)) == (2, 55)
    assert noted((20, 90, "["), (20, 150, "!"), (23, 90, "]"), drop=(21, 22, 23)) == (2, 55)
    assert noted((20, 90, "!"), (23, 90, "!"), drop=(21, 22, 23)) == (2, 55)  # flutter waves alone
    assert noted((20, 90, "]"), drop=(21, 22, 23)) == (2, 55)  # begun before the annotations
    assert noted((40, 90, "[")) == (1, 40)  # never closed
    assert noted((20, 90, "~", ("sub", -1)), (23, 90, "~", ("sub", 0)), drop=(21, 22, 23)) == (2, 55)
    assert noted((20, 90, "~", ("sub", 3)), (20, 150, "~", ("sub", 0))) == (0, 58)  # noisy, but readable
    assert noted(drop=tuple(range(21, 40))) == (2, 39)  # 16 s without a beat


def test_published_columns_are_an_option_and_in_millivolts(records, tmp_path):
    description, _ = build(records, tmp_path / "d", "--features", "published")
    assert [f["name"] for f in description["features"]] == [f["name"] for f in published_features.PUBLISHED]
    X = arr.load_arrays(tmp_path / "d")["train"][0]
    np.testing.assert_array_equal(X[:, 0], X[:, 16])
    make_record(tmp_path, "r")
    millivolts = pre.read_record(str(tmp_path / "r"), "published")["X"][:, 4]
    make_record(tmp_path, "r", units=("uV", "uV"), edit=lambda x: 1000 * x)
    np.testing.assert_allclose(pre.read_record(str(tmp_path / "r"), "published")["X"][:, 4], millivolts, atol=0.01)
    assert millivolts.max() < 2


@pytest.mark.skipif(not (MITDB / "207.dat").exists(), reason="the MIT-BIH records are not here")
def test_flutter_of_record_207_is_no_rhythm():
    record = pre.read_record(str(MITDB / "207"))
    assert record["X"][:, 0].max() < 2.6  # seconds; idioventricular rhythm after 1640 s, 99 with the flutter
    assert record["X"][:, 1].max() < 2.5
    assert len(record["X"]) == 1858
    assert sum(record["dropped"].values()) == 2
    assert record["noted"]["usable beats beside a time that is no RR interval"] == 11
    assert pre.read_record(str(MITDB / "114"))["leads"] == ["MLII", "V5"]


@pytest.mark.parametrize(
    "names",
    [("MLII", "V1"), ("V5", "V2"), ("II", "aVF"), ("ECG1", "ECG2"), ("ECG", "ECG"), ("x", "V1"), ("ml ii", "v5")],
)
def test_swapping_the_two_leads_changes_nothing(tmp_path, names):
    want, _ = read(tmp_path, names=names)
    got, _ = read(tmp_path, names=names[::-1], edit=lambda signal: signal[:, ::-1])
    np.testing.assert_array_equal(got["X"], want["X"])
    assert got["leads"] == want["leads"]
    assert want["leads"] == list(names)


def test_other_leads_are_said_and_counted(records, tmp_path, capsys):
    make_record(records, "102", names=("V2", "V5"))
    description, beats = build(records, tmp_path / "d", "--per-class", "all")
    shown = capsys.readouterr()
    assert shown.err.count("record 102 has the leads V5 and V2, not MLII and V1 or V2 or V4 or V5") == 1
    assert "has the leads" not in shown.err.replace("record 102 has", "")
    assert f" {(beats['record'] == '102').sum()}" in next(x for x in shown.out.splitlines() if x.startswith("all"))
    recipe = description["recipe"]
    assert recipe["records_with_other_leads"] == ["102"]
    assert recipe["leads"] == {**{r: ["MLII", "V1"] for r in ("100", "101", "103", "106")}, "102": ["V5", "V2"]}
    assert recipe["leads_expected"]["ch0"] == ["MLII"]


def test_the_two_ecg_leads_of_more_signals_are_used(tmp_path):
    want, _ = read(tmp_path)
    more = {"names": ("V1", "ABP", "EEG C4", "MLII", "V6"), "units": ("uV", "mmHg", "mV", "mV", "V"), "leads": 5}
    got, _ = read(tmp_path, edit=lambda x: np.column_stack([x[:, 1] * 1000, x, x[:, 0], x[:, 0] / 1000]), **more)
    assert got["leads"] == ["MLII", "V1"]
    np.testing.assert_allclose(got["X"], want["X"], atol=0.02)
    for units in (("mV", "mmHg"), ("NU", "mV"), ("mV", "bpm")):
        got, _ = read(tmp_path, units=units)
        assert "has 1 ECG signals" in got["skipped"]
        assert "mmHg" in got["skipped"] or "mmHg" not in units


def test_leads_of_several_samples_a_frame_come_at_their_own_rate(tmp_path):
    """360 Hz as 4 samples in each of 90 frames a second; the other lead at 180 Hz, a pressure once a frame."""
    want, samples = read(tmp_path, symbols=["N"] * 60)
    digital = wfdb.rdrecord(str(tmp_path / "r"), physical=False).d_signal
    digital = digital[: len(digital) // 4 * 4].astype("<i2")
    for second, atol in ((4, 0.001), (2, 0.2)):  # V1 at 360 and at 180 Hz
        v1 = digital[:: 4 // second, 1].reshape(-1, second)
        frames = np.hstack([digital[:, 0].reshape(-1, 4), v1, np.zeros((len(v1), 1))]).astype("<i2")
        frames.tofile(tmp_path / "m.dat")
        lines = [f"m 3 90 {len(frames)}"]
        lines += [f"m.dat 16x{k} 9000(0)/mV 16 0 0 0 0 {name}" for k, name in ((4, "MLII"), (second, "V1"))]
        (tmp_path / "m.hea").write_text("\n".join([*lines, "m.dat 16 1/mmHg 16 0 0 0 0 ABP"]) + "\n")
        for clock in (None, 360):
            write_atr(tmp_path / "m.atr", [(round(s * (clock or 90) / 360), "N") for s in samples], clock)
            got = pre.read_record(str(tmp_path / "m"))
            moved = np.abs(got["beats"]["sample"] * 4 / second - samples[1:-1])
            assert moved.max() <= (1 if clock else 4)
            np.testing.assert_allclose(got["X"][:, 0], want["X"][:, 0], atol=0.006 if clock else 0.013)  # a sample
            if clock:
                np.testing.assert_allclose(got["X"][:, 2:16], want["X"][:, 2:16], atol=atol)


@pytest.mark.parametrize("layout", ["fixed", "variable", "others"])
def test_segments_are_one_record_or_refused(tmp_path, layout):
    want, samples = read(tmp_path)
    whole = wfdb.rdrecord(str(tmp_path / "r"))
    half = whole.sig_len // 2
    for name, part in (("r_1", slice(0, half)), ("r_2", slice(half, None))):
        names = ["V1", "MLII"] if (layout, name) == ("others", "r_2") else ["MLII", "V1"]
        gain = {"adc_gain": whole.adc_gain, "baseline": whole.baseline}
        wfdb.wrsamp(
            name, 360, ["mV", "mV"], names, whole.p_signal[part], fmt=["16"] * 2, write_dir=str(tmp_path), **gain
        )
    lines = [f"r_1 {half}", f"r_2 {whole.sig_len - half}"]
    if layout == "variable":
        lines.insert(0, "r_0 0")
        (tmp_path / "r_0.hea").write_text("r_0 2 360 0\n~ 0 200/mV 16 0 0 0 0 V1\n~ 0 200/mV 16 0 0 0 0 MLII\n")
    (tmp_path / "r.hea").write_text(f"r/{len(lines)} 2 360 {whole.sig_len}\n" + "\n".join(lines) + "\n")
    if layout == "others":
        with pytest.raises(cli.InputError, match="segments hold other"):
            pre.read_record(str(tmp_path / "r"))
        return
    got = pre.read_record(str(tmp_path / "r"))
    np.testing.assert_allclose(got["X"], want["X"], atol=1e-5)
    assert got["leads"] == ["MLII", "V1"]


def test_an_annotation_file_cut_anywhere_is_refused(tmp_path):
    make_record(tmp_path, "r")
    path = tmp_path / "r.atr"
    whole = path.read_bytes()
    assert len(records.read_annotations(str(tmp_path / "r"), 360)[0]) == 61
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises((ValueError, IndexError)):
            records.read_annotations(str(tmp_path / "r"), 360)
    with pytest.raises(cli.InputError, match=r"damaged.*get a new copy"):
        pre.read_record(str(tmp_path / "r"))


DEFINED = ["## annotation type definitions", "42 z odd beat", "## end of definitions"]


@pytest.mark.parametrize(
    "notes", [["## any"], ["## time resolution: 360"] * 2, ["## time resolution: x"], DEFINED[2:], [DEFINED[0] + "x"]]
)
def test_notes_that_wfdb_would_read_for_ever_are_refused(tmp_path, notes):
    make_record(tmp_path, "r")
    write_atr(tmp_path / "r.atr", [*((0, '"', note) for note in notes), (400, "N"), (800, "N")])
    with pytest.raises(cli.InputError, match="notes of a program"):
        pre.read_record(str(tmp_path / "r"))


def test_definitions_of_more_codes_are_read_and_a_clock_of_0_hz_is_refused(tmp_path):
    want, samples = read(tmp_path)
    notes = [(0, '"', note) for note in DEFINED]
    got, _ = read(tmp_path, clock=360, marks=lambda s, c: [*notes, *zip(s, c), (s[-1] + 5, 42)])
    np.testing.assert_array_equal(got["X"], want["X"])
    assert got["noted"]["annotations of a code that WFDB does not define"] == 1
    write_atr(tmp_path / "r.atr", [(0, '"', "## time resolution: 0"), (400, "N"), (800, "N")])
    with pytest.raises(cli.InputError, match="no clock"):
        pre.read_record(str(tmp_path / "r"))


def test_a_truncated_compressed_signal_is_one_line(records, tmp_path, capsys):
    make_record(records, "100", fmt="516")
    build(records, tmp_path / "d")
    path = records / "100.dat"
    whole = path.read_bytes()
    for length in (3, 30, 5000, len(whole) - 300):
        path.write_bytes(whole[:length])
        assert "100: cannot be read" in refusal(main, ["--records-dir", records, "--data-dir", tmp_path / "d"], capsys)


@pytest.mark.parametrize(
    "line",
    [
        "r 2 360 1000000000000",
        "r 1000000 360 100",
        "r/1000000 2 360 100",
        "r/2 2 360 100000000000\nr 50000000000\nr 50000000000",
        "r 2 360 100\nr.dat 16x1000000000 200/mV 16 0 0 0 0 MLII\nr.dat 16 200/mV 16 0 0 0 0 V1",
        "r 2 360 100\nr.dat 16:10000000000 200/mV 16 0 0 0 0 MLII\nr.dat 16 200/mV 16 0 0 0 0 V1",
    ],
)
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path, line):
    make_record(tmp_path, "r")
    lines = (tmp_path / "r.hea").read_text().splitlines()
    (tmp_path / "r.hea").write_text("\n".join([line] if "\n" in line else [line, *lines[1:]]) + "\n")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        with pytest.raises(cli.InputError, match="cannot be read"):
            pre.read_record(str(tmp_path / "r"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    (tmp_path / "r.hea").write_bytes(b"r 2 360 100\n" + b"#" * records.HEADER_BYTES)
    with pytest.raises(cli.InputError, match="longer than any"):
        pre.read_record(str(tmp_path / "r"))


def test_companion_files_are_no_records(records, tmp_path):
    for suffix in (".hea", ".dat", ".atr"):
        (records / f"._100{suffix}").write_bytes(b"\0\5\x16\7 Mac OS X")
    description, _ = build(records, tmp_path / "d")
    assert description["recipe"]["records"] == ["100", "101", "103", "106"]
    assert not description["recipe"]["records_left_out"]


@pytest.mark.parametrize("fmt", ["16", "24", "32", "80", "212", "516"])
def test_formats_line_ends_and_encodings_are_read(tmp_path, fmt):
    want, _ = read(tmp_path)
    got, _ = read(tmp_path, fmt=fmt)
    header = (tmp_path / "r.hea").read_bytes()
    (tmp_path / "r.hea").write_bytes(header.replace(b"\n", b"\r\n") + "# Müller, 心電図\r\n".encode())
    again = pre.read_record(str(tmp_path / "r"))
    np.testing.assert_array_equal(again["X"], got["X"])
    np.testing.assert_allclose(got["X"][:, 0], want["X"][:, 0], rtol=1e-6)
    if fmt != "80":  # 8 bits
        np.testing.assert_allclose(got["X"], want["X"], atol=0.1)
