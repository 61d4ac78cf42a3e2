"""The client's recordings (WFDB, EDF, .csv files of two leads) and .csv files of features, as raw features of beats.

The .csv files come from many programs: commas, semicolons or tabs between columns; decimal points, or decimal commas
where no value has a point and some value cannot be a thousand. What could be meant in two ways is refused with its line
and column.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fhe_mlp import ecg
from fhe_mlp.cli import InputError, first_line

DETECTOR = "gqrs"  # --annotator that stands for wfdb's detector of R peaks
PEAK_S, PEAK_BAND_HZ = (-0.05, 0.09), (5.0, 25.0)  # around its marks; where QRS complexes are strongest
PACED = "/f"  # WFDB codes of paced beats, and of fusions with them
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # float() would also take 1_000, nan and inf
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)  # 1,234: a thousand or a decimal, nobody can say
UNIT = re.compile(r"(.*?)\s*[\[(]\s*(\S+)\s*[\])]")  # of a column: MLII (uV), V1 [mV]
MAX_BYTES = 100_000_000  # of a .csv file, which takes 30 times as much memory
Table = list[tuple[int, list[str]]]  # line number and cells of each row


@dataclass(frozen=True)
class Recording:
    """A recording whose beats are encrypted; stored as JSON, and all that decrypt needs of it."""

    name: str
    path: str
    csv_fs: float | None  # Hz, of a .csv file; None for others
    origin: str  # of the R peaks
    annotations: str  # path of the annotation file that has them, or ""
    fs: float  # Hz
    leads: list[str]
    samples: list[int]  # of all beats, in the order of time
    classified: list[bool]  # whether each was encrypted
    not_classified: dict[str, int]  # number of the others, by reason

    def title(self) -> str:
        """Return the beginning of a sentence: name, number of beats, and where these come from."""
        return f"{self.name}: {len(self.samples)} beats, R peaks {self.origin}"

    def reasons(self) -> str:
        """Return the end of a sentence: why beats are not classified."""
        return "".join(f"; {count} {reason}" for reason, count in self.not_classified.items())


def find_recording(path: Path, fs: float | None) -> Path | None:
    """Return the path of a .csv file (where fs is given), .edf file or WFDB record (then without ending), else None."""
    if fs is not None or (path.suffix.lower() == ".edf" and path.is_file()):
        return path
    record = path.with_suffix("") if path.suffix in (".hea", ".dat") else path
    return record if Path(f"{record}.hea").is_file() else None


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
    """Return the samples of the R peaks that wfdb's GQRS finds in channel 0 (mV).

    GQRS marks narrow complexes 33 ms early and wide ones late, annotators their largest deflection, which is sought.
    Raises ValueError for a flat or missing lead.
    """
    from wfdb.processing import gqrs_detect

    x = ecg.fill_missing(signal)[0][:, 0]
    peaks = np.asarray(gqrs_detect(x, fs), dtype=int)
    before, after = (round(seconds * fs) for seconds in PEAK_S)
    inside = (peaks + before >= 0) & (peaks + after < len(x))
    size = np.abs(ecg.band_pass(x[:, None], PEAK_BAND_HZ, fs)[:, 0])
    peaks[inside] = ecg.find_extremum(size, peaks[inside], PEAK_S, fs, np.argmax)
    return np.unique(peaks)


def read_recording(
    path: Path, fs: float | None, annotator: str | None, minutes: float | None, model: dict[str, Any]
) -> tuple[np.ndarray, Recording]:
    """Return raw features (m, 32) of the beats that can be classified, and the recording.

    fs: of a .csv file; annotator: ending of the annotation file whose beats are used, or DETECTOR; None for .atr where
    it exists, else DETECTOR; minutes: used part of the recording, None for all; model: content of model.json.
    Warns on stderr of leads and beats that the network was not trained on. Raises InputError.
    """
    ours, theirs = ([(f["name"], f["formula"]) for f in features] for features in (ecg.FEATURES, model["features"]))
    if ours != theirs:
        raise InputError(f"{path}: this model does not use the features of records; give a .csv file of its features")
    signal, signal_fs, leads = read_signal(path, fs)
    end = len(signal) if minutes is None else max(1, round(min(minutes * 60 * signal_fs, len(signal))))
    stem = path.with_suffix("") if fs is not None or path.suffix.lower() == ".edf" else path
    annotator = annotator or ("atr" if Path(f"{stem}.atr").exists() else DETECTOR)
    annotations, breaks, outside, warnings = f"{stem}.{annotator}", [], 0, []
    try:
        if annotator == DETECTOR:
            beats = find_peaks(signal[:end], signal_fs)
        else:
            marks, _ = ecg.read_annotations(str(stem), signal_fs, annotator)
            table, outside = ecg.find_beats(marks, len(signal))
            table = table[table["time"] < end]
            beats, breaks = table["time"].to_numpy(int), ecg.find_breaks(marks)
            if paced := int(table["symbol"].isin(list(PACED)).sum()):
                warnings.append(f"{paced} paced beats, on which EC57 does not judge; their decisions mean little")
        X, index, dropped = ecg.beat_features(signal[:end], signal_fs, beats, breaks)
    except (ecg.Unsuited, ValueError) as error:
        raise InputError(f"{path} ({annotator}): {error}; no beat can be classified") from None
    except Exception as error:  # of damaged annotation files
        raise InputError(f"{path}: its .{annotator} cannot be read ({first_line(error)})") from None
    if model.get("leads") and not ecg.are_expected(leads, model["leads"]):
        expected = " and ".join(" or ".join(names) for names in model["leads"].values())
        found = " and ".join(name or "an unnamed one" for name in leads)
        warnings.append(f"the leads {found}; the model was trained on {expected}")
    for warning in warnings:
        print(f"warning: {path} has {warning}", file=sys.stderr)
    samples = beats[ecg.single_beats(beats, signal_fs)]
    return X.astype(float), Recording(
        name=stem.name,
        path=str(path.resolve()),
        csv_fs=fs,
        origin=f"found by the detector {DETECTOR}" if annotator == DETECTOR else f"of {Path(annotations).name}",
        annotations="" if annotator == DETECTOR else str(Path(annotations).resolve()),
        fs=signal_fs,
        leads=leads,
        samples=samples.tolist(),
        classified=np.isin(samples, beats[index]).tolist(),
        not_classified={reason: n for reason, n in {**dropped, "outside the signal": outside}.items() if n},
    )


def read_table(path: Path, known: Callable[[str], bool]) -> Table:
    """Read a .csv file in UTF-8, UTF-16 or Latin-1, without blank lines and empty rows at the end.

    The first row names the columns; the separator is the one with which most names are `known`. Raises InputError.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: is larger than {MAX_BYTES / 1e6:.0f} MB; give a shorter table, or a WFDB record")
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # fits any bytes; numbers and separators are the same
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    separator = max(",;\t", key=lambda sign: sum(known(cell.strip(' "\r\n')) for cell in first.split(sign)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; mend its quotation marks") from None
    while rows and not any(rows[-1][1]):
        rows.pop()
    return rows or [(1, [])]


def to_numbers(path: Path, table: Table, columns: Sequence[int], gaps: bool = False) -> np.ndarray:
    """Return the numbers (rows, columns) in some columns of `table`, read from `path`; gaps: an empty cell is NaN.

    All rows may end in one separator more than the first. Raises InputError.
    """
    (_, names), *rows = table
    if not rows:
        raise InputError(f"{path}: has no rows, only names")
    width = len(names)
    if width - 1 in columns and all(len(row) == width + 1 and not row[-1] for _, row in rows):
        width += 1  # had the rows a further cell in front instead, the last number would be missing in all
    for line, row in rows:
        if len(row) != width:
            remedy = "give each value its own column, with a decimal point and no row names"
            raise InputError(f"{path}, line {line}: {len(row)} values for {width} columns; {remedy}")
    cells = [row[column] for _, row in rows for column in columns]
    with_commas = [cell for cell in cells if "," in cell]
    decimal_commas = not all(map(GROUPED.fullmatch, with_commas)) and not any("." in cell for cell in cells)
    numbers = np.empty(len(cells))
    for k, cell in enumerate(cells):
        text = cell.replace(",", ".") if decimal_commas else cell
        numbers[k] = float(text) if NUMBER.fullmatch(text) else np.nan
        if not np.isfinite(numbers[k]) and (cell or not gaps):
            (line, _), name = rows[k // len(columns)], names[columns[k % len(columns)]]
            why = f"{cell[:40]!r} is not a number written with a decimal point" if cell else "there is no value"
            raise InputError(f"{path}, line {line}, column {' '.join(name.split())}: {why}")
    return numbers.reshape(len(rows), len(columns))


def read_features(path: Path, features: Sequence[str]) -> np.ndarray:
    """Return raw features (n, len(features)) of a .csv file with one column of each name. Raises InputError."""
    table = read_table(path, features.__contains__)
    names = table[0][1]
    for feature in features:
        if (count := names.count(feature)) != 1:
            raise InputError(f"{path}: {count} columns are called {feature!r}; the first line needs each feature once")
    return to_numbers(path, table, [names.index(feature) for feature in features])


def name_and_unit(column: str) -> tuple[str, str]:
    """Return lead and unit in a column's name, as "MLII (uV)" or "V1 [mV]"; a lead without unit is in mV."""
    if found := UNIT.fullmatch(column):
        return found[1], found[2]
    return column, "mV" if ecg.lead_name(column) in ecg.LEADS else "no unit"


def read_leads(path: Path, fs: float) -> tuple[np.ndarray, float, list[str]]:
    """Return two leads of a .csv file in mV, (samples, 2) with NaN for empty cells, fs (Hz), and their names.

    Raises InputError or ecg.Unsuited.
    """
    ecg.check_rate(fs)
    table = read_table(path, lambda column: bool(ecg.ecg_signals(*zip(name_and_unit(column)))))
    names, units = zip(*map(name_and_unit, table[0][1] or [""]))
    leads = ecg.ecg_signals(names, units)
    if len(leads) < 2:
        how = 'name them in the first line, such as "MLII (mV)"'
        raise InputError(f"{path}: {len(leads)} columns are ECG leads and two are needed; {how}")
    chosen = [leads[k] for k in ecg.choose_leads([names[column] for column in leads])]
    signal = to_numbers(path, table, chosen, gaps=True) * [ecg.MILLIVOLTS[units[column].lower()] for column in chosen]
    signal, leads = ecg.upright_first(signal, [names[column] for column in chosen])
    return signal, fs, leads
