"""Turn the MIT-BIH Arrhythmia Database into a balanced binary data set of 32 features a beat.

Reads   WFDB records (.hea, .dat, .atr) from --records-dir; missing ones are downloaded from PhysioNet.
Writes  to --data-dir: Arryth_MITBIH_{train,val,test}_{X,y}.npy (float32), beats.csv (which beat each row
        is) and dataset.json (recipe, counts, features, scaler, checksums).
Run     python preprocess_mitbih.py
        python preprocess_mitbih.py --abnormal S V F --exclude-paced --per-class all   (the published arrays)
        python preprocess_mitbih.py --abnormal S V F --split inter-patient             (unseen patients)

The other scripts get their arrays through load_arrays.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.common import (
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

SPLITS = ("train", "val", "test")
DATABASE = "mitdb/1.0.0"  # PhysioNet name and version, for the download
DOWNLOAD_ATTEMPTS = 3  # tries a file before giving up; finished files are kept
BEATS_PER_CLASS = 12_074  # the methodology's 24,148 beats are 2 x 12,074
TEST_SHARE, VAL_SHARE = 0.30, 0.20  # of all beats; of the beats that are left (as published)
CLIP_SD = 3.0  # standard deviations; artefacts of 20 sd would waste the few bits of the encrypted model

# Beat symbols by class, ANSI/AAMI EC57; other annotation symbols mark no beat.
AAMI_CLASSES = {"N": "NLRej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASS_OF_SYMBOL = {symbol: name for name, symbols in AAMI_CLASSES.items() for symbol in symbols}
PACED = "/"  # EC57 leaves records with paced beats out of algorithm scoring
# Inter-patient split of de Chazal, O'Dwyer & Reilly, IEEE Trans. Biomed. Eng. 51(7):1196-1206, 2004.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()

BAND_HZ = (0.5, 40.0)  # baseline wander below, muscle and mains noise above
MIN_FS_HZ = 100.0  # the band's upper edge needs more than 80 Hz
# Search windows in seconds; P, R, T and the QRS complex around the annotated beat, Q and S around the R peak.
R_WINDOW, Q_WINDOW, S_WINDOW = (-0.05, 0.05), (-0.10, 0.0), (0.0, 0.12)
P_WINDOW, T_WINDOW, QRS_WINDOW = (-0.28, -0.08), (0.14, 0.45), (-0.12, 0.18)
MORPHOLOGY_S = (-0.06, -0.03, 0.03, 0.06, 0.09)  # where the five QRS samples are taken
RR_HISTORY = 10  # intervals whose mean is the rhythm that a beat is compared with

# Name, unit and formula; x is the band-passed lead, RR10 the mean of the last ten RR intervals up to the beat,
# A the record's median peak-to-peak amplitude of x in QRS_WINDOW ("1" marks quantities relative to the patient).
_RHYTHM = [
    ("pre_RR", "1", "R[i] - R[i-1], over RR10"),
    ("post_RR", "1", "R[i+1] - R[i], over RR10"),
]
_CONTEXT = [  # in place of the two RR columns that the published arrays repeat for their second channel
    ("mean_RR", "s", "RR10 itself: the patient's rhythm"),
    ("template_corr", "1", "correlation of the QRS complex with the record's median one, mean of both leads"),
]
_LEAD = [
    ("P_peak", "1", "max of x in P_WINDOW, over A"),
    ("T_peak", "1", "max of x in T_WINDOW, over A"),
    ("R_peak", "1", "max of x in R_WINDOW, over A"),
    ("S_peak", "1", "min of x in S_WINDOW after the R peak, over A"),
    ("Q_peak", "1", "min of x in Q_WINDOW before the R peak, over A"),
    ("QRS_interval", "s", "time from Q peak to S peak"),
    ("PQ_interval", "s", "time from P peak to Q peak"),
    ("QT_interval", "s", "time from Q peak to T peak"),
    ("ST_interval", "s", "time from S peak to T peak"),
    *(
        (f"QRS_morph_{k}", "1", f"x at {t * 1000:+.0f} ms from the annotation, over A")
        for k, t in enumerate(MORPHOLOGY_S)
    ),
]
FEATURES = [
    {"name": f"ch{channel}_{name}", "unit": unit, "formula": formula}
    for channel, first in enumerate((_RHYTHM, _CONTEXT))
    for name, unit, formula in (*first, *_LEAD)
]
LICENCE = "Open Data Commons Attribution License v1.0"
SOURCE = "MIT-BIH Arrhythmia Database 1.0.0, PhysioNet, doi:10.13026/C2F305"


# -------------------------------------------------------------------------------------------------- records to features
def find_extremum(
    x: np.ndarray, centre: np.ndarray, window: tuple[float, float], fs: float, pick: Callable
) -> np.ndarray:
    """Sample index (n,) of the extremum `pick` (np.argmax, np.argmin) of x in a window (s) around each centre."""
    offsets = np.arange(round(window[0] * fs), round(window[1] * fs) + 1)
    return centre + offsets[pick(x[centre[:, None] + offsets], axis=1)]


def lead_features(x: np.ndarray, beats: np.ndarray, fs: float) -> tuple[np.ndarray, np.ndarray]:
    """Features of one lead: (n, 14) in the order of _LEAD, and (n,) correlation with the median QRS complex.

    x: band-passed lead in mV, (samples,); beats: annotated samples (n,). Raises ValueError for a flat lead.
    """
    r = find_extremum(x, beats, R_WINDOW, fs, np.argmax)
    q = find_extremum(x, r, Q_WINDOW, fs, np.argmin)
    s = find_extremum(x, r, S_WINDOW, fs, np.argmin)
    p = find_extremum(x, beats, P_WINDOW, fs, np.argmax)
    t = find_extremum(x, beats, T_WINDOW, fs, np.argmax)
    complexes = x[beats[:, None] + np.arange(round(QRS_WINDOW[0] * fs), round(QRS_WINDOW[1] * fs) + 1)]
    amplitude = np.median(np.ptp(complexes, axis=1))
    template = np.median(complexes, axis=0)
    template -= template.mean()
    complexes = complexes - complexes.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.sum(complexes**2, axis=1) * np.sum(template**2))
    if not amplitude > 0 or not np.all(norms > 0):
        raise ValueError("has a flat signal")
    morphology = x[beats[:, None] + np.rint(np.array(MORPHOLOGY_S) * fs).astype(int)]
    peaks = np.column_stack([x[p], x[t], x[r], x[s], x[q]])
    intervals = np.column_stack([s - q, q - p, t - q, t - s]) / fs
    return np.hstack([peaks / amplitude, intervals, morphology / amplitude]), (complexes * template).sum(axis=1) / norms


def beat_features(signal: np.ndarray, fs: float, beats: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """All features of a record's usable beats.

    signal: two leads in mV, (samples, 2), NaN where missing; fs in Hz; beats: annotated samples (n,), rising.
    Returns features (m, 32) float32, the indices (m,) of the usable beats, and the dropped ones counted by reason.
    Raises ValueError when the record cannot be used at all.
    """
    from scipy.signal import butter, sosfiltfilt

    if len(beats) < 3:
        raise ValueError("has fewer than three beat annotations")
    before, after = round(min(P_WINDOW[0], R_WINDOW[0] + Q_WINDOW[0]) * fs), round(T_WINDOW[1] * fs)
    missing = ~np.isfinite(signal)
    if missing.all(axis=0).any():
        raise ValueError("has a missing signal")
    samples = np.arange(len(signal))
    filled = np.column_stack([np.interp(samples, samples[~m], x[~m]) for x, m in zip(signal.T, missing.T)])
    if (np.ptp(filled, axis=0) == 0).any():
        raise ValueError("has a flat signal")

    rr = np.diff(beats) / fs
    index = np.arange(1, len(beats) - 1)
    dropped = {"first or last beat": 2}
    apart = (rr[index - 1] > 0) & (rr[index] > 0)
    dropped["annotated twice or out of order"] = int((~apart).sum())
    index = index[apart]
    inside = (beats[index] + before >= 0) & (beats[index] + after < len(signal))
    dropped["window leaves the record"] = int((~inside).sum())
    index = index[inside]
    windows = beats[index, None] + np.arange(before, after + 1)
    whole = np.ones(len(index), bool)
    for x, m in zip(filled.T, missing.T):
        whole &= ~m[windows].any(axis=1) & (np.ptp(x[windows], axis=1) > 0)
    dropped["signal missing or flat"] = int((~whole).sum())
    index = index[whole]
    if not len(index):
        raise ValueError("has no usable beat")

    elapsed = np.concatenate([[0.0], np.cumsum(rr)])
    start = np.maximum(index - RR_HISTORY, 0)
    mean_rr = (elapsed[index] - elapsed[start]) / (index - start)
    leads = sosfiltfilt(butter(2, BAND_HZ, "bandpass", fs=fs, output="sos"), filled, axis=0).T
    (first, corr0), (second, corr1) = (lead_features(x, beats[index], fs) for x in leads)
    rhythm = np.column_stack([rr[index - 1] / mean_rr, rr[index] / mean_rr])
    context = np.column_stack([mean_rr, (corr0 + corr1) / 2])
    return np.hstack([rhythm, first, context, second]).astype(np.float32), index, dropped


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


def fit_scaler(X: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation of each column of the training part X (n, 32), and the clip in deviations."""
    sd = X.std(axis=0, dtype=np.float64)
    return {
        "mean": X.mean(axis=0, dtype=np.float64).tolist(),
        "sd": np.where(sd > 0, sd, 1.0).tolist(),
        "clip_sd": CLIP_SD,
    }


def apply_scaler(X: np.ndarray, scaler: dict[str, Any]) -> np.ndarray:
    """Standardised and clipped features, float32, of beats (n, 32) or of one new beat (32,)."""
    z = (X - np.array(scaler["mean"])) / np.array(scaler["sd"])
    return np.clip(z, -scaler["clip_sd"], scaler["clip_sd"]).astype(np.float32)


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


def load_arrays(data_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "val", "test": (X (n, 32) float32, y (n,) int64 of 0 and 1)}, checked.

    With dataset.json the arrays are already scaled and must have its checksums. Arrays made elsewhere come without it:
    they are standardised and clipped here with the statistics of their training part.
    Raises InputError for a missing, truncated, wrong-shaped, NaN-holding or foreign file.
    """
    remedy = f"make it with: python preprocess_mitbih.py --data-dir {data_dir}"
    arrays = {}
    for split in SPLITS:
        for kind, shape in (("X", (len(FEATURES),)), ("y", ())):
            path = data_dir / f"Arryth_MITBIH_{split}_{kind}.npy"
            try:
                with path.open("rb") as file:  # np.load would also take archives and pickles
                    array = np.lib.format.read_array(file, allow_pickle=False)
            except FileNotFoundError:
                raise InputError(f"{path}: not found; {remedy}") from None
            except Exception as error:  # the parser of NumPy's header raises a dozen unrelated types
                raise InputError(f"{path}: is no whole .npy array ({first_line(error)}); {remedy}") from None
            if array.dtype.kind not in "fiub":
                raise InputError(f"{path}: holds no numbers; {remedy}")
            if array.ndim != 1 + len(shape) or array.shape[1:] != shape or not len(array):
                raise InputError(
                    f"{path}: shape {array.shape}, expected (n{''.join(f', {k}' for k in shape)}); {remedy}"
                )
            with np.errstate(over="ignore"):
                if not np.isfinite(array.astype(np.float32)).all():
                    raise InputError(f"{path}: holds NaN, infinity or numbers over 3e38; {remedy}")
            if kind == "y" and set(np.unique(array)) != {0, 1}:
                raise InputError(f"{path}: labels must be 0 and 1, both present; {remedy}")
            arrays[split, kind] = array
        if len(arrays[split, "X"]) != len(arrays[split, "y"]):
            raise InputError(f"{data_dir}: {split} X and y differ in length; {remedy}")
    description = data_dir / "dataset.json"
    if description.exists():
        for name, expected in load_description(data_dir)["sha256"].items():
            if not (data_dir / name).exists() or sha256(data_dir / name) != expected:
                raise InputError(f"{data_dir / name}: is not the file that dataset.json describes; {remedy}")
    else:
        scaler = fit_scaler(arrays["train", "X"])
        print(f"{data_dir} has no dataset.json: standardised with its training part, clipped to {CLIP_SD:g} sd")
        arrays.update({(s, "X"): apply_scaler(arrays[s, "X"], scaler) for s in SPLITS})
    return {s: (arrays[s, "X"].astype(np.float32), arrays[s, "y"].astype(np.int64)) for s in SPLITS}


def load_scaler(data_dir: Path) -> dict[str, Any]:
    """The scaler that load_arrays' features have gone through: dataset.json's or, without it, one fitted as there."""
    if (data_dir / "dataset.json").exists():
        return load_description(data_dir)["scaler"]
    return fit_scaler(np.load(data_dir / "Arryth_MITBIH_train_X.npy", allow_pickle=False))


def load_description(data_dir: Path) -> dict[str, Any]:
    """dataset.json as written by this script. Raises InputError when it is damaged."""
    path = data_dir / "dataset.json"
    try:
        description = json.loads(path.read_text())
        described = {f"Arryth_MITBIH_{split}_{kind}.npy" for split in SPLITS for kind in "Xy"}
        if not described <= set(dict(description["sha256"])):
            raise ValueError
        scaler = description["scaler"]
        if not np.isfinite([*scaler["mean"], *scaler["sd"], scaler["clip_sd"]]).all() or min(scaler["sd"]) <= 0:
            raise ValueError
        if not len(scaler["mean"]) == len(scaler["sd"]) == len(FEATURES):
            raise ValueError
        return description
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: damaged; make it with: python preprocess_mitbih.py --data-dir {data_dir}") from None


# ---------------------------------------------------------------------------------------------------------- the command
def write_dataset(
    data_dir: Path, beats: pd.DataFrame, X: np.ndarray, rows: dict[str, np.ndarray], recipe: dict[str, Any]
) -> pd.DataFrame:
    """Scale, write the arrays, beats.csv and dataset.json, all or none, and return the counts by split and class."""
    scaler = fit_scaler(X[rows["train"]])
    table = pd.concat([beats.iloc[rows[s]].assign(split=s) for s in SPLITS])
    contents = {"beats.csv": table[["split", "record", "sample", "symbol", "aami"]].to_csv(index=False).encode()}
    for split in SPLITS:
        label = (beats["aami"].to_numpy()[rows[split]] != "N").astype(np.float32)
        for kind, array in (("X", apply_scaler(X[rows[split]], scaler)), ("y", label)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            contents[f"Arryth_MITBIH_{split}_{kind}.npy"] = buffer.getvalue()
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
    contents["dataset.json"] = (json.dumps(description, indent=1) + "\n").encode()
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
