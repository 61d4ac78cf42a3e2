"""The client's recordings (WFDB, EDF, .csv files of two leads) and .csv files of features, as raw features of beats.

The .csv files come from many programs: commas, semicolons or tabs between columns; decimal points, or decimal commas
where no value has a point and some value cannot be a thousand. What has two meanings is refused with its line.
"""

import csv
import glob
import hashlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import ecg
from fhe_mlp.cli import InputError, first_line

DETECTOR = "gqrs"  # --annotator that stands for wfdb's detector of R peaks
PEAK_S, PEAK_BAND_HZ = (-0.05, 0.09), (5.0, 25.0)  # around its marks; where QRS complexes are strongest
SIZE_MV, SIZE_S, SIZE_SHARE = 1.0, 2.0, 0.9  # of 9 in 10 such stretches, the largest value in that band is below
T_WAVE_S, T_WAVE_SIZE = 0.36, 0.25  # a mark so soon after another (Pan & Tompkins 1985) and so much smaller is a T wave
PACED = "/f"  # WFDB codes of paced beats, and of fusions with them
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # float() would also take 1_000, nan and inf
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)  # 1,234: a thousand or a decimal, nobody can say
COLUMN = re.compile(r"(.*?)(?:\s*[\[(]\s*(\S+)\s*[\])])?", re.DOTALL)  # lead and unit: MLII (uV), V1 [mV], V1
MAX_BYTES = 100_000_000  # of a .csv file, which takes 30 times as much memory
# A column of times by the letters of its name, which may end with its unit, and units in seconds.
TIME = re.compile(r"(?!$)((elapsed)?time(stamp)?|t)?(?P<unit>s|sec|seconds|ms|milliseconds|samples?)?")
SECONDS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "min": 60.0, "h": 3600.0}
SECONDS |= {"ms": 1e-3, "msec": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "ns": 1e-9}
DAY_S = 86_400.0
NO_ANNOTATIONS = {"hea", "dat", "edf", "csv", "fhe", "zip", "npz", "xlsx"}  # endings of other files, and of our own
Table = list[tuple[int, list[str]]]  # line number and cells of each row


@dataclass(frozen=True)
class Recording:
    """A recording whose beats are encrypted; stored as JSON, and all that decrypt needs of it."""

    identity: str  # of `identify`; in all files on the recording, none of which travels
    name: str
    path: str
    csv_fs: float | None  # Hz, of a .csv file; None for others
    title: str  # name, number of beats and origin of the R peaks: beginning of a sentence
    fs: float  # Hz
    leads: list[str]
    samples: list[int]  # of all beats, in the order of time
    classified: list[bool]  # whether each was encrypted
    reasons: str  # number of the others by reason, each behind a semicolon: end of a sentence


def find_recording(path: Path, fs: float | None) -> Path | None:
    """Return the path of a .csv file (where fs is given), .edf file or WFDB record (then without ending), else None."""
    if fs is not None or (path.suffix.lower() == ".edf" and path.is_file()):
        return path
    record = path.with_suffix("") if path.suffix.lower() in (".hea", ".dat") else path
    return record if ecg.beside(str(record), "hea").is_file() else None


def identify(signal: np.ndarray, fs: float, samples: Sequence[int]) -> str:
    """Return a digest of a recording: signal (n, 2) in mV at fs Hz, and samples of its beats."""
    whole = hashlib.sha256(repr((float(fs), signal.shape)).encode())
    for array in (signal.astype("<f4"), np.array(samples, "<i8")):
        whole.update(array.tobytes())
    return whole.hexdigest()[:16]


def shown(name: str) -> str:
    """Return a file's name with what is no character escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def annotators(stems: Sequence[str]) -> set[str]:
    """Return the endings of the annotation files beside a recording; stems: what stands before the ending."""
    files = [(file, stem) for stem in map(Path, stems) for file in stem.parent.glob(f"{glob.escape(stem.name)}.*")]
    endings = {file: file.name.removeprefix(f"{stem.name}.").lower() for file, stem in files if file.is_file()}
    possible = {file: e for file, e in endings.items() if "." not in e and e not in NO_ANNOTATIONS}
    return {ending for file, ending in possible.items() if file.read_bytes()[-2:] == b"\0\0"}


def read_signal(path: Path, fs: float | None) -> tuple[np.ndarray, float, list[str]]:
    """Return leads in mV (samples, 2), sampling rate (Hz) and lead names; fs: of a .csv file. Raises InputError."""
    try:
        return ecg.read_signal(str(path)) if fs is None else read_leads(path, fs)
    except InputError:
        raise
    except ecg.Unsuited as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # wfdb and soundfile raise a dozen unrelated types on damaged files
        raise InputError(f"{path}: cannot be read as a recording ({first_line(error)})") from None


def find_peaks(signal: np.ndarray, fs: float) -> np.ndarray:
    """Return the samples of the R peaks that wfdb's GQRS finds in channel 0, which is in any unit of voltage.

    GQRS has fixed limits in mV: the lead is scaled to the size of QRS complexes for which they are right. GQRS marks
    narrow complexes 33 ms early and wide ones late, annotators their largest deflection, which is sought.
    Raises ValueError for a flat or missing lead.
    """
    from wfdb.processing import gqrs_detect

    x = ecg.fill_missing(signal)[0][:, 0]
    size = np.abs(ecg.band_pass(x[:, None], PEAK_BAND_HZ, fs)[:, 0])
    width = min(round(SIZE_S * fs), len(x))
    largest = size[: len(x) // width * width].reshape(-1, width).max(axis=1)
    largest = largest[largest > 0.01 * np.quantile(largest, 0.95)]  # without stretches where no electrode was
    scale = SIZE_MV / np.quantile(largest, SIZE_SHARE)
    peaks = np.asarray(gqrs_detect(x * scale, fs), dtype=int)
    before, after = (round(seconds * fs) for seconds in PEAK_S)
    inside = (peaks + before >= 0) & (peaks + after < len(x))
    peaks[inside] = ecg.find_extremum(size, peaks[inside], PEAK_S, fs, np.argmax)
    peaks = np.unique(peaks)
    t_wave = (np.diff(peaks) < T_WAVE_S * fs) & (size[peaks[1:]] < T_WAVE_SIZE * size[peaks[:-1]])
    return np.delete(peaks, np.flatnonzero(t_wave) + 1)


def read_recording(
    path: Path, fs: float | None, annotator: str | None, minutes: float | None, model: dict[str, Any]
) -> tuple[np.ndarray, Recording]:
    """Return raw features (m, 32) of the beats that can be classified, and the recording.

    path, fs: as read_signal; annotator: ending of the annotation file with the beats, DETECTOR, or None for .atr where
    it exists, else DETECTOR; minutes: used part, None for all; model: content of model.json. Warns on stderr of leads
    and beats that the network was not trained on. Raises InputError.
    """
    ours, theirs = ([(f["name"], f["formula"]) for f in features] for features in (ecg.FEATURES, model["features"]))
    if ours != theirs:
        raise InputError(f"{path}: this model does not use the features of records; give a .csv file of its features")
    signal, signal_fs, leads = read_signal(path, fs)
    end = round(min((minutes or np.inf) * 60 * signal_fs, len(signal)))
    stem = path.with_suffix("") if fs is not None or path.suffix.lower() == ".edf" else path
    stems = [str(stem), str(path)]  # of r01.qrs and r01.edf.qrs
    there = next((s for s in stems if ecg.beside(s, annotator or "atr").exists()), None)
    annotator = annotator or ("atr" if there else DETECTOR)
    breaks, outside, warnings, origin = [], 0, [], f"found by the detector {DETECTOR}"
    try:
        if annotator == DETECTOR:
            beats = find_peaks(signal[:end], signal_fs)
        else:
            if there is None:
                raise ecg.Unsuited("there is no such annotation file")
            origin = f"of {shown(Path(there).name)}.{annotator}"
            marks, _ = ecg.read_annotations(there, signal_fs, annotator)
            table, outside = ecg.find_beats(marks, len(signal))
            table = table[table["time"] < end]
            beats, breaks = table["time"].to_numpy(int), ecg.find_breaks(marks)
            if paced := int(table["symbol"].isin(list(PACED)).sum()):
                warnings.append(f"{paced} paced beats, on which EC57 does not judge; their decisions mean little")
        X, index, dropped = ecg.beat_features(signal[:end], signal_fs, beats, breaks)
    except Exception as error:  # wfdb raises a dozen unrelated types on damaged annotation files
        others = " or ".join(sorted(annotators(stems) - {annotator.lower()}))
        hint = f"; beats may be in another annotation file: --annotator {others}" if others else ""
        raise InputError(f"{path} ({annotator}): {first_line(error)}; no beat can be classified{hint}") from None
    if model.get("leads") and not ecg.are_expected(leads, model["leads"]):
        expected = " and ".join(" or ".join(names) for names in model["leads"].values())
        found = " and ".join(name or "an unnamed one" for name in leads)
        warnings.append(f"the leads {found}; the model was trained on {expected}")
    for warning in warnings:
        print(f"warning: {path} has {warning}", file=sys.stderr)
    samples = beats[ecg.single_beats(beats, signal_fs)]
    classified = np.isin(samples, beats[index]).tolist()
    title = f"{shown(stem.name)}: {len(samples)} beats, R peaks {origin}"
    dropped["outside the signal"] = outside
    reasons = "".join(f"; {count} {reason}" for reason, count in dropped.items() if count)
    identity, where = identify(signal, signal_fs, samples), str(path.resolve())
    facts = (stem.name, where, fs, title, signal_fs, leads, samples.tolist(), classified, reasons)
    return X.astype(float), Recording(identity, *facts)


def read_table(path: Path) -> Table:
    """Read a .csv file in UTF-8, UTF-16 or Latin-1, with names in its first row, without empty rows at its end.

    The separator is the most frequent one of the first line. Raises InputError.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: is larger than {MAX_BYTES / 1e6:.0f} MB; give a shorter table, or a WFDB record")
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # fits any bytes; numbers and separators are the same
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; mend its quotation marks") from None
    while rows and not any(rows[-1][1]):
        rows.pop()
    for line, row in rows:
        if len(row) != len(rows[0][1]):
            remedy = "give each value its own column, with a decimal point and no row names"
            raise InputError(f"{path}, line {line}: {len(row)} values for {len(rows[0][1])} columns; {remedy}")
    return rows or [(1, [""])]


def to_numbers(path: Path, table: Table, columns: Sequence[int], gaps: bool = False) -> np.ndarray:
    """Return the numbers (rows, columns) in some columns of a table; gaps: an empty cell is NaN. Raises InputError."""
    (_, names), *rows = table
    if not rows:
        raise InputError(f"{path}: has no rows, only names")
    cells = [row[column] for _, row in rows for column in columns]
    grouped = all(GROUPED.fullmatch(cell) for cell in cells if "," in cell)
    if not grouped and not any("." in cell for cell in cells):
        cells = [cell.replace(",", ".") for cell in cells]
    numbers = np.array([float(cell) if NUMBER.fullmatch(cell) else np.nan for cell in cells])
    for k in np.flatnonzero(~np.isfinite(numbers)):
        if cells[k] or not gaps:
            (line, row), column = rows[k // len(columns)], columns[k % len(columns)]
            cell, name = row[column], " ".join(names[column].split())
            why = f"{cell[:40]!r} is not a number written with a decimal point" if cell else "there is no value"
            raise InputError(f"{path}, line {line}, column {name}: {why}")
    return numbers.reshape(len(rows), len(columns))


def read_features(path: Path, features: Sequence[str]) -> np.ndarray:
    """Return raw features (n, len(features)) of a .csv file with one column of each name. Raises InputError."""
    table = read_table(path)
    names = table[0][1]
    for feature in features:
        if (count := names.count(feature)) != 1:
            raise InputError(f"{path}: {count} columns are called {feature!r}; the first line needs each feature once")
    return to_numbers(path, table, [names.index(feature) for feature in features])


def read_leads(path: Path, fs: float) -> tuple[np.ndarray, float, list[str]]:
    """Return what ecg.two_leads returns of a .csv file: an empty cell is missing signal, a lead without unit is in mV.

    Columns of times must be those of `fs`. Raises InputError or ecg.Unsuited.
    """
    table = read_table(path)
    names, units = zip(*(COLUMN.fullmatch(column).groups() for column in table[0][1]))
    for column, (name, unit) in enumerate(zip(names, units)):
        if time := TIME.fullmatch(re.sub("[^a-z]", "", name.lower())):
            check_times(path, table, column, ecg.plain_unit(unit or time["unit"] or ""), fs)
    units = [u or ("mV" if ecg.lead_name(name) in ecg.LEADS else "no unit") for name, u in zip(names, units)]
    one, none = [1] * len(names), [None] * len(names)
    signals = ecg.Signals(names, units, one, none, fs, lambda leads: to_numbers(path, table, leads, gaps=True).T)
    return ecg.two_leads(signals)


def check_times(path: Path, table: Table, column: int, unit: str, fs: float) -> None:
    """Raise InputError where a column of times, numbers or times of day, does not rise by 1 / fs seconds a row.

    Numbers without a unit, or with an unknown one, may be seconds or parts of them. An empty cell says nothing.
    """
    (_, names), *rows = table
    where, cells = f"column {' '.join(names[column].split())}", [row[column] for _, row in rows]
    known = np.flatnonzero([cell != "" for cell in cells])
    named = {**SECONDS, "sample": 1 / fs, "samples": 1 / fs}
    if any(NUMBER.fullmatch(cell.replace(",", ".")) for cell in cells):
        at = to_numbers(path, table, [column], gaps=True)[known, 0]
        scales = [named[unit]] if unit in named else [1.0, 1e-3, 1e-6, 1e-9]
    else:
        at, scales = times_of_day([cells[k] for k in known]), [1.0]
    if len(rows) < 2:
        return
    span = at[-1] - at[0] if len(at) > 1 else 0.0
    if not span > 0:
        raise InputError(f"{path}, {where}: holds no times that rise; give it another name to have it ignored")
    rate, scale = min(((np.ptp(known) / span / s, s) for s in scales), key=lambda pair: abs(np.log(pair[0] / fs)))
    finest = np.diff(np.unique(at)).min() * scale  # to which the times are rounded, if that is more than a row
    wrong = np.abs((at - at[0]) * scale - (known - known[0]) / fs) > max(1 / fs, finest) * 1.001
    if wrong.any():
        k = known[np.argmax(wrong)]
        what = f"{cells[k][:40]!r} is not this row's time at --fs {fs:g}; the column has {rate:.6g} Hz"
        raise InputError(f"{path}, line {rows[k][0]}, {where}: {what}; give the right --fs, and each row once")


def times_of_day(cells: Sequence[str]) -> np.ndarray:
    """Return the seconds from the first of some times, with or without dates, over midnight too; NaN for no times."""
    text = pd.Series(cells, dtype=str).str.strip("[]'").str.replace(",", ".")
    text = text.where(text.str.count(":") != 1, "0:" + text)  # minutes and seconds
    times = pd.to_timedelta(text, errors="coerce")
    for form in ("ISO8601", None):
        times = pd.to_datetime(text, errors="coerce", format=form) if times.isna().any() else times
    return np.unwrap((times - times.min()).dt.total_seconds(), period=DAY_S)
