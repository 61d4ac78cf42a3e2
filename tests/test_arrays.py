"""fhe_mlp/arrays.py: loading arrays that others made, scaling, dataset.json."""

from __future__ import annotations

import json
import resource
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from fhe_mlp import arrays as arr
from fhe_mlp import cli
from preprocess_mitbih import main


def test_scaler_uses_the_training_part_and_clips():
    X = np.array([[0.0, 5], [2, 5], [4, 5]], np.float32)
    scaler = arr.fit_scaler(X)
    scaled = arr.apply_scaler(X, scaler)
    np.testing.assert_allclose(scaled[:, 0], [-1.2247449, 0, 1.2247449], rtol=1e-6)
    assert (scaled[:, 1] == 0).all()
    assert arr.apply_scaler(np.array([100.0, 5]), scaler)[0] == arr.CLIP_SD
    assert scaled.dtype == np.float32


def test_a_draw_has_its_shares_by_class_and_by_the_root_of_a_records_beats():
    cells = {("a", "N"): 100, ("b", "N"): 4, ("a", "S"): 9, ("b", "S"): 1, ("b", "F"): 2}
    beats = pd.DataFrame([cell for cell, n in cells.items() for _ in range(n)], columns=["record", "aami"])
    beats["p"] = arr.draw_probability(beats)
    shares = {("a", "N"): 0.5 * 10 / 12, ("b", "N"): 0.5 * 2 / 12, ("a", "S"): 0.25, ("b", "S"): 0.25 / 3}
    got = beats.groupby(["record", "aami"])["p"].agg(["sum", "nunique"])
    assert got["sum"].to_dict() == pytest.approx({**shares, ("b", "F"): 0.5 / 3})
    assert (got["nunique"] == 1).all()
    patients = {"train": beats, "val": beats.assign(record="c")}
    np.testing.assert_array_equal(arr.training_probability(patients), beats["p"])  # unseen patients
    np.testing.assert_array_equal(arr.training_probability(patients | {"val": beats}), np.full(116, 1 / 116))


def test_a_weighted_scaler_is_that_of_a_sample_with_repetitions():
    times = np.array([1, 5, 2, 0, 4])
    X = np.random.default_rng(0).normal(3, 2, (5, 3)).astype(np.float32)
    weighted, repeated = arr.fit_scaler(X, times / times.sum()), arr.fit_scaler(np.repeat(X, times, axis=0))
    for part in ("mean", "sd"):
        np.testing.assert_allclose(weighted[part], repeated[part], rtol=1e-12)


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
    main(["--records-dir", str(records), "--data-dir", str(folder)])
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
    "header",
    [
        "(" * 150,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 32)}",
        "{[1]: 3}",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (-1,)}",  # on which NumPy 1.26 ends the process
        "{'descr': '|b1', 'fortran_order': False, 'shape': (0, 4611686018427387904)}",
    ],
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


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_column_of_rounding_error_counts_as_constant(dtype):
    X = np.random.default_rng(0).normal(size=(1000, 3))
    X[:, 1] = 14.62
    X[:, 2] = 14.62 + 1e-14 * X[:, 0]
    scaler = arr.fit_scaler(X.astype(dtype))
    assert scaler["sd"][1:] == [1.0, 1.0]
    assert np.abs(arr.apply_scaler(X.astype(dtype), scaler)[:, 1:]).max() < 1e-5
    assert scaler["sd"][0] == pytest.approx(1, abs=0.1)


def copied(arrays, tmp_path):
    for path in arrays.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_test_rows_that_are_training_rows_are_counted(arrays, tmp_path, capsys):
    folder = copied(arrays, tmp_path)
    arr.load_arrays(folder)
    assert capsys.readouterr().err == ""
    train, test = (np.load(folder / arr.array_name(split, "X")) for split in ("train", "test"))
    test[:7] = train[100:107]
    np.save(folder / arr.array_name("test", "X"), test)
    arr.load_arrays(folder)
    assert "7 of 600 test rows are training rows too" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [np.float16, ">f8", "F"])
def test_other_precisions_byte_orders_and_layouts_load(arrays, tmp_path, kind):
    want = arr.load_arrays(arrays)
    for path in arrays.iterdir():
        array = np.load(path)
        np.save(tmp_path / path.name, np.asfortranarray(array) if kind == "F" else array.astype(kind))
    got = arr.load_arrays(tmp_path)
    for split in arr.SPLITS:
        np.testing.assert_allclose(got[split][0], want[split][0], atol=0.01 if kind is np.float16 else 1e-6)
        np.testing.assert_array_equal(got[split][1], want[split][1])


def test_infinite_half_precision_and_empty_arrays_are_refused(arrays, tmp_path):
    folder = copied(arrays, tmp_path)
    X = np.load(folder / arr.array_name("train", "X")).astype(np.float16)
    with np.errstate(over="ignore"):
        X[0, 0] = np.float16(1e6)
    for bad, why in ((X, "infinity"), (X[:0], "shape|truncated")):
        np.save(folder / arr.array_name("train", "X"), bad)
        with pytest.raises(cli.InputError, match=why):
            arr.load_arrays(folder)


def test_a_header_that_claims_a_terabyte_allocates_nothing(arrays, tmp_path):
    folder = copied(arrays, tmp_path)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 32), }"
    header = header.ljust(117) + b"\n"
    (folder / arr.array_name("val", "X")).write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4096)
    )
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, limits[1]))
    try:
        with pytest.raises(cli.InputError, match="truncated"):
            arr.load_arrays(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("version", [b"\1\xff", b"\2\0", b"\3\0"])
def test_a_header_that_claims_gigabytes_for_itself_takes_no_memory(arrays, tmp_path, version):
    folder = copied(arrays, tmp_path)
    (folder / arr.array_name("train", "X")).write_bytes(b"\x93NUMPY" + version + b"\xff\xff\xff\x7f{" + bytes(100))
    tracemalloc.start()
    try:
        with pytest.raises(cli.InputError, match="truncated"):
            arr.load_arrays(folder)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_versions_2_and_3_of_npy_load(arrays, tmp_path):
    folder, want = copied(arrays, tmp_path), arr.load_arrays(arrays)
    for split, version in (("train", (2, 0)), ("test", (3, 0))):
        with (folder / arr.array_name(split, "X")).open("wb") as file:
            np.lib.format.write_array(file, np.load(arrays / arr.array_name(split, "X")), version)
    np.testing.assert_array_equal(arr.load_arrays(folder)["test"][0], want["test"][0])


def test_a_description_that_means_something_else_is_refused(records, tmp_path):
    folder = tmp_path / "d"
    main(["--records-dir", str(records), "--data-dir", str(folder)])
    whole = json.loads((folder / "dataset.json").read_text())
    features, scaler = whole["features"], whole["scaler"]
    for part in (
        {"features": features[1:]},
        {"features": [features[1], *features[1:]]},
        {"features": [{**features[0], "name": 7}, *features[1:]]},
        {"features": [{"name": "x"}, *features[1:]]},
        {"scaler": {**scaler, "sd": [0.0, *scaler["sd"][1:]]}},
        {"scaler": {**scaler, "mean": ["1.0", *scaler["mean"][1:]]}},
        {"scaler": {**scaler, "mean": [10**400, *scaler["mean"][1:]]}},
        {"scaler": {**scaler, "clip_sd": -3}},
        {"sha256": {**whole["sha256"], "../../dev/zero": "0" * 64}},
        {"sha256": {**whole["sha256"], "..": "0" * 64}},
        {"sha256": list(whole["sha256"].items())},
        {"features": [{**features[0], "unit": "\ud800"}, *features[1:]]},
        {"recipe": ["leads_expected"]},
        {"recipe": {"leads_expected": ""}},
        {"recipe": {"leads_expected": {"ch0": "MLII"}}},
    ):
        (folder / "dataset.json").write_text(json.dumps({**whole, **part}))
        with pytest.raises(cli.InputError, match="damaged"):
            arr.load_arrays(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda beats: b"",
        lambda beats: b"\xff\xfe\0",
        lambda beats: beats + b"a,b,c,d,e,f,g\n",
        lambda beats: beats.replace(b"aami", b"class"),
        lambda beats: beats.rpartition(b"test")[0],
        lambda beats: beats.replace(b"test", b"val"),
    ],
)
def test_a_list_of_other_beats_is_refused(records, tmp_path, edit):
    folder = tmp_path / "d"
    main(["--records-dir", str(records), "--data-dir", str(folder)])
    path = folder / "beats.csv"
    assert set(arr.beats_of(folder)["split"]) == set(arr.SPLITS)
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(cli.InputError, match="is not the list of the arrays' beats"):
        arr.beats_of(folder)
