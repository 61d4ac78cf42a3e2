r"""Turn the MIT-BIH Arrhythmia Database into a binary data set of 32 features a beat.

Reads   WFDB records (.hea, .dat, .atr) from --records-dir; missing ones are downloaded from PhysioNet.
Writes  to --data-dir: Arryth_MITBIH_{train,val,test}_{X,y}.npy (float32), beats.csv (which beat each row
        is) and dataset.json (recipe, counts, features, scaler, checksums).
Run     python preprocess_mitbih.py
        python preprocess_mitbih.py --data-dir unseen --abnormal S V F --split inter-patient    (unseen patients)
        python preprocess_mitbih.py --data-dir published --features published --abnormal S V F --exclude-paced \
            --per-class all                                                                     (the published arrays)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import ecg_features, published_features
from fhe_mlp.arrays import BEATS, DESCRIPTION, SPLITS, apply_scaler, array_name, draw_probability, fit_scaler
from fhe_mlp.cli import (
    ROOT,
    SEED,
    InputError,
    check_writable,
    first_line,
    make_parser,
    positive_float,
    positive_int,
    run,
    whole_file,
)
from fhe_mlp.ecg_features import rr_known, single_beats
from fhe_mlp.physionet import provide_records
from fhe_mlp.records import (
    AAMI_CLASSES,
    CLASS_OF_SYMBOL,
    EXPECTED_LEADS,
    Unsuited,
    are_expected,
    find_beats,
    find_breaks,
    read_annotations,
    read_signal,
)

FEATURE_SETS = {  # by name: what computes the columns, and their table
    "relative": (ecg_features.beat_features, ecg_features.FEATURES),
    "published": (published_features.published_features, published_features.PUBLISHED),
}
BEATS_PER_CLASS = 12_074  # the methodology's 24,148 beats are 2 x 12,074
TEST_SHARE, VAL_SHARE = 0.30, 0.20  # of all beats; of the beats that are left (as published)
# N beats for each S beat in the copies of a record in which S is the majority or nearly so. DS1 has no such patient;
# DS2 has one, 232, and there the medians that features are measured against are those of the arrhythmia.
S_MAJORITY = (0.3, 0.8)
MIN_S_BEATS = 30  # S beats that a record needs for its copies; medians of fewer beats are chance

PACED = "/"  # EC57 leaves records with paced beats out of algorithm scoring
# Inter-patient split of de Chazal, O'Dwyer & Reilly, IEEE Trans. Biomed. Eng. 51(7):1196-1206, 2004.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()
LICENCE = "Open Data Commons Attribution License v1.0"
SOURCE = "MIT-BIH Arrhythmia Database 1.0.0, PhysioNet, doi:10.13026/C2F305"


# -------------------------------------------------------------------------------------------------- records to features
def choose_s_majority(aami: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Rising positions in aami (m,), in the order of time, of all S beats and `ratio` times as many N beats.

    N beats right after an S beat come first, since their RR intervals are those of a record full of S beats; the rest
    is drawn at random. Where N beats are too few, all are taken.
    """
    s, n = np.flatnonzero(aami == "S"), np.flatnonzero(aami == "N")
    after_s = np.isin(n - 1, s)
    drawn = np.concatenate([rng.permutation(n[after_s]), rng.permutation(n[~after_s])])
    return np.sort(np.concatenate([s, drawn[: round(min(ratio * len(s), len(n)))]]))


def read_record(
    path: str, features: str = "relative", s_majority: Sequence[float] = (), seed: int = SEED
) -> dict[str, Any]:
    """One record as {"record", "leads", "beats": usable ones, "X": (m, 32), counts "dropped" and "noted", "paced"}.

    features: a name of FEATURE_SETS; s_majority: ratios of N to S beats, for each of which a record of DS1 with at
    least MIN_S_BEATS gets one of "copies", {name: (beats, X)}, with the relative features of choose_s_majority's beats
    alone; seed: of that draw, which depends on nothing else than the record.

    A record that cannot be used (one lead, no beat annotations, flat or missing signal) is {"record", "skipped": why};
    one that cannot be read (truncated, not WFDB) raises InputError. Marks of one beat, as of two leads, count once; a
    beat that is marked as two classes is dropped, but counts for the RR intervals beside it.
    """
    from wfdb.io.annotation import ann_label_table

    name = Path(path).name
    try:
        signal, fs, leads = read_signal(path)
        if not Path(f"{path}.atr").exists():
            raise Unsuited("has no annotation file (.atr)")
        annotations, unsorted = read_annotations(path, fs)
        beats, outside = find_beats(annotations, len(signal))
    except Unsuited as reason:
        return {"record": name, "skipped": str(reason)}
    except Exception as error:  # wfdb and soundfile raise a dozen unrelated types on damaged files
        raise InputError(
            f"{path}: cannot be read as a WFDB record, truncated or damaged ({first_line(error)}); "
            "get a new copy of its .hea, .dat and .atr"
        ) from None
    known = annotations["symbol"].isin([*CLASS_OF_SYMBOL, *ann_label_table["symbol"]])
    times, aami = beats["time"].to_numpy(int), beats["symbol"].map(CLASS_OF_SYMBOL).to_numpy()
    breaks = find_breaks(annotations)
    one = single_beats(times, fs)
    try:
        X, index, dropped = FEATURE_SETS[features][0](signal, fs, times, breaks)
    except ValueError as error:
        return {"record": name, "skipped": str(error)}
    unknown = ~np.pad(rr_known(signal, fs, times[one], breaks), 1, constant_values=True)
    owner = np.searchsorted(one, np.arange(len(times)), side="right")
    disagree = pd.Series(aami).groupby(owner).nunique().to_numpy() > 1
    place = np.searchsorted(one, index)
    agreed = ~disagree[place]
    dropped |= {"annotated as two classes": int((~agreed).sum()), "outside the signal": outside}
    noted = {
        "usable beats beside a time that is no RR interval": int((unknown[place] | unknown[place + 1])[agreed].sum()),
        "annotations of a code that WFDB does not define": int((~known).sum()),
        "annotations out of order": unsorted,
    }
    X, index = X[agreed], index[agreed]
    table = pd.DataFrame({"record": name, "sample": times[index], "symbol": beats["symbol"].to_numpy()[index]})
    table["aami"] = aami[index]
    copies = {}
    for ratio in s_majority if name in DS1 and (table["aami"] == "S").sum() >= MIN_S_BEATS else ():
        chosen = choose_s_majority(aami[index], ratio, np.random.default_rng([seed, *name.encode()]))
        with contextlib.suppress(ValueError):  # these beats alone may have no RR interval; then there is no copy
            X_copy, _, _ = ecg_features.beat_features(signal, fs, times, breaks, only=index[chosen])
            copy = f"{name}-S{ratio:g}"
            copies[copy] = table.iloc[chosen].assign(record=copy), X_copy
    paced = bool((beats["symbol"] == PACED).any())
    return {
        "record": name,
        "leads": leads,
        "beats": table,
        "X": X,
        "copies": copies,
        "dropped": dropped,
        "noted": noted,
        "paced": paced,
    }


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


def split_inter_patient(beats: pd.DataFrame, abnormal: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Row indices: every beat of `abnormal` and N, once; whole DS1 records for validation, DS2 for the test."""
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
        train, val = next(folds.split(ds1, aami[ds1], records[ds1]))
    return {"train": ds1[train], "val": ds1[val], "test": test}


def read_all(paths: list[str], workers: int, **options: Any) -> list[dict[str, Any]]:
    """The records at `paths`, in that order, read by `workers` processes; options: of read_record."""
    read = functools.partial(read_record, **options)
    from tqdm import tqdm

    with ProcessPoolExecutor(max(1, min(workers, len(paths)))) as pool:
        return list(tqdm(pool.map(read, paths), total=len(paths), desc="reading", unit="record"))


# ---------------------------------------------------------------------------------------------------------- the command
def per_class(text: str) -> int | None:
    """argparse type: a positive number of beats, or None for 'all'."""
    return None if text == "all" else positive_int(text)


def write_dataset(
    data_dir: Path, beats: pd.DataFrame, X: np.ndarray, rows: dict[str, np.ndarray], recipe: dict[str, Any]
) -> pd.DataFrame:
    """Scale, write the arrays, beats.csv and dataset.json, all or none, and return the counts by split and class."""
    by_draw = recipe["split"] == "inter-patient"  # its training part is balanced by a draw, the random one by itself
    scaler = fit_scaler(X[rows["train"]], draw_probability(beats.iloc[rows["train"]]) if by_draw else None)
    table = pd.concat([beats.iloc[rows[s]].assign(split=s) for s in SPLITS])
    contents = {BEATS: table[["split", "record", "sample", "symbol", "aami"]].to_csv(index=False).encode()}
    for split in SPLITS:
        label = (beats["aami"].to_numpy()[rows[split]] != "N").astype(np.float32)
        for kind, array in (("X", apply_scaler(X[rows[split]], scaler)), ("y", label)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            contents[array_name(split, kind)] = buffer.getvalue()
    counts = pd.crosstab(table["split"], table["aami"]).reindex(index=SPLITS, columns=list(AAMI_CLASSES), fill_value=0)
    description = {
        "source": SOURCE,
        "licence": LICENCE,
        "recipe": recipe,
        "counts": {s: counts.loc[s].to_dict() for s in SPLITS},
        "features": FEATURE_SETS[recipe["features"]][1],
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
        "--features", choices=FEATURE_SETS, default="relative", help="relative to the recording, or as published"
    )
    parser.add_argument(
        "--abnormal", nargs="+", choices=list("SVFQ"), default=list("SVFQ"), help="AAMI classes labelled 1"
    )
    parser.add_argument("--exclude-paced", action="store_true", help="leave out records with paced beats, as EC57 does")
    parser.add_argument(
        "--per-class",
        type=per_class,
        default=BEATS_PER_CLASS,
        help="most beats of a label in the random split, or 'all'",
    )
    parser.add_argument(
        "--split", choices=("random", "inter-patient"), default="random", help="beats or whole patients"
    )
    parser.add_argument(
        "--s-majority",
        nargs="*",
        type=positive_float,
        default=list(S_MAJORITY),
        metavar="RATIO",
        help="N beats for each S beat in copies of inter-patient training records; without a number: no copies",
    )
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count(), help="processes that read records")
    args = parser.parse_args(argv)
    inter_patient = args.split == "inter-patient"
    if inter_patient and args.per_class != BEATS_PER_CLASS:
        parser.error("--per-class: the inter-patient split has all beats; --split random draws")
    if not (inter_patient and args.features == "relative" and "S" in args.abnormal):
        if args.s_majority != list(S_MAJORITY):
            parser.error("--s-majority needs --split inter-patient, --features relative and S in --abnormal")
        args.s_majority = []
    check_writable(args.data_dir)
    started = time.monotonic()
    paths = provide_records(args.records_dir, not args.no_download)
    records = read_all(paths, args.workers, features=args.features, s_majority=args.s_majority, seed=args.seed)
    skipped = {r["record"]: r["skipped"] for r in records if "skipped" in r}
    for name, reason in skipped.items():
        print(f"record {name} is left out: it {reason}", file=sys.stderr)
    used = [r for r in records if "skipped" not in r and not (args.exclude_paced and r["paced"])]
    for record in used:
        if not are_expected(record["leads"]):
            expected = " and ".join(" or ".join(names) for names in EXPECTED_LEADS.values())
            got = " and ".join(name or "an unnamed one" for name in record["leads"])
            print(f"record {record['record']} has the leads {got}, not {expected}", file=sys.stderr)
    if not used:
        raise InputError("no usable record is left; see --records-dir and --exclude-paced")
    beats = pd.concat([r["beats"] for r in used], ignore_index=True)
    X = np.concatenate([r["X"] for r in used])
    usable = len(beats)
    if inter_patient:
        rows = split_inter_patient(beats, args.abnormal, args.seed)
        trained = set(beats["record"].iloc[rows["train"]])
        copies = {name: copy for r in used if r["record"] in trained for name, copy in r["copies"].items()}
        beats = pd.concat([beats, *(table for table, _ in copies.values())], ignore_index=True)
        X = np.concatenate([X, *(X_copy for _, X_copy in copies.values())])
        rows["train"] = np.concatenate([rows["train"], np.arange(usable, len(beats))])
    else:
        rows = split_random(beats, args.abnormal, args.per_class, args.seed)
    for part in SPLITS:
        if beats["aami"].iloc[rows[part]].eq("N").nunique() < 2:
            raise InputError(f"the {part} part has only one label; give more records, or other --abnormal classes")
    dropped, noted = (pd.DataFrame([r[kind] for r in used]).sum() for kind in ("dropped", "noted"))
    others = [r["record"] for r in used if not are_expected(r["leads"])]
    recipe = {
        "features": args.features,
        "abnormal": sorted(args.abnormal, key="SVFQ".index),
        "exclude_paced": args.exclude_paced,
        "per_class": "all" if inter_patient else args.per_class or "all",
        "split": args.split,
        "seed": args.seed,
        "records": [r["record"] for r in used],
        "records_left_out": skipped,
        "beats_dropped": {reason: int(n) for reason, n in dropped.items()},
        "noted": {what: int(n) for what, n in noted.items()},
        "leads_expected": EXPECTED_LEADS,
        "records_with_other_leads": others,
        "leads": {r["record"]: r["leads"] for r in used},
    }
    if inter_patient:
        recipe |= {"s_majority": args.s_majority, "s_majority_copies": list(copies)}
    counts = write_dataset(args.data_dir, beats, X, rows, recipe)
    counts["rows"] = counts.sum(axis=1)
    counts["of other leads"] = [int(beats["record"].iloc[rows[split]].isin(others).sum()) for split in SPLITS]
    counts.loc["all"] = counts.sum()
    print(f"\n{counts.to_string()}\n")
    print(f"{len(used)} records, {usable} usable beats; dropped: " + ", ".join(f"{n} {r}" for r, n in dropped.items()))
    if inter_patient and copies:
        print(f"train has {len(beats) - usable} rows of copies in which S beats are many: {', '.join(copies)}")
    for what, n in noted[noted > 0].items():
        print(f"{n} {what}")
    available = counts.loc["all", "rows"] // 2
    if args.split == "random" and args.per_class and available < args.per_class:
        print(f"only {available} beats of the rarer label are there, fewer than --per-class {args.per_class}")
    print(f"wrote six arrays, beats.csv and dataset.json to {args.data_dir} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    run(main)
