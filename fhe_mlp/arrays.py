"""The arrays that steps 1 to 5 read: checked loading, scaling, and the names of their columns.

A data set is six files Arryth_MITBIH_{train,val,test}_{X,y}.npy of any number of columns in one folder. Beside them,
dataset.json describes what preprocess_mitbih.py made; arrays made elsewhere come without it.
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.cli import InputError, first_line, sha256
from fhe_mlp.expansion import MOST_COLUMNS, NONE, columns, expand_scaled

SPLITS = ("train", "val", "test")
BEATS = "beats.csv"  # which beat each row of the arrays is, in their order; only beside dataset.json
DESCRIPTION = "dataset.json"  # of the folder: recipe, features, scaler, checksums
REMEDY = "make it with: python preprocess_mitbih.py --data-dir {}"
HEADER_BYTES = 20_000  # of an array; NumPy takes none that is longer
CONSTANT = 1e-6  # of a column's mean: a smaller standard deviation is rounding error, also in float32
CLIP_SD = 3.0  # standard deviations; artefacts of 20 sd would waste the few bits of the encrypted network
# Of a training draw for unseen patients: as many normal as abnormal beats; F and Q are rare and of few patients.
CLASS_SHARES = {"N": 0.5, "S": 0.2, "V": 0.2, "F": 0.1, "Q": 0.1}
COPY = r"-S[\d.]+$"  # of a record's name: a copy in which S beats are many (preprocess_mitbih.py, --s-majority)
Rows = tuple[np.ndarray, np.ndarray]  # X (n, features) float32 and y (n,) int64 of 0 and 1
Arrays = dict[str, Rows]  # of each of SPLITS, as load_arrays gives them


def array_name(split: str, kind: str) -> str:
    """File name of an array; split: of SPLITS; kind: "X" or "y"."""
    return f"Arryth_MITBIH_{split}_{kind}.npy"


def draw_probability(beats: pd.DataFrame) -> np.ndarray:
    """(n,) float64, sum 1: chance of each training row in a draw by class and record.

    beats: columns record and aami (N and at least one other class of CLASS_SHARES). N has its share of CLASS_SHARES,
    the abnormal classes that occur have the rest in proportion to theirs. Within a class a record's share is
    proportional to the square root of its beats: between equal beats, where a few patients with thousands would decide
    alone, and equal records, where one with three beats would. Rows of a record and class are equal.
    """
    aami = beats["aami"]
    shares = pd.Series(CLASS_SHARES)[list(aami.unique())]
    abnormal = shares.index != "N"
    shares[abnormal] *= (1 - CLASS_SHARES["N"]) / shares[abnormal].sum()
    weight = beats.groupby(["aami", "record"])["aami"].transform("size") ** -0.5  # n rows sum to the root of n
    return (aami.map(shares) * weight / weight.groupby(aami).transform("sum")).to_numpy()


def fit_scaler(X: np.ndarray, probability: np.ndarray | None = None) -> dict[str, Any]:
    """Mean and standard deviation of each column of the training part X (n, features), and the clip in deviations.

    probability: chance (n,) of each row in a training draw, which weighs the rows; None: all are equal.
    """
    if probability is None:
        mean, sd = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
    else:
        mean = np.average(X, axis=0, weights=probability)
        sd = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=probability))
    return {
        "mean": mean.tolist(),
        "sd": np.where(sd > CONSTANT * np.abs(mean), sd, 1.0).tolist(),  # a constant column stays near 0
        "clip_sd": CLIP_SD,
    }


def apply_scaler(X: np.ndarray, scaler: dict[str, Any]) -> np.ndarray:
    """Standardised and clipped features, float32, of rows (n, features) or of one new row."""
    z = (X - np.array(scaler["mean"])) / np.array(scaler["sd"])
    return np.clip(z, -scaler["clip_sd"], scaler["clip_sd"]).astype(np.float32)


def read_array(path: Path, remedy: str) -> np.ndarray:
    """A .npy file of finite numbers. Raises InputError, which ends in `remedy`, for anything else."""
    try:
        with path.open("rb") as file:
            start = io.BytesIO(file.read(HEADER_BYTES))  # a header may claim 4 GB for itself
        old, new = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, _, dtype = {(1, 0): old, (2, 0): new, (3, 0): new}[np.lib.format.read_magic(start)](start)
        if not dtype.itemsize or min(shape, default=1) < 1:  # NumPy 1.26 divides by a size of 0, which ends the process
            raise ValueError(f"{dtype} of shape {shape}")
        # np.load would also take archives and pickles, and memory for whatever size the header claims
        array = np.array(np.lib.format.open_memmap(path, mode="r"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; {remedy}") from None
    except Exception as error:  # the parser of NumPy's header raises a dozen unrelated types
        raise InputError(f"{path}: is truncated or not a valid .npy array ({first_line(error)}); {remedy}") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path}: holds no numbers; {remedy}")
    with np.errstate(over="ignore"):
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{path}: holds NaN, infinity or numbers over 3e38; {remedy}")
    return array


def load_arrays(data_dir: Path, expand: str = NONE) -> Arrays:
    """{"train", "val", "test": (X (n, features) float32, y (n,) int64 of 0 and 1)}, checked.

    With dataset.json the arrays are already scaled and must have its checksums. Arrays made elsewhere come without it:
    they are standardised and clipped here with the statistics of their training part.
    expand: the public map (expansion.expansion) whose columns take the features' place.
    Rows of the training part that are in the test part too make its figures too good: they are counted on stderr.
    Raises InputError for a missing, truncated, wrong-shaped, NaN-holding or foreign file.
    """
    remedy = REMEDY.format(data_dir)
    arrays = {}
    for split in SPLITS:
        X, y = (read_array(data_dir / array_name(split, kind), remedy) for kind in "Xy")
        path = data_dir / array_name(split, "X")
        width = arrays["train"][0].shape[1:] if arrays else X.shape[1:]
        if X.ndim != 2 or X.shape[1:] != width or not X.size:
            expected = f"(rows, {width[0]})" if arrays else "(rows, features)"
            raise InputError(f"{path}: shape {X.shape}, expected {expected}; {remedy}")
        path = data_dir / array_name(split, "y")
        if y.ndim != 1 or set(np.unique(y)) != {0, 1}:
            raise InputError(f"{path}: labels must be 0 and 1, both present, in one dimension; {remedy}")
        if len(X) != len(y):
            raise InputError(f"{data_dir}: {split} X and y differ in length; {remedy}")
        arrays[split] = X, y
    if (data_dir / DESCRIPTION).exists():
        for name, expected in load_description(data_dir)["sha256"].items():
            if not (data_dir / name).exists() or sha256(data_dir / name) != expected:
                raise InputError(f"{data_dir / name}: is not the file that {DESCRIPTION} describes; {remedy}")
        if len(load_description(data_dir)["scaler"]["mean"]) != arrays["train"][0].shape[1]:
            raise InputError(f"{data_dir / DESCRIPTION}: describes another number of features; {remedy}")
    else:
        scaler = fit_scaler(arrays["train"][0])
        print(f"{data_dir} has no {DESCRIPTION}: standardised with its training part, clipped to {CLIP_SD:g} sd")
        arrays = {split: (apply_scaler(X, scaler), y) for split, (X, y) in arrays.items()}
    arrays = {split: (X.astype(np.float32), y.astype(np.int64)) for split, (X, y) in arrays.items()}
    seen = {hash(row.tobytes()) for row in arrays["train"][0]}
    repeated = sum(hash(row.tobytes()) in seen for row in arrays["test"][0])
    if repeated:
        print(f"{data_dir}: {repeated} of {len(arrays['test'][0])} test rows are training rows too", file=sys.stderr)
    if columns(arrays["train"][0].shape[1], expand) > MOST_COLUMNS:
        raise InputError(f"{data_dir}: --expand {expand} gives more than {MOST_COLUMNS} columns")
    return {split: (expand_scaled(X, expand, CLIP_SD), y) for split, (X, y) in arrays.items()}


def load_scaler(data_dir: Path) -> dict[str, Any]:
    """The scaler of load_arrays: dataset.json's or, without it, one fitted to the training part."""
    if (data_dir / DESCRIPTION).exists():
        return load_description(data_dir)["scaler"]
    return fit_scaler(read_array(data_dir / array_name("train", "X"), REMEDY.format(data_dir)))


def feature_table(data_dir: Path, width: int) -> list[dict[str, str]]:
    """Name, unit and formula of each of `width` columns: of dataset.json or, without it, feature_0 and so on."""
    if (data_dir / DESCRIPTION).exists():
        return load_description(data_dir)["features"]
    return [{"name": f"feature_{k}", "unit": "?", "formula": f"column {k} of the arrays"} for k in range(width)]


def expected_leads(data_dir: Path) -> dict[str, list[str]] | None:
    """Names that the leads of channel 0 and 1 had in the records that the features come from, where that is known."""
    if not (data_dir / DESCRIPTION).exists():
        return None
    return load_description(data_dir).get("recipe", {}).get("leads_expected")


def beats_of(data_dir: Path) -> pd.DataFrame | None:
    """Split, record, sample, symbol and AAMI class of each row that load_arrays gives, or None for arrays without.

    Raises InputError for a file that is not such a list.
    """
    if not (data_dir / DESCRIPTION).exists() or BEATS not in load_description(data_dir)["sha256"]:
        return None
    path, remedy = data_dir / BEATS, REMEDY.format(data_dir)
    rows = {split: len(read_array(data_dir / array_name(split, "y"), remedy)) for split in SPLITS}
    try:
        beats = pd.read_csv(path, dtype=str, keep_default_na=False)[["split", "record", "sample", "symbol", "aami"]]
        if beats["split"].value_counts().to_dict() != rows:
            raise ValueError("other rows than the arrays")
    except (ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise InputError(f"{path}: is not the list of the arrays' beats ({first_line(error)}); {remedy}") from None
    return beats


def rows_of(data_dir: Path, data: Arrays) -> tuple[dict[str, pd.DataFrame], bool]:
    """Columns record and aami of the rows of each split, and whether they are known.

    Of arrays that came without beats.csv every row is of record "unknown" and of class N or, for label 1, Q.
    """
    beats = beats_of(data_dir)
    if beats is None:
        tables = {s: pd.DataFrame({"record": "unknown", "aami": np.where(y, "Q", "N")}) for s, (_, y) in data.items()}
        return tables, False
    return {s: beats.loc[beats["split"] == s, ["record", "aami"]].reset_index(drop=True) for s in SPLITS}, True


def patients(beats: pd.DataFrame) -> pd.Series:
    """Record of each row that it is, or is a copy, of; beats: column record."""
    return beats["record"].str.replace(COPY, "", regex=True)


def unseen_patients(beats: dict[str, pd.DataFrame]) -> bool:
    """Whether no patient of the validation part is in the training part; beats: of rows_of."""
    return not set(patients(beats["train"])) & set(patients(beats["val"]))


def training_probability(beats: dict[str, pd.DataFrame]) -> np.ndarray:
    """Chance (n,) of each training row in a draw: by class and record for unseen patients, else the same for all.

    beats: of rows_of. Where test rows are drawn as training rows were, any other draw would cost accuracy.
    """
    rows = beats["train"]
    return draw_probability(rows) if unseen_patients(beats) else np.full(len(rows), 1 / len(rows))


def stratified_order(beats: pd.DataFrame, seed: int) -> np.ndarray:
    """Row numbers in an order of which every stretch has each AAMI class and record in its share, until one runs out.

    beats: columns record and aami. Shares are those of training draws, so that ten rows have two S beats where S is one
    beat in thirty. Each row comes once: row r of a stratum (random order) has the place (r + 1/2) / share, and within a
    class, records come in the same way, with the square root of their beats as share.
    """
    shuffled = beats[["record", "aami"]].iloc[np.random.default_rng(seed).permutation(len(beats))]
    size = shuffled.groupby(["aami", "record"])["aami"].transform("size")
    in_record = (shuffled.groupby(["aami", "record"]).cumcount() + 0.5) / np.sqrt(size)
    shuffled = shuffled.iloc[np.argsort(in_record.to_numpy(), kind="stable")]
    place = (shuffled.groupby("aami").cumcount() + 0.5) / shuffled["aami"].map(CLASS_SHARES)
    return shuffled.index.to_numpy()[np.argsort(place.to_numpy(), kind="stable")]


def load_description(data_dir: Path) -> dict[str, Any]:
    """dataset.json as preprocess_mitbih.py writes it. Raises InputError when it is damaged."""
    path = data_dir / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        files, scaler = set(description["sha256"].keys()), description["scaler"]
        ours = {array_name(split, kind) for split in SPLITS for kind in "Xy"}
        if not ours <= files <= ours | {BEATS}:  # another could be a path out of the folder
            raise ValueError
        numbers = [*scaler["mean"], *scaler["sd"], scaler["clip_sd"]]
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise ValueError
        if min(scaler["sd"]) <= 0 or scaler["clip_sd"] <= 0:
            raise ValueError
        if not all(f[key].isprintable() for f in description["features"] for key in ("name", "unit", "formula")):
            raise ValueError  # half a surrogate pair could not be exported
        leads = description.get("recipe", {}).get("leads_expected", {})
        if not all(isinstance(names, list) and all(map(str.isprintable, names)) for names in leads.values()):
            raise ValueError
        names = {feature["name"] for feature in description["features"]}
        if not len(scaler["mean"]) == len(scaler["sd"]) == len(description["features"]) == len(names):
            raise ValueError
        return description
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{path}: damaged; {REMEDY.format(data_dir)}") from None
