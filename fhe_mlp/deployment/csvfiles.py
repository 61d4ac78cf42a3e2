"""The client's .csv files, which come from many programs: features of beats, or two leads of a recording.

Commas, semicolons or tabs between columns; decimal points, or decimal commas where no value has a point and some value
cannot be a thousand. What could be meant in two ways is refused with its line and column.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from cli import InputError

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # float() would also take 1_000, nan and inf
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)  # 1,234: a thousand or a decimal, nobody can say
UNIT = re.compile(r"(.*?)\s*[\[(]\s*(\S+)\s*[\])]")  # of a column: MLII (uV), V1 [mV]
MAX_BYTES = 100_000_000  # of a table, which takes 30 times as much memory


def decode(content: bytes) -> str:
    """Text of UTF-8 or UTF-16 with a byte order mark, else of UTF-8, else of Latin-1, which fits any bytes.

    Whatever the encoding, numbers and separators are ASCII. Raises UnicodeDecodeError for damaged UTF-16.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def split_rows(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of each row but of blank lines and of empty rows at the end. Raises InputError."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; mend its quotation marks") from None
    while rows and not any(rows[-1][1]):
        rows.pop()
    return rows


def read_table(
    path: Path, known: Callable[[str], bool], choose: Callable[[list[str]], list[int]], what: str, gaps: bool = False
) -> np.ndarray:
    """The numbers (rows, columns) of a .csv file in the columns that `choose` picks by their names in the first row.

    known: whether a column of that name may be picked; what: the rows hold; gaps: an empty cell is NaN. Other columns
    are not looked at. All rows may end in one separator more than the first one. Raises InputError.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: is larger than {MAX_BYTES / 1e6:.0f} MB; give a shorter table, or a WFDB record")
        text = decode(path.read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is truncated or damaged ({error}); save it as .csv in UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path}: is not text; save it as .csv in UTF-8")
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")

    separator = max(",;\t", key=lambda sign: sum(known(cell.strip(' "\r\n')) for cell in first.split(sign)))
    (_, names), *rows = split_rows(path, text, separator) or [(1, [])]
    order = choose(names)
    if not rows:
        raise InputError(f"{path}: holds no {what}, only names")
    if len(names) - 1 in order and all(len(row) == len(names) + 1 and not row[-1] for _, row in rows):
        names.append("")  # had the rows a further cell in front instead, the last number would be missing in all
    for k, (line, row) in enumerate(rows):
        if len(row) != len(names):
            remedy = "give each value its own column, with a decimal point and no row names"
            raise InputError(f"{path}, line {line}: {len(row)} values for {len(names)} columns; {remedy}")
        rows[k] = (line, [row[column] for column in order])
    with_commas = [cell for _, row in rows for cell in row if "," in cell]
    decimal_commas = not all(map(GROUPED.fullmatch, with_commas)) and not any("." in c for _, row in rows for c in row)
    X = np.empty((len(rows), len(order)))
    for k, (line, row) in enumerate(rows):
        for j, cell in enumerate(row):
            number = cell.replace(",", ".") if decimal_commas else cell
            X[k, j] = float(number) if NUMBER.fullmatch(number) else np.nan
            if not np.isfinite(X[k, j]) and (cell or not gaps):
                why = f"{cell[:40]!r} is not a number written with a decimal point" if cell else "there is no value"
                raise InputError(f"{path}, line {line}, column {' '.join(names[order[j]].split())}: {why}")
    return X


def read_beats(path: Path, features: Sequence[str]) -> np.ndarray:
    """Raw features (n, len(features)) of a .csv file whose first row names its columns, in any order.

    Raises InputError.
    """

    def choose(names: list[str]) -> list[int]:
        for feature in features:
            if (count := names.count(feature)) != 1:
                raise InputError(
                    f"{path}: {count} columns are called {feature!r}; the first line needs each feature once"
                )
        return [names.index(feature) for feature in features]

    return read_table(path, features.__contains__, choose, "beats")


def read_leads(path: Path) -> tuple[np.ndarray, list[str]]:
    """Two leads of a .csv file in mV, (samples, 2) in choose_leads' order and NaN for empty cells, and their names.

    Columns are named after leads, with a unit of voltage in parentheses or in mV. Raises InputError.
    """
    import records
    from records import LEADS, choose_leads, lead_name

    def name_and_unit(column: str) -> tuple[str, str]:
        if found := UNIT.fullmatch(column):
            return found[1], found[2]
        return column, "mV" if lead_name(column) in LEADS else "no unit"

    def is_lead(column: str) -> bool:
        return bool(records.ecg_signals(*zip(name_and_unit(column))))

    def choose(columns: list[str]) -> list[int]:
        leads = [k for k, column in enumerate(columns) if is_lead(column)]
        if len(leads) < 2:
            how = 'name them in the first line, such as "MLII (mV)"'
            raise InputError(f"{path}: {len(leads)} columns are ECG leads and two are needed; {how}")
        chosen[:] = [name_and_unit(columns[k]) for k in leads]
        order = choose_leads([name for name, _ in chosen])
        chosen[:] = [chosen[k] for k in order]
        return [leads[k] for k in order]

    chosen: list[tuple[str, str]] = []
    X = read_table(path, is_lead, choose, "samples", gaps=True)
    X *= [records.MILLIVOLTS[unit.lower()] for _, unit in chosen]
    return records.upright_first(X, [name for name, _ in chosen])
