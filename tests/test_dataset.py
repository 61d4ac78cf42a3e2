"""fhe_mlp/dataset.py: loading arrays that this pipeline or others made, and how their rows are drawn."""

from __future__ import annotations

import json
import resource
import shutil

import numpy as np
import pandas as pd
import pytest

from fhe_mlp.cli import InputError, sha256
from fhe_mlp.dataset import SPLITS, Dataset, Part, array_name, draw_probability, load_dataset, stratified_order
from fhe_mlp.scaling import GRID, map_features, prepare
from preprocess_mitbih import main


@pytest.fixture
def folder(arrays, tmp_path):
    """A copy of the arrays that others made, to spoil."""
    return shutil.copytree(arrays, tmp_path / "arrays")


def refused(folder, remedy="mend or complete your arrays, or name other ones with --data-dir"):
    """The one line with which the arrays in a folder are refused; it names no command that would replace them."""
    with pytest.raises(InputError) as error:
        load_dataset(folder)
    assert str(error.value).endswith(remedy)
    assert "\n" not in str(error.value)
    return str(error.value)


def part(cells, **columns):
    """A part of so many rows of each (record, class)."""
    rows = [cell for cell, count in cells.items() for _ in range(count)]
    beats = pd.DataFrame(rows, columns=["record", "aami"])
    beats = beats.assign(patient=beats["record"]).assign(**columns)
    y = (beats["aami"] != "N").to_numpy().astype(np.int64)
    return Part(np.arange(len(y), dtype=np.float32)[:, None], y, beats, True)


def dataset(train, val):
    return Dataset(train, val, val, {}, [], None, "none")


def test_a_draw_has_its_shares_by_class_and_by_the_root_of_a_records_beats():
    train = part({("a", "N"): 100, ("b", "N"): 4, ("a", "S"): 9, ("b", "S"): 1, ("b", "F"): 2})
    probability = draw_probability(train.beats)
    shares = {("a", "N"): 0.5 * 10 / 12, ("b", "N"): 0.5 * 2 / 12, ("a", "S"): 0.25, ("b", "S"): 0.25 / 3}
    got = train.beats.assign(p=probability).groupby(["record", "aami"])["p"].agg(["sum", "nunique"])
    assert got["sum"].to_dict() == pytest.approx({**shares, ("b", "F"): 0.5 / 3})
    assert (got["nunique"] == 1).all()
    unseen = dataset(train, part({("c", "N"): 2}))
    familiar = dataset(train, part({("c", "N"): 2}, patient="a"))  # two records of one person
    np.testing.assert_array_equal(unseen.draw, probability)
    np.testing.assert_array_equal(familiar.draw, np.full(116, 1 / 116))
    assert (unseen.patients, familiar.patients) == ("unseen patients", "known patients")
    assert not familiar.val.copied.any()


def test_the_rows_of_ranking_are_validation_rows_and_of_unseen_patients_training_rows_that_are_no_copies():
    train = part({("a", "N"): 3, ("a-S0.3", "S"): 2, ("b", "V"): 2}, patient=list("aaaaabb"))
    val = part({("c", "N"): 1, ("c", "S"): 1})
    ranking = dataset(train, val).ranking
    assert ranking.X[:, 0].tolist() == [0, 1, 2, 5, 6, 0, 1]
    assert ranking.beats["record"].tolist() == list("aaabbcc")
    assert ranking.y.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert dataset(train, part({("b", "N"): 1})).ranking.X.tolist() == [[0]]


def test_every_stretch_of_the_stratified_order_has_each_class_in_its_share():
    beats = part({("a", "N"): 900, ("b", "N"): 100, ("a", "S"): 40, ("b", "V"): 40, ("b", "F"): 20}).beats
    order = stratified_order(beats, 0)
    assert sorted(order) == list(range(len(beats)))
    for rows in (order[:20], order[20:40]):
        assert beats["aami"].iloc[rows].value_counts().to_dict() == {"N": 10, "S": 4, "V": 4, "F": 2}
    normal = beats.iloc[order[:80]].query("aami == 'N'")["record"].value_counts()
    assert normal["a"] == pytest.approx(3 * normal["b"], abs=3)  # the roots of 900 and 100
    assert list(order) == list(stratified_order(beats, 0)) != list(stratified_order(beats, 1))


def third(value):
    """Edit of an array whose third column becomes `value`."""
    return lambda array: np.where(np.arange(32) == 3, value, array)


@pytest.mark.parametrize(
    ("name", "why", "edit"),
    [
        ("val_X", "truncated", lambda content: content[:1000]),
        ("val_X", "truncated", lambda content: b"PK\x03\x04 something else"),
        ("val_X", "truncated", lambda content: content.replace(b"(600, 32), }       ", b"(60000000000, 32), }")),
        ("val_X", "truncated", lambda content: b"\x93NUMPY\2\0\xff\xff\xff\x7f{" + content[10:]),
        ("val_X", "truncated", lambda content: content.replace(b"{'descr'", b"{[1]: 3}")),
        ("val_y", "truncated", lambda array: np.array([{"pickled": 1}], dtype=object)),
        ("val_X", "shape", lambda array: array[:, :31]),
        ("test_X", "shape", lambda array: array[0]),
        ("train_X", "shape", lambda array: array[:0]),
        ("val_X", "numbers", lambda array: array.astype(str)),
        ("val_X", "NaN", third(np.nan)),
        ("train_X", "infinity", third(np.float16(np.inf))),
        ("val_X", "3e38", third(1e300)),
        ("val_y", "labels", lambda array: np.full(len(array), 2.0)),
        ("val_y", "labels", lambda array: np.zeros(len(array))),
        ("val_y", "length", lambda array: np.resize([0.0, 1.0], len(array) - 1)),
    ],
)
def test_bad_arrays_are_refused_in_one_line_before_memory_is_taken(folder, name, why, edit):
    path = folder / f"Arryth_MITBIH_{name}.npy"
    if "content" in edit.__code__.co_varnames:
        path.write_bytes(edit(path.read_bytes()))
    else:
        np.save(path, edit(np.load(path)), allow_pickle=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, limits[1]))
    try:
        assert why in refused(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    path.unlink()
    assert "not found" in refused(folder)


def test_arrays_made_elsewhere_are_standardised_with_their_training_part(arrays, folder, capsys):
    for path in folder.iterdir():
        array = np.load(path)
        np.save(path, 7 + 3 * array if array.ndim == 2 else array.astype(bool))
    ours, theirs = load_dataset(arrays), load_dataset(folder)
    shown = capsys.readouterr()
    assert "standardised with its training part" in shown.out
    assert shown.err == ""
    for name in SPLITS:
        np.testing.assert_allclose(ours.parts[name].X, theirs.parts[name].X, atol=1e-4)
        np.testing.assert_array_equal(ours.parts[name].y, theirs.parts[name].y)
    raw = np.load(folder / array_name("test", "X"))
    np.testing.assert_array_equal(prepare(raw, theirs.scaler, "none"), theirs.test.X)
    assert (theirs.patients, theirs.train.named, theirs.leads) == ("unknown patients", False, None)
    assert theirs.features[3]["name"] == "feature_3"
    assert "found" not in theirs.test.figures(theirs.test.y)
    assert set(theirs.val.beats["aami"][theirs.val.y == 1]) == {"Q"}
    raw[:7] = np.load(folder / array_name("train", "X"))[100:107]
    np.save(folder / array_name("test", "X"), raw)
    load_dataset(folder)
    assert "7 of 600 test rows are training rows too" in capsys.readouterr().err


def test_a_rare_label_of_others_arrays_is_half_of_every_draw_and_named(folder, capsys):
    for split, rows, rare in (("train", 3000, 30), ("val", 600, 6), ("test", 600, 60)):
        np.save(folder / array_name(split, "y"), (np.arange(rows) < rare).astype(np.int8))
    data = load_dataset(folder)
    assert data.draw[data.train.y == 1].sum() == pytest.approx(0.5)
    assert len(set(data.draw[data.train.y == 1])) == len(set(data.draw[data.train.y == 0])) == 1
    assert [int(line.split(" only ")[1].split()[0]) for line in capsys.readouterr().err.splitlines()] == [30, 6]


def test_a_public_map_takes_the_features_place(arrays):
    plain, mapped = load_dataset(arrays), load_dataset(arrays, "fourier:40")
    assert mapped.map == "fourier:40"
    np.testing.assert_allclose(mapped.test.X, map_features(plain.test.X, "fourier:40"), atol=2 * GRID)
    assert len(mapped.features) == 32
    assert mapped.sha256 != plain.sha256 == load_dataset(arrays).sha256


@pytest.mark.parametrize("kind", [np.float16, ">f8", "F", (2, 0), (3, 0)])
def test_other_precisions_byte_orders_layouts_and_versions_load(arrays, folder, kind):
    for path in folder.iterdir():
        array = np.load(path)
        if isinstance(kind, tuple):
            with path.open("wb") as file:
                np.lib.format.write_array(file, array, kind)
        else:
            np.save(path, np.asfortranarray(array) if kind == "F" else array.astype(kind))
    expected, got = load_dataset(arrays), load_dataset(folder)
    for name in SPLITS:
        tolerance = 0.01 if kind is np.float16 else 1e-6
        np.testing.assert_allclose(got.parts[name].X, expected.parts[name].X, atol=tolerance)
        np.testing.assert_array_equal(got.parts[name].y, expected.parts[name].y)


def test_a_described_data_set_knows_its_beats_and_leads_and_refuses_files_of_others(records, tmp_path):
    folder = tmp_path / "d"
    main(["--records-dir", str(records), "--data-dir", str(folder), "--split", "inter-patient"])
    data = load_dataset(folder)
    assert (data.patients, data.train.named, data.leads["ch0"]) == ("unseen patients", True, ["MLII"])
    assert [len(data.features), len(data.scaler["mean"])] == [32, 32]
    assert data.test.figures(data.test.y)["found"] == {"S": 1, "V": 1, "F": 1}
    assert data.val.beats.columns.tolist() == ["record", "patient", "aami"]
    for name, why, edit in (
        (array_name("test", "X"), "is not the file that", lambda content: content[:-4] + b"\0\0\0\0"),
        ("beats.csv", "is not the file that", lambda content: content.replace(b"aami", b"class")),
        ("dataset.json", "damaged", lambda content: content[:-10]),
        ("dataset.json", "damaged", lambda content: content.replace(b"scaler", b"scale")),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(edit(whole))
        anew = f"make it with: python preprocess_mitbih.py --data-dir {folder}"
        assert why in (refused(folder, anew) if edit(b"scaler") == b"scale" else refused(folder))
        (folder / name).write_bytes(whole)
    path, about = folder / "beats.csv", json.loads((folder / "dataset.json").read_text())
    pd.read_csv(path, dtype=str).drop(columns="patient").to_csv(path, index=False)
    (folder / "dataset.json").write_text(json.dumps(about | {"sha256": {"beats.csv": sha256(path)}}))
    assert "of another version" in refused(folder)
