"""Turn the MIT-BIH Arrhythmia Database into a balanced binary data set of 32 features a beat.

Reads   WFDB records (.hea, .dat, .atr) from --records-dir; missing ones are downloaded from PhysioNet.
Writes  to --data-dir: Arryth_MITBIH_{train,val,test}_{X,y}.npy (float32), beats.csv (which beat each row
        is) and dataset.json (recipe, counts, features, scaler, checksums).
Run     python preprocess_mitbih.py
        python preprocess_mitbih.py --abnormal S V F --exclude-paced --per-class all   (the published arrays)
        python preprocess_mitbih.py --abnormal S V F --split inter-patient             (unseen patients)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.arrays import BEATS, DESCRIPTION, SPLITS, apply_scaler, array_name, fit_scaler
from fhe_mlp.cli import (
    ROOT,
    InputError,
    check_writable,
    first_line,
    make_parser,
    positive_int,
    run,
    sha256,
    whole_file,
)
from fhe_mlp.ecg_features import FEATURES, MIN_FS_HZ, beat_features

DATABASE = "mitdb/1.0.0"  # PhysioNet name and version, for the download
DOWNLOAD_ATTEMPTS = 3  # tries a file before giving up; finished files are kept
BEATS_PER_CLASS = 12_074  # the methodology's 24,148 beats are 2 x 12,074
TEST_SHARE, VAL_SHARE = 0.30, 0.20  # of all beats; of the beats that are left (as published)

# Beat symbols by class, ANSI/AAMI EC57; other annotation symbols mark no beat.
AAMI_CLASSES = {"N": "NLRej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASS_OF_SYMBOL = {symbol: name for name, symbols in AAMI_CLASSES.items() for symbol in symbols}
PACED = "/"  # EC57 leaves records with paced beats out of algorithm scoring
# Inter-patient split of de Chazal, O'Dwyer & Reilly, IEEE Trans. Biomed. Eng. 51(7):1196-1206, 2004.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()

LICENCE = "Open Data Commons Attribution License v1.0"
SOURCE = "MIT-BIH Arrhythmia Database 1.0.0, PhysioNet, doi:10.13026/C2F305"


# -------------------------------------------------------------------------------------------------- records to features
def read_record(path: str) -> dict[str, Any]:
    """One record as {"record", "beats": table of usable beats, "X": (m, 32), "dropped", "skipped": reason or None}.

    A record that cannot be used (one lead, no beat annotations, flat or missing signal) has a reason and no beats;
    one that cannot be read (truncated, not WFDB) raises InputError.
    """
    import wfdb

    name = Path(path).name
    try:
        header = wfdb.rdheader(path)
        if header.n_sig != 2:
            return {"record": name, "skipped": f"has {header.n_sig} signals; two are needed"}
        if header.fs < MIN_FS_HZ:
            return {"record": name, "skipped": f"is sampled at {header.fs} Hz; at least {MIN_FS_HZ:.0f} Hz are needed"}
        if not Path(f"{path}.atr").exists():
            return {"record": name, "skipped": "has no annotation file (.atr)"}
        if not Path(f"{path}.atr").stat().st_size:
            raise ValueError("its .atr is empty")
        annotation = wfdb.rdann(path, "atr")
        signal = wfdb.rdrecord(path).p_signal
    except (ValueError, IndexError, KeyError, OSError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(
            f"{path}: cannot be read as a WFDB record, truncated or damaged ({first_line(error)}); "
            "get a new copy of its .hea, .dat and .atr"
        ) from None
    symbols = np.array(annotation.symbol)
    is_beat = np.isin(symbols, list(CLASS_OF_SYMBOL))
    if (annotation.sample[is_beat] >= len(signal)).any():
        return {"record": name, "skipped": "has beats annotated after its signal ends; its .hea or .dat is damaged"}
    try:
        X, index, dropped = beat_features(signal, header.fs, annotation.sample[is_beat])
    except ValueError as error:
        return {"record": name, "skipped": str(error)}
    symbols = symbols[is_beat]
    beats = pd.DataFrame({"record": name, "sample": annotation.sample[is_beat][index], "symbol": symbols[index]})
    beats["aami"] = beats["symbol"].map(CLASS_OF_SYMBOL)
    return {"record": name, "beats": beats, "X": X, "dropped": dropped, "paced": PACED in symbols, "skipped": None}


# ----------------------------------------------------------------------------------------------- features to a data set
def draw_balanced(aami: np.ndarray, abnormal: Sequence[str], limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Rising indices of as many normal as abnormal beats, at most `limit` a class (None: no limit).

    Every S, V and F beat is kept while they fit; Q beats (unclassifiable, mostly paced) only fill up.
    """
    normal = np.flatnonzero(aami == "N")
    known = np.flatnonzero(np.isin(aami, [c for c in abnormal if c != "Q"]))
    filler = np.flatnonzero(aami == "Q") if "Q" in abnormal else known[:0]
    size = min(len(normal), len(known) + len(filler), len(aami) if limit is None else limit)
    known = rng.permutation(known)[:size]
    filler = rng.permutation(filler)[: size - len(known)]
    return np.sort(np.concatenate([rng.permutation(normal)[:size], known, filler]))


def split_random(beats: pd.DataFrame, abnormal: Sequence[str], limit: int | None, seed: int) -> dict[str, np.ndarray]:
    """Row indices of the published split: beats of one patient may lie on both sides."""
    from sklearn.model_selection import train_test_split

    chosen = draw_balanced(beats["aami"].to_numpy(), abnormal, limit, np.random.default_rng(seed))
    label = (beats["aami"] != "N").to_numpy()
    try:
        rest, test = train_test_split(chosen, test_size=TEST_SHARE, stratify=label[chosen], random_state=seed)
        train, val = train_test_split(rest, test_size=VAL_SHARE, stratify=label[rest], random_state=seed)
    except ValueError:
        raise InputError(
            f"only {len(chosen)} beats in two classes can be drawn, too few to split; give more records or classes"
        ) from None
    return {"train": train, "val": val, "test": test}


def split_inter_patient(
    beats: pd.DataFrame, abnormal: Sequence[str], limit: int | None, seed: int
) -> dict[str, np.ndarray]:
    """Row indices: balanced draw from DS1, whole DS1 records for validation, all of DS2 as it is."""
    from sklearn.model_selection import StratifiedGroupKFold

    wanted = beats["aami"].isin(["N", *abnormal])
    ds1 = np.flatnonzero(wanted & beats["record"].isin(DS1))
    test = np.flatnonzero(wanted & beats["record"].isin(DS2))
    records, aami = beats["record"].to_numpy(), beats["aami"].to_numpy()
    folds = min(round(1 / VAL_SHARE), len(set(records[ds1])))
    if folds < 2 or not len(test):
        raise InputError(
            "the inter-patient split needs two records of DS1 and one of DS2 (see this script); use --split random"
        )
    folds = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # F and Q are rare; that is known
        rest, val = next(folds.split(ds1, aami[ds1], records[ds1]))
    rest = ds1[rest]
    train = rest[draw_balanced(aami[rest], abnormal, limit, np.random.default_rng(seed))]
    return {"train": train, "val": ds1[val], "test": test}


# -------------------------------------------------------------------------------------------------- getting the records
def download(name: str, folder: Path, expected: str | None) -> None:
    """Fetch one file of DATABASE into `folder` through wfdb; it appears there only whole and with the right SHA-256.

    Finished files are kept, and a part that a killed run left is continued, so that the next run goes on from there.
    Raises InputError when DOWNLOAD_ATTEMPTS were in vain.
    """
    from wfdb.io.download import dl_pn_file

    part = folder / ".part" / name
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(DOWNLOAD_ATTEMPTS):
        try:
            with contextlib.redirect_stdout(None):  # wfdb reports each continued file; the progress bar is enough
                dl_pn_file((name, "", DATABASE, str(part.parent), False, False))
            if expected is None or sha256(part) == expected:
                part.replace(folder / name)
                return
            reason = "its SHA-256 is not the published one"
            part.unlink()
        except OSError as error:  # what wfdb raises on any trouble with the network
            reason = str(error)
            time.sleep(attempt)
    raise InputError(f"{DATABASE}/{name}: download failed ({reason}); run the same command again, it goes on from here")


def provide_records(folder: Path, may_download: bool) -> list[str]:
    """Sorted paths, without suffix, of the records in `folder`, downloaded where missing and checked where published.

    A folder of another WFDB database (headers, but no SHA256SUMS.txt) is taken as it is.
    """
    from tqdm import tqdm

    sums = folder / "SHA256SUMS.txt"
    if not sums.exists() and not list(folder.glob("*.hea")):
        if folder.exists() and any(p.name != ".part" for p in folder.iterdir()):
            raise InputError(f"{folder}: holds no WFDB header (.hea); name a folder of records with --records-dir")
        if not may_download:
            raise InputError(f"{folder}: no records here; run without --no-download or name them with --records-dir")
        download(sums.name, folder, None)
    if sums.exists():
        lines = [
            re.fullmatch(r"([0-9a-f]{64})\s+(\S+)", line) for line in sums.read_text(errors="replace").splitlines()
        ]
        if not lines or not all(lines):
            raise InputError(f"{sums}: is no whole list of checksums; delete it and run again")
        listed = {m[2]: m[1] for m in lines if m[2].endswith((".hea", ".dat", ".atr")) and "/" not in m[2]}
        missing = [name for name in listed if not (folder / name).exists()]
        if missing and not may_download:
            raise InputError(
                f"{folder}: {len(missing)} files are missing, {missing[0]} first; run without --no-download"
            )
        for name in tqdm(missing, desc=f"downloading {DATABASE}", unit="file", disable=not missing):
            download(name, folder, listed[name])
        for name, expected in listed.items():
            if sha256(folder / name) != expected:
                raise InputError(f"{folder / name}: SHA-256 is not the published one; delete the file and run again")
    return sorted(str(p.with_suffix("")) for p in folder.glob("*.hea"))


def read_all(paths: list[str], workers: int) -> list[dict[str, Any]]:
    """The records at `paths`, in that order, read by `workers` processes."""
    from tqdm import tqdm

    with ProcessPoolExecutor(max(1, min(workers, len(paths)))) as pool:
        return list(tqdm(pool.map(read_record, paths), total=len(paths), desc="reading", unit="record"))


# -------------------------------------------------------------------------------------------- shared by all the scripts
def per_class(text: str) -> int | None:
    """argparse type: a positive number of beats, or None for 'all'."""
    return None if text == "all" else positive_int(text)


# ---------------------------------------------------------------------------------------------------------- the command
def write_dataset(
    data_dir: Path, beats: pd.DataFrame, X: np.ndarray, rows: dict[str, np.ndarray], recipe: dict[str, Any]
) -> pd.DataFrame:
    """Scale, write the arrays, beats.csv and dataset.json, all or none, and return the counts by split and class."""
    scaler = fit_scaler(X[rows["train"]])
    table = pd.concat([beats.iloc[rows[s]].assign(split=s) for s in SPLITS])
    contents = {BEATS: table[["split", "record", "sample", "symbol", "aami"]].to_csv(index=False).encode()}
    for split in SPLITS:
        label = (beats["aami"].to_numpy()[rows[split]] != "N").astype(np.float32)
        for kind, array in (("X", apply_scaler(X[rows[split]], scaler)), ("y", label)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            contents[array_name(split, kind)] = buffer.getvalue()
    counts = pd.crosstab(table["split"], table["aami"]).reindex(index=SPLITS, columns=list(AAMI_CLASSES), fill_value=0)
    by_record = table.groupby(["split", "record", "aami"]).size()
    description = {
        "source": SOURCE,
        "licence": LICENCE,
        "recipe": recipe,
        "counts": {s: counts.loc[s].to_dict() for s in SPLITS},
        "counts_by_record": {s: {" ".join(key): int(n) for key, n in by_record[s].items()} for s in SPLITS},
        "features": FEATURES,
        "scaler": scaler,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    contents[DESCRIPTION] = (json.dumps(description, indent=1) + "\n").encode()
    with contextlib.ExitStack() as stack:  # all are written before the first takes its place
        for name, content in contents.items():
            stack.enter_context(whole_file(data_dir / name)).write_bytes(content)
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Build the data set."""
    parser = make_parser(__doc__)
    parser.add_argument("--records-dir", type=Path, default=ROOT / "data" / "mitdb", help="folder of the WFDB records")
    parser.add_argument("--no-download", action="store_true", help="refuse when records are missing")
    parser.add_argument(
        "--abnormal", nargs="+", choices=list("SVFQ"), default=list("SVFQ"), help="AAMI classes labelled 1"
    )
    parser.add_argument("--exclude-paced", action="store_true", help="leave out records with paced beats, as EC57 does")
    parser.add_argument("--per-class", type=per_class, default=BEATS_PER_CLASS, help="most beats of a label, or 'all'")
    parser.add_argument(
        "--split", choices=("random", "inter-patient"), default="random", help="beats or whole patients"
    )
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count(), help="processes that read records")
    args = parser.parse_args(argv)
    check_writable(args.data_dir)
    started = time.monotonic()
    records = read_all(provide_records(args.records_dir, not args.no_download), args.workers)
    skipped = {r["record"]: r["skipped"] for r in records if r["skipped"]}
    for name, reason in skipped.items():
        print(f"record {name} is left out: it {reason}", file=sys.stderr)
    used = [r for r in records if not r["skipped"] and not (args.exclude_paced and r["paced"])]
    if not used:
        raise InputError("no usable record is left; see --records-dir and --exclude-paced")
    beats = pd.concat([r["beats"] for r in used], ignore_index=True)
    X = np.concatenate([r["X"] for r in used])
    split = split_random if args.split == "random" else split_inter_patient
    rows = split(beats, args.abnormal, args.per_class, args.seed)
    for part in SPLITS:
        if beats["aami"].iloc[rows[part]].eq("N").nunique() < 2:
            raise InputError(f"the {part} part has only one label; give more records, or other --abnormal classes")
    dropped = pd.DataFrame([r["dropped"] for r in used]).sum()
    recipe = {
        "abnormal": sorted(args.abnormal, key="SVFQ".index),
        "exclude_paced": args.exclude_paced,
        "per_class": args.per_class or "all",
        "split": args.split,
        "seed": args.seed,
        "records": [r["record"] for r in used],
        "records_left_out": skipped,
        "beats_dropped": {reason: int(n) for reason, n in dropped.items()},
    }
    counts = write_dataset(args.data_dir, beats, X, rows, recipe)
    counts["rows"] = counts.sum(axis=1)
    counts.loc["all"] = counts.sum()
    print(f"\n{counts.to_string()}\n")
    print(
        f"{len(used)} records, {len(beats)} usable beats; dropped: " + ", ".join(f"{n} {r}" for r, n in dropped.items())
    )
    available = counts.loc["all", "rows"] // 2
    if args.split == "random" and args.per_class and available < args.per_class:
        print(f"only {available} beats of the rarer label are there, fewer than --per-class {args.per_class}")
    print(f"wrote six arrays, beats.csv and dataset.json to {args.data_dir} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    run(main)
