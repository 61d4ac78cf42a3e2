"""preprocess_mitbih.py: records to features to a data set."""

from __future__ import annotations

import json

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


def test_features_are_32_named_and_in_the_published_order():
    names = [f["name"] for f in ecg_features.FEATURES]
    assert len(set(names)) == 32
    assert names[:7] == [
        "ch0_pre_RR",
        "ch0_post_RR",
        "ch0_P_peak",
        "ch0_T_peak",
        "ch0_R_peak",
        "ch0_S_peak",
        "ch0_Q_peak",
    ]
    assert names[16:19] == ["ch1_mean_RR", "ch1_template_corr", "ch1_P_peak"]
    assert all(f["unit"] in ("1", "s") and f["formula"] for f in ecg_features.FEATURES)


def test_every_beat_symbol_of_ec57_has_its_class():
    assert "".join(sorted(pre.CLASS_OF_SYMBOL)) == "".join(sorted("NLRejAaJSVEF/fQ"))
    assert pre.CLASS_OF_SYMBOL["e"] == "N"
    assert pre.CLASS_OF_SYMBOL["/"] == "Q"


@pytest.mark.parametrize("fs", [360.0, 250.0])
def test_features_measure_what_the_record_holds(fs):
    """A made-up ECG with known intervals and amplitudes, at two sampling frequencies."""
    times = 1.0 + 0.8 * np.arange(30)
    times[15:] -= 0.3  # beat 15 comes early
    t = np.arange(int(26 * fs)) / fs
    x = np.zeros_like(t)
    for beat in times:
        for height, centre, width in (
            (0.2, -0.18, 0.02),
            (-0.15, -0.04, 0.012),
            (1, 0, 0.012),
            (-0.3, 0.04, 0.012),
            (0.4, 0.3, 0.04),
        ):
            x += height * np.exp(-0.5 * ((t - beat - centre) / width) ** 2)
    samples = np.rint(times * fs).astype(int)
    X, index, dropped = ecg_features.beat_features(np.column_stack([x, 2 * x]), fs, samples)
    table = pd.DataFrame(X, columns=[f["name"] for f in ecg_features.FEATURES], index=index)
    assert dropped["first or last beat"] == 2
    assert list(index) == list(range(1, 29))
    assert table.loc[5, "ch0_pre_RR"] == pytest.approx(1, abs=0.01)
    assert table.loc[15, "ch0_pre_RR"] == pytest.approx(0.5 / 0.77, abs=0.01)  # ten intervals, one of them short
    assert table.loc[14, "ch0_post_RR"] == pytest.approx(0.5 / 0.8, abs=0.01)
    assert table.loc[5, "ch1_mean_RR"] == pytest.approx(0.8, abs=0.01)
    assert table.loc[5, "ch0_PQ_interval"] == pytest.approx(0.14, abs=0.012)
    assert table.loc[5, "ch0_QRS_interval"] == pytest.approx(0.08, abs=0.012)
    assert table.loc[5, "ch0_ST_interval"] == pytest.approx(0.26, abs=0.015)
    assert table.loc[5, "ch0_QT_interval"] == pytest.approx(0.34, abs=0.015)
    assert table.loc[5, "ch0_R_peak"] > table.loc[5, "ch0_T_peak"] > table.loc[5, "ch0_P_peak"] > 0
    assert table.loc[5, "ch0_S_peak"] < table.loc[5, "ch0_Q_peak"] < 0
    assert table.loc[5, "ch1_template_corr"] == pytest.approx(1, abs=0.01)
    first, second = table.filter(regex="ch0_.*(peak|interval|morph)"), table.filter(regex="ch1_.*(peak|interval|morph)")
    np.testing.assert_allclose(first, second, atol=1e-4)  # relative to the patient: twice the signal, same features


def test_beats_outside_or_in_missing_or_flat_signal_are_dropped_and_counted():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(10_000, 2))
    beats = np.arange(50, 9950, 300)
    signal[beats[5] + 10, 0] = np.nan
    signal[beats[9] - 150 : beats[9] + 200, 1] = 0.5
    _, index, dropped = ecg_features.beat_features(signal, 360, beats)
    assert 5 not in index
    assert 9 not in index
    assert dropped["signal missing or flat"] == 2
    early = np.concatenate([[10, 40], beats[1:]])
    _, index, dropped = ecg_features.beat_features(signal, 360, early)
    assert dropped["window leaves the record"] == 1
    assert 1 not in index


def test_a_beat_that_is_annotated_twice_is_dropped_under_its_own_name():
    signal = np.random.default_rng(0).normal(size=(10_000, 2))
    beats = np.insert(np.arange(350, 9950, 300), 4, 350 + 4 * 300)
    _, index, dropped = ecg_features.beat_features(signal, 360, beats)
    assert dropped["annotated twice or out of order"] == 2
    assert not {4, 5} & set(index)


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
        ("one", "1 signals"),
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
