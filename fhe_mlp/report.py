"""Workbooks and pictures: what people read. They are written from results and never read back."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp.cli import InputError, whole_file
from fhe_mlp.pictures import label_points, save_figure
from fhe_mlp.steps import STEPS, plot_steps, read_steps, side_by_side, steps_table
from fhe_mlp.store import Store

WIDEST_COLUMN = 60  # characters of a workbook's column; longer text is wrapped
LINE_POINTS = 15  # height of a line
PAGE_CHARACTERS = 200  # of a workbook's row on one printed page; more take another page, with the first column again
HEADER_COLOUR = "1F4E79"  # of workbooks
NUMBER_FORMATS = {  # of workbook columns, by a part of their name
    "accuracy|^output_[cf]|sensitivity|specificity|predictive|found_": "0.0000",
    "^perc_": "0.0",
    "complexity_ratio|beats_per": "#,##0",
    "complexity|^p_": "0.00E+00",
    "_time$|seconds|_ms$|_MB$|_kB$": "0.000",
    r"^\d bits$": "0.0000",
}
PUBLISHED_COLUMNS = (
    "model_name num_items batch q_bits compile_time clear_time accuracy_clear perc_ones_gt perc_zeros_gt "
    "perc_ones_pred_clear perc_zeros_pred_clear fhe_time accuracy_fhe perc_ones_pred_fhe perc_zeros_pred_fhe"
).split()
CONFIGURATION_COLUMNS = (  # of a summary row, the same for all batches of a configuration
    "model_name q_bits quantization rounding_bits p_error pbs complexity complexity_ratio_default_ptq on_front "
    "balanced_accuracy_validation noisy_balanced_accuracy_validation balanced_accuracy_test_set "
    "noisy_balanced_accuracy_test_set balanced_accuracy_low95_test_set "
    "balanced_accuracy_high95_test_set sensitivity_test_set specificity_test_set positive_predictive_value_test_set "
    "found_S_test_set found_V_test_set found_F_test_set test_set_rows accuracy_simulated accuracy_clear_same_rows "
    "simulated_rows widest_integer_bits evaluation_keys_MB keygen_time processor cores status reason"
).split()
SUMMARY_COLUMNS = (
    "model_name q_bits quantization rounding_bits pbs complexity complexity_ratio_default_ptq on_front "
    "balanced_accuracy_validation noisy_balanced_accuracy_validation balanced_accuracy_test_set "
    "noisy_balanced_accuracy_test_set balanced_accuracy_low95_test_set "
    "balanced_accuracy_high95_test_set sensitivity_test_set specificity_test_set positive_predictive_value_test_set "
    "found_S_test_set found_V_test_set found_F_test_set accuracy_simulated accuracy_clear_same_rows n accuracy_fhe "
    "accuracy_fhe_low95 accuracy_fhe_high95 decisions_equal_clear run_seconds run_seconds_iqr encrypt_seconds "
    "decrypt_seconds keygen_time evaluation_keys_MB input_ciphertext_kB output_ciphertext_kB batches processor cores "
    "status reason"
).split()
PRINTED_COLUMNS = (
    "model_name q_bits rounding_bits complexity complexity_ratio_default_ptq balanced_accuracy_test_set "
    "noisy_balanced_accuracy_test_set run_seconds n accuracy_fhe on_front status"
).split()
COMPARISON_COLUMNS = (  # of other models: default PTQ's of step 5, and what `make bench` measures
    "name kind model_name q_bits balanced_accuracy balanced_accuracy_validation accuracy_simulated pbs complexity "
    "compared keygen_time seconds seconds_iqr beats_per_second up_kB down_kB client_computes n right "
    "decisions_equal_clear note"
).split()
OURS = "this pipeline"  # kind of the models in a comparison that the summary has already
MARKERS = {  # of the frontier picture, by kind of model
    "default PTQ": "D",
    "Concrete ML models": "s",
    "linear on a public map": "P",
    "CKKS": "^",
}
ACCURACY_TICKS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
DRAWN = (0.45, 0.9995)  # accuracies that have a place on the picture's logit scale; those beyond stand at its ends


def settings_sheet(settings: dict[str, Any]) -> pd.DataFrame:
    """Settings as a sheet of two columns."""
    return pd.DataFrame(settings.items(), columns=["setting", "value"])


def write_workbook(path: Path, sheets: dict[str, pd.DataFrame]) -> None:
    """Write tables to an .xlsx file, whole, fit to be read and printed.

    Frozen coloured header, fitted widths, number formats by kind of column, landscape pages of legible width. Text
    stays text: what looks like a formula is none, and control characters become question marks.
    """
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    from openpyxl.styles import Alignment, Font, PatternFill

    def clean(value: Any) -> Any:
        return ILLEGAL_CHARACTERS_RE.sub("?", value) if isinstance(value, str) else value

    bold, fill = Font(bold=True, color="FFFFFF"), PatternFill("solid", fgColor=HEADER_COLOUR)
    number_place = Alignment(vertical="top")
    text_place = Alignment(wrap_text=True, vertical="top", horizontal="left", indent=1)  # apart from a number before it
    content = io.BytesIO()
    with pd.ExcelWriter(content, engine="openpyxl") as writer:
        for title, table in sheets.items():
            table = table.apply(lambda column: column.map(clean) if column.dtype == object else column)
            table.to_excel(writer, sheet_name=title, index=False)
            sheet = writer.sheets[title]
            sheet.freeze_panes = "B2"
            sheet.auto_filter.ref = sheet.dimensions
            sheet.print_title_rows, sheet.print_title_cols = "1:1", "A:A"
            sheet.page_setup.orientation, sheet.page_setup.paperSize = "landscape", sheet.PAPERSIZE_A4
            sheet.page_setup.fitToHeight = 0  # as many pages as it takes
            sheet.sheet_properties.pageSetUpPr.fitToPage = True
            characters, lines = 0, {}
            for header, *cells in sheet.columns:
                header.font, header.fill = bold, fill
                name = str(header.value)
                formats = (f for pattern, f in NUMBER_FORMATS.items() if re.search(pattern, name))
                number_format, longest = next(formats, "General"), len(name) + 2  # the filter's arrow needs room
                for cell in cells:
                    if isinstance(cell.value, str):
                        cell.data_type, cell.alignment = "s", text_place
                        lines[cell.row] = max(lines.get(cell.row, 1), math.ceil(len(cell.value) / WIDEST_COLUMN))
                        longest = max(longest, len(cell.value))
                    elif cell.value is not None:
                        cell.number_format, cell.alignment = number_format, number_place
                        longest = max(longest, len(f"{cell.value:.4g}"))
                width = min(WIDEST_COLUMN, longest + 2)
                sheet.column_dimensions[header.column_letter].width = width
                characters += width
            for row, count in lines.items():
                if count > 1:  # LibreOffice would let wrapped lines overlap
                    sheet.row_dimensions[row].height = LINE_POINTS * count
            sheet.page_setup.fitToWidth = max(1, math.ceil(characters / PAGE_CHARACTERS))
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getvalue())


def encrypted_columns(runs: pd.DataFrame) -> dict[str, Any]:
    """The part of a results row that encrypted runs give; runs: one row a prediction (sheet "predictions").

    Times a sample are medians with their interquartile range; the interval is Wilson's, JASA 22:209-212, 1927.
    """
    from scipy.stats import binomtest

    right = int((runs["decision_fhe"] == runs["label"]).sum())
    interval = binomtest(right, len(runs)).proportion_ci(0.95, method="wilson")
    quartiles = runs[["encrypt_seconds", "run_seconds", "decrypt_seconds"]].quantile([0.25, 0.5, 0.75])
    return {
        "fhe_time": float(runs[list(quartiles)].to_numpy().sum()),
        "accuracy_fhe": right / len(runs),
        "perc_ones_pred_fhe": 100 * runs["decision_fhe"].mean(),
        "perc_zeros_pred_fhe": 100 * (1 - runs["decision_fhe"].mean()),
        "accuracy_fhe_low95": float(interval.low),
        "accuracy_fhe_high95": float(interval.high),
        "decisions_equal_clear": int((runs["decision_fhe"] == runs["decision_clear"]).sum()),
        "outputs_equal_clear": int(np.isclose(runs["output_fhe"], runs["output_clear"]).sum()),
        "encrypt_seconds": quartiles.loc[0.5, "encrypt_seconds"],
        "run_seconds": quartiles.loc[0.5, "run_seconds"],
        "run_seconds_iqr": quartiles.loc[0.75, "run_seconds"] - quartiles.loc[0.25, "run_seconds"],
        "decrypt_seconds": quartiles.loc[0.5, "decrypt_seconds"],
        "input_ciphertext_kB": runs["input_bytes"].median() / 1e3,
        "output_ciphertext_kB": runs["output_bytes"].median() / 1e3,
    }


def write_batch(path: Path, rows: pd.DataFrame, predictions: pd.DataFrame, settings: dict[str, Any]) -> None:
    """Write the workbook of one batch: its results, published columns first, its predictions and the settings.

    rows: a row a configuration; predictions: a row a prediction, of any of them, told apart by "identity".
    """
    runs = dict(list(predictions.groupby("identity")))
    found = [encrypted_columns(runs[i]) if i in runs else {} for i in rows["identity"]]
    rows = rows.join(pd.DataFrame(found, index=rows.index))
    first = [*PUBLISHED_COLUMNS, "status", "reason"]
    results = rows.reindex(columns=[*first, *(name for name in rows if name not in first)])
    predictions = rows[["identity", "model_name", "q_bits"]].merge(predictions, on="identity")
    write_workbook(path, {"results": results, "predictions": predictions, "settings": settings_sheet(settings)})


def pareto(cost: pd.Series, accuracy: pd.Series) -> pd.Series:
    """True for each point whose accuracy no other point of the same or lower cost reaches."""
    order = pd.DataFrame({"cost": cost, "accuracy": accuracy}).sort_values(
        ["cost", "accuracy"], ascending=[True, False]
    )
    best_before = order["accuracy"].cummax().shift(fill_value=-np.inf)
    return (order["accuracy"] > best_before).reindex(cost.index)


def summarize(rows: pd.DataFrame, predictions: pd.DataFrame, reference: float) -> pd.DataFrame:
    """One row a configuration (two where unlike machines ran it) over all its batches, the lowest complexity first.

    rows: a row a configuration and batch; reference: complexity of default PTQ, NaN where there is none; on_front is
    judged by validation accuracy, with the noise of encryption where it is known.
    """
    found = []
    rows = rows.reindex(columns=list(dict.fromkeys([*rows, *CONFIGURATION_COLUMNS])))  # failed rows lack some
    for _, group in rows.groupby(["identity", "processor", "cores"], sort=False, dropna=False):
        ran = group[group["status"] == "ok"]
        row = group[CONFIGURATION_COLUMNS].iloc[-1].to_dict() | {"batches": len(group)}
        if len(ran):
            mine = predictions.merge(ran[["identity", "batch"]], on=["identity", "batch"])
            row |= {"n": len(mine), **encrypted_columns(mine)}
        found.append(row)
    table = pd.DataFrame(found).drop(columns="fhe_time", errors="ignore")
    cost = table["complexity"] = pd.to_numeric(table["complexity"])
    table["complexity_ratio_default_ptq"] = reference / cost.where(cost > 0)
    compiled = cost.notna() & table["balanced_accuracy_validation"].notna()
    distinct = table[compiled].drop_duplicates(["model_name", "q_bits"])
    accuracy = distinct["noisy_balanced_accuracy_validation"].fillna(distinct["balanced_accuracy_validation"])
    front = distinct[pareto(cost[distinct.index], accuracy.astype(float))]
    on_front = set(zip(front["model_name"], front["q_bits"]))
    table["on_front"] = [pair in on_front for pair in zip(table["model_name"], table["q_bits"])]
    return table.sort_values("complexity", ignore_index=True)


def pivots(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Sheets of models by bit widths: accuracy cleartext and encrypted, and seconds a beat, by machine where unlike."""

    def by_bits(values: str, what: str, index: list[str]) -> pd.DataFrame:
        if values not in summary or summary[values].isna().all():
            return pd.DataFrame()
        table = summary.pivot_table(values=values, index=index, columns="q_bits", sort=False)
        table = table[sorted(table)].rename(columns="{:.0f} bits".format).reset_index()
        table.insert(1, "measured", what)
        return table

    rows = int(summary["test_set_rows"].max()) if summary["test_set_rows"].notna().any() else 0
    fewest, most = (summary["n"].min(), summary["n"].max()) if "n" in summary else (0, 0)
    beats = f"{fewest:.0f}" if fewest == most else f"{fewest:.0f} to {most:.0f}"
    machine = ["model_name", "processor", "cores"]
    return {
        "accuracy by bits": pd.concat(
            [
                by_bits(
                    "balanced_accuracy_test_set", f"balanced accuracy, cleartext, {rows} test rows", ["model_name"]
                ),
                by_bits("accuracy_fhe", f"accuracy, encrypted, {beats} rows", ["model_name"]),
            ]
        ),
        "seconds by bits": by_bits("run_seconds", f"median seconds a beat, encrypted, {beats} rows", machine),
    }


def encrypted_by_class(predictions: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """A row a configuration and AAMI class of its encrypted beats: how many, right, and equal to the cleartext ones.

    predictions, rows: of the store; beats of unknown class are left out.
    """
    known = predictions[predictions["aami"].fillna("") != ""]
    if not len(known):
        return known[[]]
    known = known.merge(rows[["identity", "model_name", "q_bits"]].drop_duplicates(), on="identity")
    known = known.assign(
        right=known["decision_fhe"] == known["label"], equal=known["decision_fhe"] == known["decision_clear"]
    )
    groups = known.groupby(["model_name", "q_bits", "aami"], sort=False)
    return groups.agg(
        beats=("label", "size"), records=("record", "nunique"), right=("right", "sum"), equal=("equal", "sum")
    ).reset_index()


def write_summary(path: Path, summary: pd.DataFrame, more: dict[str, pd.DataFrame], settings: dict[str, Any]) -> None:
    """Write fhe_summary.xlsx; more: its sheets after the summary and its pivots, left out where they are empty."""
    shown = summary[[name for name in SUMMARY_COLUMNS if name in summary]]
    sheets = {"summary": shown, **pivots(summary), **more, "settings": settings_sheet(settings)}
    write_workbook(path, {title: table for title, table in sheets.items() if len(table)})


def drawn_at(accuracy: pd.Series) -> pd.Series:
    """Accuracies as they are drawn."""
    return accuracy.clip(*DRAWN)


def plot_frontier(summary: pd.DataFrame, others: pd.DataFrame, path: Path) -> None:
    """Test accuracy against complexity and against seconds a beat: every configuration, the front, and the others.

    others: columns name, kind, accuracy, complexity and seconds, missing where unknown. The accuracy axis is a logit
    scale, so that 98 % and 99 % lie as far apart as 50 % and 67 %.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(15, 7), sharey=True, layout="constrained")
    placed = others[others[["complexity", "seconds"]].notna().any(axis=1)]
    everything = drawn_at(pd.concat([summary["balanced_accuracy_test_set"], placed["balanced_accuracy"]]).dropna())
    axes[0].set_ylabel("balanced accuracy, whole test set, quantized")
    for axis, cost, other_cost, label in (
        (axes[0], "complexity", "complexity", "complexity of one encrypted beat"),
        (axes[1], "run_seconds", "seconds", "seconds a beat, median"),
    ):
        costs = summary[cost] if cost in summary else pd.Series(np.nan, summary.index)
        table = summary.assign(**{cost: costs.where(costs > 0)})  # without bootstraps, complexity is 0
        for bits, group in table.groupby("q_bits"):
            axis.scatter(
                group[cost], drawn_at(group["balanced_accuracy_test_set"]), s=28, label=f"{bits} bits", zorder=3
            )
        front = table[table["on_front"]].sort_values(cost)
        axis.plot(front[cost], drawn_at(front["balanced_accuracy_test_set"]), color="black", lw=1, label="front")
        known = others[others[other_cost].notna() & others["balanced_accuracy"].notna()]
        for kind, group in known.groupby("kind"):
            at = drawn_at(group["balanced_accuracy"])
            style = {"facecolor": "lightgrey", "edgecolor": "black", "marker": MARKERS.get(kind, "v")}
            axis.scatter(group[other_cost], at, s=40, label=kind, zorder=2, **style)
        axis.set(yscale="logit", xlabel=label)
        if table[cost].notna().any() or len(known):  # matplotlib has no logarithmic axis of nothing
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1,) if cost == "complexity" else (1, 2, 3, 5)))
        axis.xaxis.set_minor_formatter("")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks(ACCURACY_TICKS, minor=False)
        axis.set_ylim(1 - 1.3 * (1 - everything.min()), 1 - (1 - everything.max()) / 1.3)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axis.yaxis.set_minor_formatter("")
        label_points(axis, known["name"], known[other_cost], drawn_at(known["balanced_accuracy"]))
    shown = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8)
    figure.suptitle("Cost of encrypted inference (front: best validation accuracy at its cost)")
    save_figure(figure, path)


class Report:
    """What is written from the store for the configurations of the identities in `known`, in their order.

    basis: of the rows in its comparison; patients: which the test set has; beside: a folder that is shown beside.
    """

    def __init__(
        self,
        workdir: Path,
        store: Store,
        known: Sequence[str],
        basis: str,
        settings: dict[str, Any],
        patients: str,
        beside: Path | None,
    ) -> None:
        self.workdir, self.store, self.known, self.basis, self.settings = workdir, store, known, basis, settings
        self.patients, self.beside = patients, beside

    def write_batch(self, batch: int) -> None:
        """Write results_batch_{batch}.xlsx."""
        rows, predictions = self.store.results(self.known, batch), self.store.predictions(self.known, batch)
        write_batch(self.workdir / f"results_batch_{batch}.xlsx", rows, predictions, self.settings)

    def write(self, batches: Sequence[int] | None = None) -> None:
        """Write the workbooks of `batches` (None: of all), the summary and the picture; print what they show.

        Raises InputError when the store has no row of these configurations.
        """
        rows = self.store.results(self.known)
        if not len(rows):
            raise InputError(f"{self.store.path}: holds no result of these networks, data and settings yet")
        batches = sorted(set(rows["batch"])) if batches is None else batches
        for batch in tqdm(batches, desc="workbooks", unit="file", disable=len(batches) < 2):
            self.write_batch(batch)
        others = self.store.comparison(self.basis).reindex(columns=COMPARISON_COLUMNS)
        compared = others.loc[others["compared"].eq(True), "complexity"]
        summary = summarize(rows, self.store.predictions(self.known), compared.min())
        steps = [steps_table(self.workdir, summary, self.patients)]
        with whole_file(self.workdir / STEPS) as temporary:
            steps[0].to_csv(temporary, index=False)
        steps += [read_steps(self.beside)] if self.beside else []
        by_class = encrypted_by_class(self.store.predictions(self.known), rows)
        more = {"encrypted by class": by_class, "steps": side_by_side(steps), "comparison": others}
        write_summary(self.workdir / "fhe_summary.xlsx", summary, more, self.settings)
        written = [f"results_batch_{batch}.xlsx" for batch in batches]
        if len(batches) > 1:
            written = [f"{len(batches)} results_batch_*.xlsx"]
        written += ["fhe_summary.xlsx", STEPS]
        if summary["complexity"].notna().any():
            plot_frontier(summary, others[others["kind"] != OURS], self.workdir / "fhe_frontier.png")
            written.append("fhe_frontier.png")
        if len(steps[0]):
            plot_steps(steps, self.workdir / "fhe_steps.png")
            written.append("fhe_steps.png")
        shown = summary[[name for name in PRINTED_COLUMNS if name in summary]]
        print(f"\n{shown.to_string(index=False, float_format='{:.4g}'.format)}\n")
        for _, row in summary[summary["status"] != "ok"].iterrows():
            print(f"{row['model_name']} at {row['q_bits']} bits: {row['status']}, {row['reason']}")
        print(f"wrote {', '.join(written)} to {self.workdir}")
