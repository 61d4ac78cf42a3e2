"""preprocess_mitbih.py: records to features to a data set."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import BEAT_COUNT, make_record, refusal

import preprocess_mitbih as pre
from fhe_mlp import arrays as arr
from fhe_mlp import cli, ecg_features
from preprocess_mitbih import main


def build(records, folder, *options):
    main(["--records-dir", str(records), "--data-dir", str(folder), *map(str, options)])
    return json.loads((folder / "dataset.json").read_text()), pd.read_csv(folder / "beats.csv", dtype=str)


def test_every_beat_symbol_of_ec57_has_its_class():
    assert "".join(sorted(pre.CLASS_OF_SYMBOL)) == "".join(sorted("NLRBAaJSVrFejnE/fQ?"))
    assert [pre.CLASS_OF_SYMBOL[symbol] for symbol in "eBn/?rS"] == ["N", "N", "N", "Q", "Q", "V", "S"]


def test_draw_keeps_rare_classes_and_fills_with_q():
    aami = np.array(["N"] * 100 + ["S"] * 5 + ["V"] * 10 + ["F"] * 2 + ["Q"] * 50)
    drawn = aami[pre.draw_balanced(aami, "SVFQ", 40, np.random.default_rng(1))]
    assert {c: int((drawn == c).sum()) for c in "NSVFQ"} == {"N": 40, "S": 5, "V": 10, "F": 2, "Q": 23}
    drawn = aami[pre.draw_balanced(aami, "SVF", None, np.random.default_rng(1))]
    assert {c: int((drawn == c).sum()) for c in "NSVFQ"} == {"N": 17, "S": 5, "V": 10, "F": 2, "Q": 0}
    drawn = aami[pre.draw_balanced(aami, "SVFQ", 6, np.random.default_rng(1))]
    assert (drawn == "N").sum() == 6
    assert (drawn == "Q").sum() == 0


def test_scaler_uses_the_training_part_and_clips():
    X = np.array([[0.0, 5], [2, 5], [4, 5]], np.float32)
    scaler = arr.fit_scaler(X)
    scaled = arr.apply_scaler(X, scaler)
    np.testing.assert_allclose(scaled[:, 0], [-1.2247449, 0, 1.2247449], rtol=1e-6)
    assert (scaled[:, 1] == 0).all()
    assert arr.apply_scaler(np.array([100.0, 5]), scaler)[0] == arr.CLIP_SD
    assert scaled.dtype == np.float32


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
        by_record = description["counts_by_record"][split]
        assert sum(by_record.values()) == len(part)
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
    train, val = (beats[beats["split"] == s] for s in ("train", "val"))
    assert (train["aami"] == "N").mean() == 0.5
    assert len(val) == (BEAT_COUNT - 2) * len(by_split["val"])  # every beat of the record that is held out
    assert (beats["split"] == "test").sum() == 2 * (BEAT_COUNT - 2)


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
        ("one", "1 ECG signals"),
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


def rewrite(folder, name, **header):
    """Change the header of a record: fs and, by lead, name and unit."""
    path = folder / f"{name}.hea"
    first, *leads = path.read_text().splitlines()
    for k, lead in enumerate(header.get("names", [])):
        leads[k] = " ".join([*leads[k].split()[:8], lead])
    for k, unit in enumerate(header.get("units", [])):
        leads[k] = leads[k].replace("/mV", f"/{unit}")
    path.write_text("\n".join([first, *leads]) + "\n")


def test_swapping_the_leads_of_a_record_changes_nothing(tmp_path):
    make_record(tmp_path / "a", "r")
    make_record(tmp_path / "b", "r", edit=lambda x: x[:, ::-1])
    rewrite(tmp_path / "b", "r", names=["V1", "MLII"])
    one, other = (pre.read_record(str(tmp_path / folder / "r")) for folder in "ab")
    np.testing.assert_array_equal(one["X"], other["X"])
    assert one["leads"] == other["leads"] == ["MLII", "V1"]


def test_other_leads_than_expected_are_a_warning_that_names_both_and_are_counted(records, tmp_path, capsys):
    rewrite(records, "100", names=["V5", "V2"])
    description, beats = build(records, tmp_path / "d")
    captured = capsys.readouterr()
    assert captured.err.count("record 100 has the leads V5 and V2, not MLII and V1 or V2") == 1
    assert "of other leads" in captured.out
    assert description["recipe"]["records_with_other_leads"] == ["100"]
    assert description["recipe"]["leads"]["101"] == ["MLII", "V1"]


def test_a_signal_that_is_no_ecg_is_not_taken_for_a_lead(records, tmp_path, capsys):
    rewrite(records, "100", units=["mV", "mmHg"], names=["MLII", "BP"])
    rewrite(records, "101", names=["MLII", "Resp"])
    description, _ = build(records, tmp_path / "d")
    for name in ("100", "101"):
        assert "has 1 ECG signals" in description["recipe"]["records_left_out"][name]


def test_units_of_voltage_do_not_matter(tmp_path):
    make_record(tmp_path, "r")
    one = pre.read_record(str(tmp_path / "r"))
    rewrite(tmp_path, "r", units=["uV", "uV"])  # the same numbers, a thousandth of the voltage
    np.testing.assert_allclose(one["X"], pre.read_record(str(tmp_path / "r"))["X"], atol=1e-4)
    published = pre.read_record(str(tmp_path / "r"), "published")
    assert np.abs(published["X"][:, 4]).max() < 0.01  # R peaks, in mV


@pytest.mark.parametrize(("fs", "clock"), [(500, 250), (250, 1000), (360, 360)])
def test_annotations_may_have_a_clock_of_their_own(tmp_path, fs, clock):
    import wfdb

    samples = make_record(tmp_path, "r", fs=fs, symbols=["N"] * 30)
    expected = pre.read_record(str(tmp_path / "r"))
    ticks = np.rint(samples * clock / fs).astype(int)
    notes = [f"## time resolution: {clock}", *[""] * 30]  # as WFDB's annot(5) has it
    ticks, symbols = [0, *ticks], ['"', *["N"] * 30]
    wfdb.wrann("r", "atr", np.array(ticks), symbols, aux_note=notes, write_dir=str(tmp_path))
    record = pre.read_record(str(tmp_path / "r"))
    assert np.abs(record["beats"]["sample"] - expected["beats"]["sample"]).max() <= fs / clock
    np.testing.assert_allclose(record["X"][:, 0], expected["X"][:, 0], atol=3 / clock)


def test_every_beat_code_of_wfdb_is_a_beat_and_unknown_codes_are_counted(tmp_path):
    symbols = ["N", "r", "B", "n", "N", "?"] * 10
    make_record(tmp_path, "r", symbols=symbols)
    record = pre.read_record(str(tmp_path / "r"))
    assert len(record["beats"]) == len(symbols) - 2
    classes = record["beats"].groupby("symbol")["aami"].first().to_dict()
    assert classes == {"N": "N", "r": "V", "B": "N", "n": "N", "?": "Q"}


def test_beats_beyond_the_end_are_dropped_and_counted_but_many_are_damage(tmp_path):
    import wfdb

    samples = make_record(tmp_path, "r")
    length = wfdb.rdheader(str(tmp_path / "r")).sig_len
    for beyond, used in ((2, True), (8, False)):
        late = np.concatenate([samples, length + 100 * np.arange(beyond)])
        wfdb.wrann("r", "atr", late, ["N"] * len(late), write_dir=str(tmp_path))
        record = pre.read_record(str(tmp_path / "r"))
        if used:
            assert record["dropped"]["outside the signal"] == beyond
        else:
            assert "8 of 68 beats outside its signal" in record["skipped"]


def test_a_cut_annotation_file_is_refused(records, tmp_path, capsys):
    path = records / "100.atr"
    path.write_bytes(path.read_bytes()[:60])
    line = refusal(main, ["--records-dir", records, "--data-dir", tmp_path / "d"], capsys)
    assert "100: cannot be read" in line
    assert ".atr" in line


def test_flutter_ends_the_rhythm(tmp_path):
    import wfdb

    samples = make_record(tmp_path, "r", symbols=["N"] * 40)
    record = pre.read_record(str(tmp_path / "r"))
    keep = np.r_[:15, 25:40]  # ten beats are not seen in the flutter
    marks = np.insert(samples[keep], 15, [samples[15], samples[24]])
    symbols = np.insert(np.array(["N"] * 30), 15, ["[", "]"])
    wfdb.wrann("r", "atr", marks, list(symbols), write_dir=str(tmp_path))
    with_flutter = pre.read_record(str(tmp_path / "r"))
    assert len(with_flutter["beats"]) == 28  # those beside it are kept
    assert with_flutter["noted"]["usable beats beside a time that is no RR interval"] == 2
    assert with_flutter["X"][:, 0].max() <= record["X"][:, 0].max() + 1e-6
    assert pre.find_breaks(pd.DataFrame({"time": [5.0], "symbol": ["["], "subtype": [0]})) == [(5.0, np.inf)]


def test_macos_companions_are_no_records(records, tmp_path):
    for name in ("._100.hea", "._100.dat"):
        (records / name).write_bytes(b"\x00\x05\x16\x07")
    _, beats = build(records, tmp_path / "d")
    assert set(beats["record"]) == {"100", "101", "103", "106"}


def test_lists_of_checksums_of_other_databases_and_of_other_styles_are_read(records, tmp_path, capsys):
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in records.iterdir()}
    make_record(records, "300", seed=5)
    lines = [f"{digest} *{name}\r" for name, digest in sums.items()]
    (records / "SHA256SUMS.txt").write_text("\n".join([*lines, f"{'0' * 64} *301.dat\r"]) + "\n")
    _, beats = build(records, tmp_path / "d")  # another database: what is missing is reported, nothing is fetched
    assert "1 listed files are missing, 301.dat first" in capsys.readouterr().err
    assert "300" in set(beats["record"])
    (records / "SHA256SUMS.txt").write_text("\n".join(lines) + "\n")
    (records / "100.dat").write_bytes((records / "100.dat").read_bytes()[:-2])
    assert "100.dat: SHA-256" in refusal(main, ["--records-dir", records, "--data-dir", tmp_path / "e"], capsys)


@pytest.mark.parametrize("damage", ["cut .dat", "huge .hea", "many signals"])
def test_damaged_records_are_one_line_and_take_no_memory(records, tmp_path, capsys, damage):
    path = records / "100.hea"
    if damage == "cut .dat":
        (records / "100.dat").write_bytes((records / "100.dat").read_bytes()[:1000])
    elif damage == "huge .hea":
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([" ".join([*first.split()[:3], "1000000000000"]), *rest]))
    else:
        path.write_text(path.read_text().replace("100 2", "100 1000000", 1))
    assert "100: cannot be read" in refusal(main, ["--records-dir", records, "--data-dir", tmp_path / "d"], capsys)


def test_a_constant_column_counts_as_constant_whatever_rounding_makes_of_it(tmp_path):
    scaler = arr.fit_scaler(np.column_stack([np.full(1000, 14.62), np.arange(1000)]))
    assert scaler["sd"][0] == 1
    assert abs(arr.apply_scaler(np.array([[14.62, 0]]), scaler)[0, 0]) < 1e-6


def test_published_columns_are_an_option(records, tmp_path):
    description, _ = build(records, tmp_path / "d", "--features", "published")
    assert [f["name"] for f in description["features"]] == [f["name"] for f in ecg_features.PUBLISHED]
    X = arr.load_arrays(tmp_path / "d")["train"][0]
    np.testing.assert_array_equal(X[:, 0], X[:, 16])


MITDB = Path(os.environ.get("MITDB_DIR", "data/mitdb"))


@pytest.mark.skipif(not (MITDB / "207.dat").exists(), reason="the MIT-BIH records are not here")
def test_flutter_of_record_207_is_no_rr_interval():
    record = pre.read_record(str(MITDB / "207"))
    assert record["X"][:, 0].max() < 3
    assert record["noted"]["usable beats beside a time that is no RR interval"] > 0
    assert sum(record["dropped"].values()) <= 4


def test_loading_refuses_bad_arrays(arrays, tmp_path):
    def broken(name, content):
        for path in arrays.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        path = tmp_path / f"Arryth_MITBIH_{name}.npy"
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content, allow_pickle=True)
        with pytest.raises(cli.InputError) as error:
            arr.load_arrays(tmp_path)
        assert "preprocess_mitbih.py" in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    whole = (arrays / "Arryth_MITBIH_val_X.npy").read_bytes()
    X = np.load(arrays / "Arryth_MITBIH_val_X.npy")
    assert "not found" in broken("val_X", None)
    assert "truncated" in broken("val_X", whole[:1000])
    assert "truncated" in broken("val_X", b"")
    assert "truncated" in broken("val_X", b"PK\x03\x04 something else")
    huge = whole.replace(b"(600, 32), ", b"(10**14, 32), ".replace(b"10**14", b"9" * 14))
    huge = huge[:8] + (int.from_bytes(huge[8:10], "little") + len(huge) - len(whole)).to_bytes(2, "little") + huge[10:]
    assert "truncated" in broken("val_X", huge)
    assert "truncated" in broken("val_y", np.array([{"pickled": 1}], dtype=object))
    assert "shape" in broken("val_X", X[:, :31])
    assert "numbers" in broken("val_X", X.astype(str))
    assert "NaN" in broken("val_X", np.where(X[3, 3] == X, np.nan, X))
    assert "3e38" in broken("val_X", np.where(X[3, 3] == X, 1e300, X.astype(float)))
    assert "labels" in broken("val_y", np.full(len(X), 2.0))
    assert "labels" in broken("val_y", np.zeros(len(X)))
    assert "length" in broken("val_y", np.resize([0.0, 1.0], len(X) - 1))


def test_loading_notices_arrays_that_dataset_json_does_not_describe(records, tmp_path):
    folder = tmp_path / "d"
    build(records, folder)
    X = np.load(folder / "Arryth_MITBIH_test_X.npy")
    np.save(folder / "Arryth_MITBIH_test_X.npy", X[:, ::-1])
    with pytest.raises(cli.InputError, match=r"dataset\.json"):
        arr.load_arrays(folder)
    whole = json.loads((folder / "dataset.json").read_text())
    for damaged in (
        "{",
        json.dumps({"sha256": {}}),
        json.dumps({**whole, "sha256": list(whole["sha256"])}),
        json.dumps({name: value for name, value in whole.items() if name != "scaler"}),
        json.dumps({**whole, "scaler": {**whole["scaler"], "sd": "x"}}),
        json.dumps({**whole, "scaler": {**whole["scaler"], "mean": [0.0]}}),
    ):
        (folder / "dataset.json").write_text(damaged)
        with pytest.raises(cli.InputError, match="damaged"):
            arr.load_arrays(folder)


@pytest.mark.parametrize(
    "header", ["(" * 150, "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 32)}", "{[1]: 3}"]
)
def test_a_damaged_header_of_an_array_is_one_line(arrays, tmp_path, header):
    for path in arrays.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    header = header.ljust(245) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(4096)
    (tmp_path / "Arryth_MITBIH_train_X.npy").write_bytes(content)
    with pytest.raises(cli.InputError, match=r"is truncated or not a valid \.npy array"):
        arr.load_arrays(tmp_path)


def test_arrays_made_elsewhere_are_standardised_with_their_training_part(arrays, tmp_path):
    for path in arrays.iterdir():
        array = np.load(path)
        np.save(tmp_path / path.name, 7 + 3 * array if array.ndim == 2 else array.astype(bool))
    ours, theirs = arr.load_arrays(arrays), arr.load_arrays(tmp_path)
    for split in arr.SPLITS:
        np.testing.assert_allclose(ours[split][0], theirs[split][0], atol=1e-4)
        np.testing.assert_array_equal(ours[split][1], theirs[split][1])


def test_whole_file_leaves_the_old_one_when_writing_fails(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), cli.whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
