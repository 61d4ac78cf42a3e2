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

import argparse
import contextlib
import functools
import hashlib
import io
import json
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import cli, ecg
from fhe_mlp.cli import InputError
from fhe_mlp.dataset import BEATS, COPY, DESCRIPTION, SPLITS, array_name, draw_probability
from fhe_mlp.scaling import apply_scaler, fit_scaler

FEATURE_SETS = {  # by name: what computes the columns, and their table
    "relative": (ecg.beat_features, ecg.FEATURES),
    "published": (ecg.published_features, ecg.PUBLISHED),
}
BEATS_PER_CLASS = 12_074  # the methodology's 24,148 beats are 2 x 12,074
TEST_SHARE, VAL_SHARE = 0.30, 0.20  # of all beats; of the beats that are left (as published)
# N beats for each S beat in the copies of a record in which S is the majority or nearly so. DS1 has no such patient;
# DS2 has one, 232, and there the medians that features are measured against are those of the arrhythmia.
S_MAJORITY = (0.3, 0.8)
MIN_S_BEATS = 30  # S beats that a record needs for its copies; medians of fewer beats are chance

PACED = "/"  # EC57 leaves records with paced beats out of algorithm scoring
PATIENTS = {"202": "201"}  # of records named otherwise: both are of the same man (directory of the database)
# Inter-patient split of de Chazal, O'Dwyer & Reilly, IEEE Trans. Biomed. Eng. 51(7):1196-1206, 2004.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()
LICENCE = "Open Data Commons Attribution License v1.0"
SOURCE = "MIT-BIH Arrhythmia Database 1.0.0, PhysioNet, doi:10.13026/C2F305"


# -------------------------------------------------------------------------------------------------- records to features
@dataclass(frozen=True, eq=False)
class Record:
    """A record's usable beats, followed by those of its copies, which have names of their own."""

    leads: list[str]
    beats: pd.DataFrame  # record, patient, sample, symbol, aami, and whether it is of a copy
    X: np.ndarray  # (len(beats), 32) float32, unscaled
    dropped: dict[str, int]  # beats that are left out, by reason
    noted: dict[str, int]  # other oddities
    paced: bool  # whether any beat is


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
    path: str, features: str = "relative", s_majority: Sequence[float] = (), seed: int = cli.SEED
) -> Record | str:
    """Read a record and compute its features, or return why it cannot be used (one lead, no annotations, flat signal).

    features: a name of FEATURE_SETS; s_majority: ratios of N to S beats, for each of which a record of DS1 with at
    least MIN_S_BEATS gets a copy with the relative features of choose_s_majority's beats alone; seed: of that draw.
    Marks of one beat, as of two leads, count once; a beat that is marked as two classes is dropped, but counts for the
    RR intervals beside it. Raises InputError for a record that cannot be read (truncated, not WFDB).
    """
    from wfdb.io.annotation import ann_label_table

    name = Path(path).name
    try:
        signal, fs, leads = ecg.read_signal(path)
        if not Path(f"{path}.atr").exists():
            raise ecg.Unsuited("has no annotation file (.atr)")
        annotations, unsorted = ecg.read_annotations(path, fs)
        marks, outside = ecg.find_beats(annotations, len(signal))
    except ecg.Unsuited as reason:
        return str(reason)
    except Exception as error:  # wfdb and soundfile raise a dozen unrelated types on damaged files
        why = f"cannot be read as a WFDB record, truncated or damaged ({cli.first_line(error)})"
        raise InputError(f"{path}: {why}; get a new copy of its .hea, .dat and .atr") from None
    times, aami = marks["time"].to_numpy(int), marks["symbol"].map(ecg.CLASS_OF_SYMBOL).to_numpy()
    breaks, single = ecg.find_breaks(annotations), ecg.single_beats(times, fs)
    try:
        X, index, dropped = FEATURE_SETS[features][0](signal, fs, times, breaks)
    except ValueError as error:
        return str(error)
    owner = np.searchsorted(single, np.arange(len(times)), side="right")  # which single beat each mark is of
    place = np.searchsorted(single, index)
    agreed = (pd.Series(aami).groupby(owner).nunique().to_numpy() == 1)[place]
    unknown = ~np.pad(ecg.rr_known(signal, fs, times[single], breaks), 1, constant_values=True)
    beside = (unknown[:-1] | unknown[1:])[place] & agreed
    undefined = ~annotations["symbol"].isin([*ecg.CLASS_OF_SYMBOL, *ann_label_table["symbol"]])
    X, index = X[agreed], index[agreed]
    beats = pd.DataFrame({"record": name, "patient": PATIENTS.get(name, name), "sample": times[index]})
    beats = beats.assign(symbol=marks["symbol"].to_numpy()[index], aami=aami[index], copy=False)
    tables, columns = [beats], [X]
    for ratio in s_majority if name in DS1 and (beats["aami"] == "S").sum() >= MIN_S_BEATS else ():
        chosen = choose_s_majority(aami[index], ratio, np.random.default_rng([seed, *name.encode()]))
        with contextlib.suppress(ValueError):  # these beats alone may have no RR interval; then there is no copy
            columns.append(ecg.beat_features(signal, fs, times, breaks, only=index[chosen])[0])
            tables.append(beats.iloc[chosen].assign(record=f"{name}{COPY}{ratio:g}", copy=True))
    dropped |= {"annotated as two classes": int((~agreed).sum()), "outside the signal": outside}
    noted = {
        "usable beats beside a time that is no RR interval": int(beside.sum()),
        "annotations of a code that WFDB does not define": int(undefined.sum()),
        "annotations out of order": unsorted,
    }
    paced = bool((marks["symbol"] == PACED).any())
    return Record(leads, pd.concat(tables, ignore_index=True), np.concatenate(columns), dropped, noted, paced)


# ----------------------------------------------------------------------------------------------- features to a data set
def draw_balanced(aami: np.ndarray, abnormal: Sequence[str], limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Rising indices of as many normal as abnormal beats, at most `limit` a class (None: no limit).

    Every S, V and F beat is taken while they fit; Q beats (unclassifiable, mostly paced) only fill up.
    """
    normal = np.flatnonzero(aami == "N")
    certain = np.flatnonzero(np.isin(aami, [c for c in abnormal if c != "Q"]))
    filler = np.flatnonzero(aami == "Q") if "Q" in abnormal else certain[:0]
    size = min(len(normal), len(certain) + len(filler), len(aami) if limit is None else limit)
    certain = rng.permutation(certain)[:size]
    filler = rng.permutation(filler)[: size - len(certain)]
    return np.sort(np.concatenate([rng.permutation(normal)[:size], certain, filler]))


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
    """Row indices: every beat of `abnormal` and N, once; whole DS1 patients for validation, DS2 for the test.

    Behind the training rows come those of the copies of their records.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    wanted = beats["aami"].isin(["N", *abnormal])
    ds1 = np.flatnonzero(wanted & beats["record"].isin(DS1))
    test = np.flatnonzero(wanted & beats["record"].isin(DS2))
    patient, aami = beats["patient"].to_numpy(), beats["aami"].to_numpy()
    folds = min(round(1 / VAL_SHARE), len(set(patient[ds1])))
    if folds < 2 or not len(test):
        raise InputError(
            "the inter-patient split needs two records of DS1 and one of DS2 (see this script); use --split random"
        )
    folds = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # F and Q are rare; that is known
        train, val = next(folds.split(ds1, aami[ds1], patient[ds1]))
    train, val = ds1[train], ds1[val]
    copies = np.flatnonzero(beats["copy"] & np.isin(patient, patient[train]))
    return {"train": np.concatenate([train, copies]), "val": val, "test": test}


# ---------------------------------------------------------------------------------------------------------- the command
def per_class(text: str) -> int | None:
    """argparse type: a positive number of beats, or None for 'all'."""
    return None if text == "all" else cli.positive_int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options. Exits with 2 where they contradict each other."""
    parser = cli.make_parser(__doc__)
    option = parser.add_argument
    option("--records-dir", type=Path, default=cli.ROOT / "data" / "mitdb", help="folder of the WFDB records")
    option("--no-download", action="store_true", help="refuse when records are missing")
    option("--features", choices=FEATURE_SETS, default="relative", help="relative to the recording, or as published")
    option("--abnormal", nargs="+", choices=list("SVFQ"), default=list("SVFQ"), help="AAMI classes labelled 1")
    option("--exclude-paced", action="store_true", help="leave out records with paced beats, as EC57 does")
    what = "most beats of a label in the random split, or 'all'"
    option("--per-class", type=per_class, default=BEATS_PER_CLASS, help=what)
    option("--split", choices=("random", "inter-patient"), default="random", help="beats or whole patients")
    what = "N beats for each S beat in copies of inter-patient training records; without a number: no copies"
    ratios = list(S_MAJORITY)
    option("--s-majority", nargs="*", type=cli.positive_float, default=ratios, metavar="RATIO", help=what)
    option("--workers", type=cli.positive_int, default=cli.cores(), help="processes that read records")
    args = parser.parse_args(argv)
    if args.split == "inter-patient" and args.per_class != BEATS_PER_CLASS:
        parser.error("--per-class: the inter-patient split has all beats; --split random draws")
    if not (args.split == "inter-patient" and args.features == "relative" and "S" in args.abnormal):
        if args.s_majority != ratios:
            parser.error("--s-majority needs --split inter-patient, --features relative and S in --abnormal")
        args.s_majority = []
    return args


def read_all(paths: list[str], args: argparse.Namespace) -> tuple[dict[str, Record], dict[str, str]]:
    """The usable records by name, and why others are left out; both are said on stderr where it matters."""
    from tqdm import tqdm

    read = functools.partial(read_record, features=args.features, s_majority=args.s_majority, seed=args.seed)
    with ProcessPoolExecutor(max(1, min(args.workers, len(paths)))) as pool:
        results = list(tqdm(pool.map(read, paths), total=len(paths), desc="reading", unit="record"))
    by_name = dict(zip((Path(path).name for path in paths), results))
    left_out = {name: result for name, result in by_name.items() if isinstance(result, str)}
    for name, reason in left_out.items():
        print(f"record {name} is left out: it {reason}", file=sys.stderr)
    records = {name: result for name, result in by_name.items() if name not in left_out}
    records = {name: record for name, record in records.items() if not (args.exclude_paced and record.paced)}
    if not records:
        raise InputError("no usable record is left; see --records-dir and --exclude-paced")
    expected = " and ".join(" or ".join(names) for names in ecg.EXPECTED_LEADS.values())
    for name, record in records.items():
        if not ecg.are_expected(record.leads):
            leads = " and ".join(lead or "an unnamed one" for lead in record.leads)
            print(f"record {name} has the leads {leads}, not {expected}", file=sys.stderr)
    return records, left_out


def write_dataset(
    data_dir: Path, beats: pd.DataFrame, X: np.ndarray, rows: dict[str, np.ndarray], recipe: dict[str, Any]
) -> pd.DataFrame:
    """Scale, write the arrays, beats.csv and dataset.json, all or none, and return the counts by split and class."""
    by_draw = recipe["split"] == "inter-patient"  # its training part is balanced by a draw, the random one by itself
    scaler = fit_scaler(X[rows["train"]], draw_probability(beats.iloc[rows["train"]]) if by_draw else None)
    table = pd.concat([beats.iloc[rows[s]].assign(split=s) for s in SPLITS])
    columns = ["split", "record", "patient", "sample", "symbol", "aami"]
    contents = {BEATS: table[columns].to_csv(index=False).encode()}
    for split in SPLITS:
        label = (beats["aami"].to_numpy()[rows[split]] != "N").astype(np.float32)
        for kind, array in (("X", apply_scaler(X[rows[split]], scaler)), ("y", label)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            contents[array_name(split, kind)] = buffer.getvalue()
    classes = list(ecg.AAMI_CLASSES)
    counts = pd.crosstab(table["split"], table["aami"]).reindex(index=SPLITS, columns=classes, fill_value=0)
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
            stack.enter_context(cli.whole_file(data_dir / name)).write_bytes(content)
    return counts


def describe(args: argparse.Namespace, records: dict[str, Record], left_out: dict[str, str]) -> dict[str, Any]:
    """The recipe that dataset.json states."""
    dropped, noted = (pd.DataFrame([getattr(r, kind) for r in records.values()]).sum() for kind in ("dropped", "noted"))
    return {
        "features": args.features,
        "abnormal": sorted(args.abnormal, key="SVFQ".index),
        "exclude_paced": args.exclude_paced,
        "per_class": args.per_class if args.split == "random" and args.per_class else "all",
        "split": args.split,
        "seed": args.seed,
        "records": list(records),
        "records_left_out": left_out,
        "beats_dropped": dropped.to_dict(),
        "noted": noted.to_dict(),
        "leads_expected": ecg.EXPECTED_LEADS,
        "records_with_other_leads": [name for name, r in records.items() if not ecg.are_expected(r.leads)],
        "leads": {name: r.leads for name, r in records.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Build the data set."""
    args = parse(argv)
    cli.check_writable(args.data_dir)
    started = time.monotonic()
    records, left_out = read_all(ecg.provide_records(args.records_dir, not args.no_download), args)
    beats = pd.concat([r.beats for r in records.values()], ignore_index=True)
    X = np.concatenate([r.X for r in records.values()])
    recipe = describe(args, records, left_out)
    if args.split == "inter-patient":
        rows = split_inter_patient(beats, args.abnormal, args.seed)
        copies = beats.iloc[rows["train"]].query("copy")["record"]
        recipe |= {"s_majority": args.s_majority, "s_majority_copies": list(copies.unique())}
    else:
        rows, copies = split_random(beats, args.abnormal, args.per_class, args.seed), ()
    for split in SPLITS:
        if beats["aami"].iloc[rows[split]].eq("N").nunique() < 2:
            raise InputError(f"the {split} part has only one label; give more records, or other --abnormal classes")
    counts = write_dataset(args.data_dir, beats, X, rows, recipe)
    counts["rows"] = counts.sum(axis=1)
    others = beats["record"].isin(recipe["records_with_other_leads"])
    counts["of other leads"] = [int(others[rows[split]].sum()) for split in SPLITS]
    counts.loc["all"] = counts.sum()
    print(f"\n{counts.to_string()}\n")
    dropped = ", ".join(f"{count} {reason}" for reason, count in recipe["beats_dropped"].items())
    print(f"{len(records)} records, {(~beats['copy']).sum()} usable beats; dropped: {dropped}")
    if len(copies):
        names = ", ".join(recipe["s_majority_copies"])
        print(f"train has {len(copies)} rows of copies in which S beats are many: {names}")
    for what, count in recipe["noted"].items():
        if count:
            print(f"{count} {what}")
    available = counts.loc["all", "rows"] // 2
    if args.split == "random" and args.per_class and available < args.per_class:
        print(f"only {available} beats of the rarer label are there, fewer than --per-class {args.per_class}")
    print(f"wrote six arrays, beats.csv and dataset.json to {args.data_dir} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    cli.run(main)
