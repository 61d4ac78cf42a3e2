"""Workbooks, fit to be read and printed; columns.csv says which column stands in which sheet, how, and its meaning."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pandas as pd

from fhe_mlp.cli import whole_file

WIDEST_COLUMN = 60  # characters; longer text is wrapped
LINE_POINTS = 15  # height of a line
PAGE_CHARACTERS = 200  # of a row on one printed page; more take another page, with the first column again
HEADER_COLOUR = "1F4E79"


# Name (or pattern), sheets, number format and meaning of every column, in their order.
COLUMNS = pd.read_csv(Path(__file__).with_name("columns.csv"), dtype=str, keep_default_na=False)


def columns_of(sheet: str) -> list[str]:
    """Return the names of the columns of a sheet, in their order."""
    return [name for name, sheets in zip(COLUMNS["name"], COLUMNS["sheets"]) if sheet in sheets.split()]


def number_format(column: str) -> str:
    """Return the number format of a column; what follows a comma is the folder of its figures."""
    name = column.split(", ")[0]
    formats = (f for pattern, f in zip(COLUMNS["name"], COLUMNS["format"]) if f and fnmatch(name, pattern))
    return next(formats, "General")


def meanings() -> dict[str, str]:
    """Return what columns mean, for a settings sheet."""
    return {name: meaning for name, meaning in zip(COLUMNS["name"], COLUMNS["meaning"]) if meaning}


def settings_sheet(settings: Mapping[str, Any]) -> pd.DataFrame:
    """Return settings as a sheet of two columns."""
    return pd.DataFrame(settings.items(), columns=["setting", "value"])


def write_workbook(path: Path, sheets: Mapping[str, pd.DataFrame]) -> None:
    """Write tables to an .xlsx file, whole.

    Text stays text: what looks like a formula is none, and control characters become question marks.
    """
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    from openpyxl.styles import Alignment, Font, PatternFill

    bold, fill = Font(bold=True, color="FFFFFF"), PatternFill("solid", fgColor=HEADER_COLOUR)
    at_top = Alignment(vertical="top")
    text_place = Alignment(wrap_text=True, vertical="top", horizontal="left", indent=1)  # apart from a number before it
    content = io.BytesIO()
    with pd.ExcelWriter(content, engine="openpyxl") as writer:
        for title, table in sheets.items():
            texts = table.select_dtypes(object).columns
            table = table.assign(**{c: table[c].replace(ILLEGAL_CHARACTERS_RE, "?", regex=True) for c in texts})
            table.to_excel(writer, sheet_name=title, index=False)
            sheet = writer.sheets[title]
            sheet.freeze_panes, sheet.auto_filter.ref = "B2", sheet.dimensions
            sheet.print_title_rows, sheet.print_title_cols = "1:1", "A:A"
            sheet.page_setup.orientation, sheet.page_setup.paperSize = "landscape", sheet.PAPERSIZE_A4
            sheet.sheet_properties.pageSetUpPr.fitToPage = True
            widths, lines = [], dict.fromkeys(range(2, len(table) + 2), 1)
            for header, *cells in sheet.columns:
                header.font, header.fill = bold, fill
                shown, longest = number_format(header.value), len(header.value) + 2  # the filter's arrow needs room
                for cell in cells:
                    if isinstance(cell.value, str):
                        cell.data_type, cell.alignment = "s", text_place
                        lines[cell.row] = max(lines[cell.row], math.ceil(len(cell.value) / WIDEST_COLUMN))
                        longest = max(longest, len(cell.value))
                    elif cell.value is not None:
                        cell.number_format, cell.alignment = shown, at_top
                        longest = max(longest, len(f"{cell.value:.4g}"))
                widths.append(min(WIDEST_COLUMN, longest + 2))
                sheet.column_dimensions[header.column_letter].width = widths[-1]
            for row, count in lines.items():
                if count > 1:  # LibreOffice would let wrapped lines overlap
                    sheet.row_dimensions[row].height = LINE_POINTS * count
            sheet.page_setup.fitToHeight = 0  # as many pages as it takes
            sheet.page_setup.fitToWidth = math.ceil(sum(widths) / PAGE_CHARACTERS)
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getvalue())
