"""The data set of steps 1 to 5: six files Arryth_MITBIH_{train,val,test}_{X,y}.npy of any number of columns.

Beside them, dataset.json and beats.csv describe what preprocess_mitbih.py made; arrays made elsewhere come without.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.cli import InputError, first_line, sha256
from fhe_mlp.ecg import LEAST_BEATS, figures
from fhe_mlp.scaling import CLIP_SD, MOST_COLUMNS, NONE, apply_scaler, columns, fit_scaler, map_features

SPLITS = ("train", "val", "test")
BEATS = "beats.csv"  # which beat each row of the arrays is, in their order
COPY = "-S"  # between a copy's patient and its number of N beats for each S beat
DESCRIPTION = "dataset.json"  # of the folder: recipe, features, scaler, checksums
# Of a training draw for unseen patients: as many normal as abnormal beats; F and Q are rare and of few patients.
CLASS_SHARES = {"N": 0.5, "S": 0.2, "V": 0.2, "F": 0.1, "Q": 0.1}


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a data set."""

    X: np.ndarray  # (n, columns) float32
    y: np.ndarray  # (n,) int64 of 0 and 1
    beats: pd.DataFrame  # record, patient and aami (class) of each row; if not named "unknown", and N or Q by label
    named: bool  # whether beats are known

    @property
    def copied(self) -> np.ndarray:
        """Whether each row (n,) is of a copy of a record in which S beats are frequent."""
        pairs = zip(self.beats["record"], self.beats["patient"])
        return np.array([record.startswith(patient + COPY) for record, patient in pairs])

    def figures(self, decision: np.ndarray) -> dict[str, Any]:
        """Return ecg.figures of decisions (n,) on these rows, by class and record where these are known."""
        return figures(self.y, decision, self.beats if self.named else None)

    def take(self, rows: np.ndarray) -> Part:
        """Return the part of these rows: their numbers, or a mask (n,)."""
        return Part(self.X[rows], self.y[rows], self.beats.iloc[rows].reset_index(drop=True), self.named)

    def join(self, other: Part) -> Part:
        """Return the part of these rows and, behind them, the other's."""
        X, y = np.concatenate([self.X, other.X]), np.concatenate([self.y, other.y])
        return Part(X, y, pd.concat([self.beats, other.beats], ignore_index=True), self.named)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The parts of a data set, and what prepares another beat in the same way (scaling.prepare)."""

    train: Part
    val: Part
    test: Part
    scaler: dict[str, Any]
    features: list[dict[str, str]]  # name, unit and formula of each, before the public map
    leads: dict[str, list[str]] | None  # names of ch0 and ch1 in the records, where known
    map: str  # public map that made the columns of X

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name, in the order of SPLITS."""
        return {split: getattr(self, split) for split in SPLITS}

    @property
    def unseen(self) -> bool:
        """Whether no patient of the validation part is in the training part."""
        return not set(self.train.beats["patient"]) & set(self.val.beats["patient"])

    @property
    def patients(self) -> str:
        """Kind of patients, as tables and pictures name it."""
        return "unseen patients" if self.unseen else "known patients" if self.train.named else "unknown patients"

    @cached_property
    def draw(self) -> np.ndarray:
        """Chance (n,) of each training row in a draw: equal where patients are known, whose rows are balanced.

        For unseen patients by class and record; for arrays that came without description by label, which can be rare.
        """
        count = len(self.train.y)
        return draw_probability(self.train.beats) if self.unseen or not self.train.named else np.full(count, 1 / count)

    @cached_property
    def ranking(self) -> Part:
        """Rows by which quantized networks are chosen and ranked: of unseen patients not only the few of validation.

        The training rows without copies count there too: networks this small do not learn them by heart.
        """
        return self.train.take(~self.train.copied).join(self.val) if self.unseen else self.val

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all X and y, hexadecimal."""
        whole = hashlib.sha256()
        for part in self.parts.values():
            whole.update(part.X.tobytes() + part.y.tobytes())
        return whole.hexdigest()


def draw_probability(beats: pd.DataFrame) -> np.ndarray:
    """Chance (n,) of each row in a draw by class and record, float64, sum 1; beats: columns record and aami.

    N has its share of CLASS_SHARES, the abnormal classes that occur have the rest in proportion to theirs. Within a
    class a record's share is proportional to the square root of its beats: between equal beats, where a few patients
    with thousands would decide alone, and equal records, where one with three beats would.
    """
    aami = beats["aami"]
    shares = pd.Series(CLASS_SHARES)[list(aami.unique())]
    abnormal = shares.index != "N"
    shares[abnormal] *= (1 - CLASS_SHARES["N"]) / shares[abnormal].sum()
    weight = beats.groupby(["aami", "record"])["aami"].transform("size") ** -0.5  # n rows sum to the root of n
    return (aami.map(shares) * weight / weight.groupby(aami).transform("sum")).to_numpy()


def stratified_order(beats: pd.DataFrame, seed: int) -> np.ndarray:
    """Row numbers in an order of which every stretch has each AAMI class and record in its share, until one runs out.

    beats: columns record and aami. Shares are those of draw_probability: ten rows have two S beats where S is one beat
    in thirty. Row r of a class has the place (r + 1/2) / share, and within a class, rows of a record come likewise.
    """
    shuffled = beats[["record", "aami"]].iloc[np.random.default_rng(seed).permutation(len(beats))]
    size = shuffled.groupby(["aami", "record"])["aami"].transform("size")
    in_record = (shuffled.groupby(["aami", "record"]).cumcount() + 0.5) / np.sqrt(size)
    shuffled = shuffled.iloc[np.argsort(in_record.to_numpy(), kind="stable")]
    place = (shuffled.groupby("aami").cumcount() + 0.5) / shuffled["aami"].map(CLASS_SHARES)
    return shuffled.index.to_numpy()[np.argsort(place.to_numpy(), kind="stable")]


def array_name(split: str, kind: str) -> str:
    """File name of an array; split: of SPLITS; kind: "X" or "y"."""
    return f"Arryth_MITBIH_{split}_{kind}.npy"


def read_array(path: Path) -> np.ndarray:
    """Read a .npy file of finite numbers. Raises InputError for anything else."""
    try:
        array = np.array(np.load(path, mmap_mode="r"))  # mapped first: a header may claim more than memory holds
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except Exception as error:  # the parser of NumPy's header raises a dozen unrelated types
        raise InputError(f"{path}: is truncated or not a valid .npy array ({first_line(error)})") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path}: holds no numbers")
    with np.errstate(over="ignore"):
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{path}: holds NaN, infinity or numbers over 3e38")
    return array


def read_arrays(data_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read and check X and y of each of SPLITS. Raises InputError."""
    arrays = {}
    for split in SPLITS:
        X_path, y_path = (data_dir / array_name(split, kind) for kind in "Xy")
        X, y = read_array(X_path), read_array(y_path)
        expected = ("rows", arrays["train"][0].shape[1] if arrays else "features")
        if X.ndim != 2 or not X.size or (arrays and X.shape[1] != expected[1]):
            raise InputError(f"{X_path}: shape {X.shape}, expected ({expected[0]}, {expected[1]})")
        if y.ndim != 1 or set(np.unique(y)) != {0, 1}:
            raise InputError(f"{y_path}: labels must be 0 and 1, both present, in one dimension")
        if len(X) != len(y):
            raise InputError(f"{data_dir}: {split} X and y differ in length")
        arrays[split] = X, y
    return arrays


def foreign_files(data_dir: Path) -> list[str]:
    """Return the names of arrays and of BEATS in a folder that dataset.json there does not describe: others' files."""
    try:
        own = dict(json.loads((data_dir / DESCRIPTION).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        own = {}
    paths = [data_dir / name for name in (*(array_name(split, kind) for split in SPLITS for kind in "Xy"), BEATS)]
    return [path.name for path in paths if path.is_file() and own.get(path.name) != sha256(path)]


def read_description(data_dir: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return dataset.json and beats.csv. Raises InputError where the folder's files do not have its checksums."""
    try:
        description = json.loads((data_dir / DESCRIPTION).read_text())
        for name, expected in description["sha256"].items():
            if not (data_dir / name).exists() or sha256(data_dir / name) != expected:
                raise InputError(f"{data_dir / name}: is not the file that {DESCRIPTION} describes")
        beats = pd.read_csv(data_dir / BEATS, dtype=str, keep_default_na=False)[["split", "record", "patient", "aami"]]
        return {key: description[key] for key in ("recipe", "scaler", "features")}, beats
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{data_dir / DESCRIPTION}: damaged or of another version ({first_line(error)})") from None


def describe(arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return what stands in for dataset.json and beats.csv of arrays that came without."""
    X = arrays["train"][0]
    names = [{"name": f"feature_{k}", "unit": "?", "formula": f"column {k} of the arrays"} for k in range(X.shape[1])]
    beats = [pd.DataFrame({"split": split, "aami": np.where(y, "Q", "N")}) for split, (_, y) in arrays.items()]
    beats = pd.concat(beats).assign(record="unknown", patient="unknown")
    return {"recipe": {}, "scaler": fit_scaler(X), "features": names}, beats


def load_dataset(data_dir: Path, spec: str = NONE) -> Dataset:
    """Load a data set; spec: the public map (scaling.public_map) whose columns take the features' place.

    With dataset.json the arrays are scaled and must have its checksums; without, they are standardised and clipped here
    with the statistics of their training part. Test rows that are training rows too make figures too good: they are
    counted on stderr. Raises InputError for a missing, truncated, wrong-shaped, NaN-holding or foreign file.
    """
    described = (data_dir / DESCRIPTION).exists()
    try:
        arrays = read_arrays(data_dir)
        about, beats = read_description(data_dir) if described else describe(arrays)
    except InputError as error:
        anew = f"make it with: python preprocess_mitbih.py --data-dir {data_dir}"
        remedy = "mend or complete your arrays, or name other ones with --data-dir" if foreign_files(data_dir) else anew
        raise InputError(f"{error}; {remedy}") from None
    if columns(arrays["train"][0].shape[1], spec) > MOST_COLUMNS:
        raise InputError(f"{data_dir}: --expand {spec} gives more than {MOST_COLUMNS} columns")
    if not described:
        print(f"{data_dir} has no {DESCRIPTION}: standardised with its training part, clipped to {CLIP_SD:g} sd")
        arrays = {split: (apply_scaler(X, about["scaler"]), y) for split, (X, y) in arrays.items()}
    arrays = {split: (X.astype(np.float32), y.astype(np.int64)) for split, (X, y) in arrays.items()}
    train, test = ([row.tobytes() for row in arrays[split][0]] for split in ("train", "test"))
    if repeated := sum(map(set(train).__contains__, test)):
        print(f"{data_dir}: {repeated} of {len(test)} test rows are training rows too", file=sys.stderr)
    for split, (_, y) in arrays.items():
        if (count := np.bincount(y).min()) < LEAST_BEATS:
            what = f"of one label the {split} part has only {count} rows; what is measured on them is uncertain"
            print(f"warning: {data_dir}: {what}", file=sys.stderr)
    parts = []
    for split, (X, y) in arrays.items():
        rows = beats.loc[beats["split"] == split, ["record", "patient", "aami"]].reset_index(drop=True)
        parts.append(Part(map_features(X, spec), y, rows, described))
    return Dataset(*parts, about["scaler"], about["features"], about["recipe"].get("leads_expected"), spec)
