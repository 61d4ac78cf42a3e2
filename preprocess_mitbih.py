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
from fhe_mlp.dataset import BEATS, COPY, DESCRIPTION, SPLITS, array_name, draw_probability, foreign_files
from fhe_mlp.scaling import apply_scaler, fit_scaler

# By name: what computes the columns, and their table.
FEATURE_SETS = {"relative": (ecg.beat_features, ecg.FEATURES), "published": (ecg.published_features, ecg.PUBLISHED)}
BEATS_PER_CLASS = 12_074  # the methodology's 24,148 beats are 2 x 12,074
TEST_SHARE, VAL_SHARE = 0.30, 0.20  # of all beats; of the beats that are left (as published)
# N beats for each S beat in the copies of a record in which S is the majority or nearly so. DS1 has no such patient;
# DS2 has one, 232, and there the medians that features are measured against are those of the arrhythmia.
S_MAJORITY = [0.3, 0.8]
MIN_S_BEATS = 30  # S beats that a record needs for its copies; medians of fewer beats are chance
PACED = "/"  # EC57 leaves records with paced beats out of algorithm scoring
PATIENTS = {"202": "201"}  # of records named otherwise: both are of the same man (directory of the database)


@dataclass(frozen=True, eq=False)
class Record:
    """A record's usable beats, followed by those of its copies, which have names of their own."""

    leads: list[str]
    beats: pd.DataFrame  # record, patient, sample, symbol, aami, whether it is of a copy, and more
    X: np.ndarray  # (len(beats), 32) float32, unscaled
    dropped: dict[str, int]  # beats that are left out, by reason
    noted: dict[str, int]  # other oddities
    paced: bool  # whether any beat is


def choose_s_majority(aami: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Rising positions in aami (m,), in the order of time, of all S beats and `ratio` times as many N beats, if there.

    N beats right after an S beat are drawn first: their RR intervals are those of a record full of S beats.
    """
    s, n = np.flatnonzero(aami == "S"), np.flatnonzero(aami == "N")
    after_s = np.isin(n - 1, s)
    drawn = np.concatenate([rng.permutation(n[after_s]), rng.permutation(n[~after_s])])
    return np.sort(np.concatenate([s, drawn[: round(min(ratio * len(s), len(n)))]]))


def read_record(
    path: str, features: str = "relative", s_majority: Sequence[float] = (), seed: int = cli.SEED
) -> Record | str:
    """Read a record and compute its features, or return why it cannot be used (one lead, no annotations, flat signal).

    s_majority: ratios of N to S beats, for each of which a record of DS1 with at least MIN_S_BEATS gets a copy with the
    relative features of choose_s_majority's beats alone; seed: of that draw. Marks of one beat, as of two leads, count
    once; a beat that is marked as two classes is dropped, but counts for the RR intervals beside it. Raises InputError
    for a record that cannot be read (truncated, not WFDB).
    """
    from wfdb.io.annotation import ann_label_table

    name = Path(path).name
    try:
        signal, fs, leads = ecg.read_signal(path)
        if not ecg.beside(path, "atr").exists():
            raise ecg.Unsuited("has no annotation file (.atr)")
        annotations, unsorted = ecg.read_annotations(path, fs)
        marks, outside = ecg.find_beats(annotations, len(signal))
    except ecg.Unsuited as reason:
        return str(reason)
    except Exception as error:  # wfdb and soundfile raise a dozen unrelated types on damaged files
        why = f"cannot be read as a WFDB record, truncated or damaged ({cli.first_line(error)})"
        raise cli.InputError(f"{path}: {why}; get a new copy of its .hea, .dat and .atr") from None
    times, breaks = marks["time"].to_numpy(int), ecg.find_breaks(annotations)
    try:
        X, index, dropped = FEATURE_SETS[features][0](signal, fs, times, breaks)
    except ecg.Unsuited as reason:
        return str(reason)
    single = ecg.single_beats(times, fs)
    owner = np.searchsorted(single, np.arange(len(times)), side="right")  # which single beat each mark is of
    place = np.searchsorted(single, index)
    agreed = (marks["aami"].groupby(owner).nunique().to_numpy() == 1)[place]
    unknown = ~np.pad(ecg.rr_known(signal, fs, times[single], breaks), 1, constant_values=True)
    beside = (unknown[:-1] | unknown[1:])[place] & agreed
    undefined = ~annotations["symbol"].isin([*ecg.CLASS_OF_SYMBOL, *ann_label_table["symbol"]])
    X, index = X[agreed], index[agreed]
    beats = marks.assign(record=name, patient=PATIENTS.get(name, name), sample=times, copy=False).iloc[index]
    tables, columns = [beats], [X]
    for ratio in s_majority if name in ecg.DS1 and (beats["aami"] == "S").sum() >= MIN_S_BEATS else ():
        chosen = choose_s_majority(beats["aami"].to_numpy(), ratio, np.random.default_rng([seed, *name.encode()]))
        with contextlib.suppress(ecg.Unsuited):  # these beats alone may have no RR interval; then there is no copy
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


def draw_balanced(aami: np.ndarray, abnormal: Sequence[str], limit: int, rng: np.random.Generator) -> np.ndarray:
    """Rising indices of as many normal as abnormal beats, at most `limit` of each.

    Every S, V and F beat is taken while they fit; Q beats (unclassifiable, mostly paced) only fill up.
    """
    certain = rng.permutation(np.flatnonzero(np.isin(aami, [c for c in abnormal if c != "Q"])))
    filler = rng.permutation(np.flatnonzero((aami == "Q") & ("Q" in abnormal)))
    normal, drawn = rng.permutation(np.flatnonzero(aami == "N")), np.concatenate([certain, filler])
    size = min(len(normal), len(drawn), limit)
    return np.sort(np.concatenate([normal[:size], drawn[:size]]))


def split_random(beats: pd.DataFrame, abnormal: Sequence[str], limit: int, seed: int) -> dict[str, np.ndarray]:
    """Row indices of the published split: beats of one patient may lie on both sides."""
    from sklearn.model_selection import train_test_split

    chosen = draw_balanced(beats["aami"].to_numpy(), abnormal, limit, np.random.default_rng(seed))
    label = (beats["aami"] != "N").to_numpy()
    try:
        rest, test = train_test_split(chosen, test_size=TEST_SHARE, stratify=label[chosen], random_state=seed)
        train, val = train_test_split(rest, test_size=VAL_SHARE, stratify=label[rest], random_state=seed)
    except ValueError:
        what = f"only {len(chosen)} beats in two classes can be drawn, too few to split"
        raise cli.InputError(f"{what}; give more records or classes") from None
    return {"train": train, "val": val, "test": test}


def split_inter_patient(beats: pd.DataFrame, abnormal: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Row indices: every beat of `abnormal` and N, once; whole DS1 patients for validation, DS2 for the test.

    Behind the training rows come those of the copies of their records.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    wanted = beats["aami"].isin(["N", *abnormal])
    ds1 = np.flatnonzero(wanted & beats["record"].isin(ecg.DS1))
    test = np.flatnonzero(wanted & beats["record"].isin(ecg.DS2))
    patient, aami = beats["patient"].to_numpy(), beats["aami"].to_numpy()
    folds = min(round(1 / VAL_SHARE), len(set(patient[ds1])))
    if folds < 2 or not len(test):
        raise cli.InputError("the inter-patient split needs two records of DS1 and one of DS2; use --split random")
    folds = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # F and Q are rare; that is known
        train, val = (ds1[fold] for fold in next(folds.split(ds1, aami[ds1], patient[ds1])))
    copies = np.flatnonzero(beats["copy"] & np.isin(patient, patient[train]))
    return {"train": np.concatenate([train, copies]), "val": val, "test": test}


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
    option("--per-class", type=lambda n: n if n == "all" else cli.positive_int(n), default=BEATS_PER_CLASS, help=what)
    option("--split", choices=("random", "inter-patient"), default="random", help="beats or whole patients")
    what = "N beats for each S beat in copies of inter-patient training records; without a number: no copies"
    option("--s-majority", nargs="*", type=cli.positive_float, default=S_MAJORITY, metavar="RATIO", help=what)
    option("--workers", type=cli.positive_int, default=cli.cores(), help="processes that read records")
    args = parser.parse_args(argv)
    args.abnormal = sorted(args.abnormal, key="SVFQ".index)
    if args.split == "inter-patient":
        if args.per_class != BEATS_PER_CLASS:
            parser.error("--per-class: the inter-patient split has all beats; --split random draws")
        args.per_class = "all"
    if not (args.split == "inter-patient" and args.features == "relative" and "S" in args.abnormal):
        if args.s_majority != S_MAJORITY:
            parser.error("--s-majority needs --split inter-patient, --features relative and S in --abnormal")
        args.s_majority = []
    return args


def read_all(paths: list[str], args: argparse.Namespace) -> tuple[dict[str, Record], dict[str, Any]]:
    """Return the usable records by name and the recipe of dataset.json; warn on stderr of others and of other leads."""
    from tqdm import tqdm

    read = functools.partial(read_record, features=args.features, s_majority=args.s_majority, seed=args.seed)
    with ProcessPoolExecutor(max(1, min(args.workers, len(paths)))) as pool:
        results = list(tqdm(pool.map(read, paths), total=len(paths), desc="reading", unit="record"))
    records, left_out, other_leads = {}, {}, []
    expected = " and ".join(" or ".join(names) for names in ecg.EXPECTED_LEADS.values())
    for name, result in zip((Path(path).name for path in paths), results):
        if isinstance(result, str):
            left_out[name] = result
            print(f"record {name} is left out: it {result}", file=sys.stderr)
        elif not (args.exclude_paced and result.paced):
            records[name] = result
            if not ecg.are_expected(result.leads):
                other_leads.append(name)
                leads = " and ".join(lead or "an unnamed one" for lead in result.leads)
                print(f"record {name} has the leads {leads}, not {expected}", file=sys.stderr)
    if not records:
        raise cli.InputError("no usable record is left; see --records-dir and --exclude-paced")
    dropped, noted = (pd.DataFrame([getattr(r, kind) for r in records.values()]).sum() for kind in ("dropped", "noted"))
    return records, {
        **{key: getattr(args, key) for key in ("features", "abnormal", "exclude_paced", "per_class", "split", "seed")},
        "records": list(records),
        "records_left_out": left_out,
        "beats_dropped": dropped.to_dict(),
        "noted": noted.to_dict(),
        "leads_expected": ecg.EXPECTED_LEADS,
        "records_with_other_leads": other_leads,
        "leads": {name: r.leads for name, r in records.items()},
    }


def write_dataset(
    data_dir: Path, beats: pd.DataFrame, X: np.ndarray, rows: dict[str, np.ndarray], recipe: dict[str, Any]
) -> pd.DataFrame:
    """Scale, write the arrays, beats.csv and dataset.json, all or none, and return the counts by split and class."""
    by_draw = recipe["split"] == "inter-patient"  # its training part is balanced by a draw, the random one by itself
    scaler = fit_scaler(X[rows["train"]], draw_probability(beats.iloc[rows["train"]]) if by_draw else None)
    table = pd.concat([beats.iloc[rows[s]].assign(split=s) for s in SPLITS])
    counts = pd.crosstab(table["split"], table["aami"]).reindex(index=SPLITS, columns=list("NSVFQ"), fill_value=0)
    with contextlib.ExitStack() as stack:  # all are written before the first takes its place
        paths = {BEATS: stack.enter_context(cli.whole_file(data_dir / BEATS))}
        table[["split", "record", "patient", "sample", "symbol", "aami"]].to_csv(paths[BEATS], index=False)
        for split in SPLITS:
            label = (beats["aami"].iloc[rows[split]] != "N").to_numpy(np.float32)
            for kind, array in (("X", apply_scaler(X[rows[split]], scaler)), ("y", label)):
                name = array_name(split, kind)
                paths[name] = stack.enter_context(cli.whole_file(data_dir / name))
                np.save(paths[name], array)
        description = {
            "source": "MIT-BIH Arrhythmia Database 1.0.0, PhysioNet, doi:10.13026/C2F305",
            "licence": "Open Data Commons Attribution License v1.0",
            "recipe": recipe,
            "counts": counts.to_dict("index"),
            "features": FEATURE_SETS[recipe["features"]][1],
            "scaler": scaler,
            "sha256": {name: cli.sha256(path) for name, path in paths.items()},
        }
        cli.write_json(data_dir / DESCRIPTION, description)
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Build the data set."""
    args = parse(argv)
    if foreign := foreign_files(args.data_dir):
        what = f"holds {foreign[0]}, which is others' or was changed, and which this step does not replace"
        raise cli.InputError(f"{args.data_dir}: {what}; name another --data-dir, or move it away")
    cli.check_writable(args.data_dir)
    started = time.monotonic()
    records, recipe = read_all(ecg.provide_records(args.records_dir, not args.no_download), args)
    beats = pd.concat([r.beats for r in records.values()], ignore_index=True)
    X = np.concatenate([r.X for r in records.values()])
    if args.split == "inter-patient":
        rows = split_inter_patient(beats, args.abnormal, args.seed)
        copies = beats.iloc[rows["train"]].query("copy")["record"]
        recipe |= {"s_majority": args.s_majority, "s_majority_copies": list(copies.unique())}
    else:
        limit = len(beats) if args.per_class == "all" else args.per_class
        rows, copies = split_random(beats, args.abnormal, limit, args.seed), ()
    for split in SPLITS:
        if beats["aami"].iloc[rows[split]].eq("N").nunique() < 2:
            raise cli.InputError(f"the {split} part has only one label; give more records, or other --abnormal classes")
    counts = write_dataset(args.data_dir, beats, X, rows, recipe)
    counts["rows"] = counts.sum(axis=1)
    others = beats["record"].isin(recipe["records_with_other_leads"])
    counts["of other leads"] = [others[rows[split]].sum() for split in SPLITS]
    counts.loc["all"] = counts.sum()
    print(f"\n{counts.to_string()}\n")
    dropped = ", ".join(f"{count} {reason}" for reason, count in recipe["beats_dropped"].items())
    print(f"{len(records)} records, {(~beats['copy']).sum()} usable beats; dropped: {dropped}")
    if len(copies):
        print(f"train has {len(copies)} rows of copies in which S beats are many: {', '.join(copies.unique())}")
    for what, count in recipe["noted"].items():
        if count:
            print(f"{count} {what}")
    if args.per_class != "all" and (available := counts.loc["all", "rows"] // 2) < args.per_class:
        print(f"only {available} beats of the rarer label are there, fewer than --per-class {args.per_class}")
    print(f"wrote six arrays, beats.csv and dataset.json to {args.data_dir} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    cli.run(main)
