"""What step 5 leaves: workbooks that a run can go on from, their summary, and the picture of accuracy against price."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.common import InputError, first_line, save_figure, write_workbook
from fhe_mlp.experiment import Result, encrypted_columns

PUBLISHED_COLUMNS = (
    "model_name num_items batch q_bits compile_time clear_time accuracy_clear perc_ones_gt perc_zeros_gt "
    "perc_ones_pred_clear perc_zeros_pred_clear fhe_time accuracy_fhe perc_ones_pred_fhe perc_zeros_pred_fhe"
).split()
FINISHED = ("ok", "cannot compile")  # a configuration of another status is tried again
REMEDY = "move it away or delete it, then run the same command again"
PREDICTED_NUMBERS = (
    "batch test_row label decision_clear decision_fhe output_clear output_fhe encrypt_seconds run_seconds "
    "decrypt_seconds input_bytes output_bytes"
).split()
TEXT_COLUMNS = r"^(model_name|status|reason|way|host|processor|identity)$|_sha256$|^(concrete|onnx|numpy)"
TEXTS = [
    "identity",
    "network_sha256",
    "data_sha256",
    "code_sha256",
    "rows_sha256",
    "host",
]  # which may look like numbers
SUMMARY_COLUMNS = (
    "model_name q_bits way rounding_bits pbs complexity times_cheaper_than_plain on_front accuracy_clear_validation "
    "accuracy_clear_test_set accuracy_simulated accuracy_clear_same_rows n accuracy_fhe accuracy_fhe_low95 "
    "accuracy_fhe_high95 decisions_equal_clear run_seconds run_seconds_iqr encrypt_seconds decrypt_seconds keygen_time "
    "evaluation_keys_MB input_ciphertext_kB output_ciphertext_kB batches processor cores status reason"
).split()
MARKERS = {"plain way": "D", "Concrete ML's models": "s", "CKKS": "^"}
POINT_COLUMNS = ["name", "kind", "accuracy", "complexity", "seconds"]  # of models that the picture shows beside ours
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile)


def read_sheets(path: Path, names: Sequence[str], remedy: str) -> list[pd.DataFrame]:
    """Sheets of a workbook. Raises InputError when it is damaged or another program's."""
    try:
        sheets = pd.read_excel(path, sheet_name=list(names), dtype=dict.fromkeys(TEXTS, str))
        return [sheets[name] for name in names]
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from None


def check_sheets(path: Path, batch: int, rows: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """Raises InputError unless the sheets of a results workbook are as they were written, with all their numbers."""
    try:
        if rows["identity"].duplicated().any():
            raise ValueError("two rows of one identity")
        if any((table["batch"] != batch).any() for table in (rows, predictions) if len(table)):
            raise ValueError("rows of another batch")
        if rows[["model_name", "status"]].isna().any(axis=None):
            raise ValueError("a row without model or status")
        numbers = [name for name in rows if not re.search(TEXT_COLUMNS, name)]
        for table, names in ((rows, numbers), (predictions, PREDICTED_NUMBERS if len(predictions) else [])):
            for name in names:
                if table[name].dtype.kind not in "fiub" and table[name].notna().any():
                    raise ValueError(f"column {name} holds text")
        if rows[["num_items", "batch", "q_bits"]].isna().any(axis=None):
            raise ValueError("a row without num_items, batch or q_bits")
        if len(predictions) and predictions[[*PREDICTED_NUMBERS, "identity"]].isna().any(axis=None):
            raise ValueError("a prediction without its numbers")
        ran = rows[rows["status"] == "ok"].set_index("identity")
        if ran[["processor", "cores", "complexity", "run_seconds"]].isna().any(axis=None):
            raise ValueError("a row that ran without machine, complexity or seconds")
        found = predictions["identity"].value_counts()
        if found.to_dict() != ran["num_items"].to_dict():
            raise ValueError("sheet predictions does not have the rows that sheet results counts")
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: was changed since it was written ({first_line(error)}); {REMEDY}") from None


class Workbooks:
    """The files results_batch_{number}.xlsx in a folder: the rows of this experiment, kept up to date on disk.

    order: the identities of all configurations that may stand in them, in the order in which rows are shown. A workbook
    with a row of any other identity (another model file, data set, setting, version or program) is renamed, not mixed.
    """

    def __init__(self, workdir: Path, order: Sequence[str], settings: dict[str, Any]) -> None:
        self.workdir, self.order, self.settings = workdir, list(order), settings
        self.rows: dict[int, list[dict[str, Any]]] = {}
        self.predictions: dict[int, list[pd.DataFrame]] = {}
        self.foreign: list[Path] = []
        for path in sorted(workdir.glob("results_batch_*.xlsx")):
            if not re.fullmatch(r"results_batch_(0|[1-9]\d*)", path.stem):  # kept from an earlier experiment, say
                continue
            batch = int(path.stem.removeprefix("results_batch_"))
            rows, predictions = read_sheets(path, ("results", "predictions"), REMEDY)
            if not {"identity", "batch"} <= set(rows) or not set(rows["identity"]) <= set(self.order):
                self.foreign.append(path)
                continue
            check_sheets(path, batch, rows, predictions)
            records = rows.astype(object).where(rows.notna(), None).to_dict("records")
            self.rows[batch] = [{k: v for k, v in record.items() if v is not None} for record in records]
            self.predictions[batch] = [t for _, t in predictions.groupby("identity")] if len(predictions) else []

    def set_foreign_aside(self) -> None:
        """Rename workbooks of another experiment and what was drawn from them, and say to what."""
        drawn = [self.workdir / name for name in ("fhe_summary.xlsx", "fhe_frontier.png")] if self.foreign else []
        for path in [*self.foreign, *(path for path in drawn if path.exists())]:
            number = 1
            while (new := path.with_name(f"{path.stem}_earlier_{number}{path.suffix}")).exists():
                number += 1
            path.rename(new)
            print(f"{path.name} is of other networks, data or settings: kept as {new.name}")
        self.foreign = []

    def finished(self, identity: str, batch: int) -> bool:
        """Whether a configuration has its final row for a batch."""
        return any(row["identity"] == identity and row["status"] in FINISHED for row in self.rows.get(batch, []))

    def add(self, result: Result) -> None:
        """Put a result in the place of an earlier one of the same configuration, and write the batch's workbook."""
        batch, identity = result.batch, result.row["identity"]
        rows = [row for row in self.rows.get(batch, []) if row["identity"] != identity]
        tables = [t for t in self.predictions.get(batch, []) if t["identity"].iloc[0] != identity]
        self.rows[batch] = sorted([*rows, result.row], key=lambda row: self.order.index(row["identity"]))
        if result.predictions is not None:
            tables = sorted([*tables, result.predictions], key=lambda t: self.order.index(t["identity"].iloc[0]))
        self.predictions[batch] = tables
        table = pd.DataFrame(self.rows[batch])
        first = [*PUBLISHED_COLUMNS, "status", "reason"]
        sheets = {
            "results": table.reindex(columns=[*first, *(name for name in table if name not in first)]),
            "predictions": pd.concat(tables) if tables else pd.DataFrame(columns=["identity"]),
            "settings": settings_sheet(self.settings),
        }
        write_workbook(self.workdir / f"results_batch_{batch}.xlsx", sheets)

    def all_rows(self) -> pd.DataFrame:
        """The rows of all batches."""
        return pd.DataFrame([row for batch in sorted(self.rows) for row in self.rows[batch]])

    def all_predictions(self) -> pd.DataFrame:
        """The predictions of all batches."""
        tables = [table for batch in sorted(self.predictions) for table in self.predictions[batch]]
        return pd.concat(tables) if tables else pd.DataFrame({"identity": []})


def settings_sheet(settings: dict[str, Any]) -> pd.DataFrame:
    """Settings as a sheet of two columns."""
    return pd.DataFrame(settings.items(), columns=["setting", "value"])


def pareto(cost: pd.Series, accuracy: pd.Series) -> pd.Series:
    """True for each point that no cheaper or equally dear one equals or exceeds in accuracy."""
    order = pd.DataFrame({"cost": cost, "accuracy": accuracy}).sort_values(
        ["cost", "accuracy"], ascending=[True, False]
    )
    best_before = order["accuracy"].cummax().shift(fill_value=-np.inf)
    return (order["accuracy"] > best_before).reindex(cost.index)


def read_plain(workdir: Path) -> pd.DataFrame:
    """Sheet "plain way" of an earlier fhe_summary.xlsx, empty where there is none, or not as it was written."""
    path = workdir / "fhe_summary.xlsx"
    if not path.exists():
        return pd.DataFrame()
    table = read_sheets(path, ["plain way"], "delete it, then run the same command again")[0]
    numbers = table.reindex(columns=["q_bits", "complexity", "accuracy_clear_validation", "accuracy_clear_test_set"])
    whole = all(kind.kind in "fi" for kind in numbers.dtypes) and table.get("compared", numbers["q_bits"]).dtype == bool
    return table if whole else pd.DataFrame()


def summarize(rows: pd.DataFrame, predictions: pd.DataFrame, plain: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration (two where unlike machines ran it) over all its batches, the cheapest first.

    plain: of plain_prices; on_front is judged by validation accuracy.
    """
    first = ["model_name", "q_bits", "way", "rounding_bits", "p_error", "pbs", "complexity"]
    first += ["accuracy_clear_validation", "accuracy_clear_test_set", "test_set_rows"]
    first += ["accuracy_simulated", "accuracy_clear_same_rows", "simulated_rows", "widest_integer_bits"]
    first += ["evaluation_keys_MB", "keygen_time", "processor", "cores", "status", "reason"]
    found = []
    rows = rows.reindex(columns=list(dict.fromkeys([*rows, "processor", "cores"])))  # failed rows may have none
    for _, group in rows.groupby(["identity", "processor", "cores"], sort=False, dropna=False):
        ran = group[group["status"] == "ok"]
        row = group.reindex(columns=first).iloc[-1].to_dict() | {"batches": len(group)}
        if len(ran):
            mine = predictions.merge(ran[["identity", "batch"]], on=["identity", "batch"])
            row |= {"n": len(mine), **encrypted_columns(mine)}
        found.append(row)
    table = pd.DataFrame(found).drop(columns="fhe_time", errors="ignore")
    price = pd.to_numeric(table["complexity"])
    if plain["compared"].any():
        dear = plain.loc[plain["compared"], "complexity"].iloc[0]
        table.insert(table.columns.get_loc("complexity") + 1, "times_cheaper_than_plain", dear / price)
    compiled = price.notna() & table["accuracy_clear_validation"].notna()
    table["on_front"] = False
    distinct = table[compiled].drop_duplicates(["model_name", "q_bits"])
    front = distinct.index[pareto(price[distinct.index], distinct["accuracy_clear_validation"])]
    chosen = set(map(tuple, table.loc[front, ["model_name", "q_bits"]].to_numpy()))
    table["on_front"] = [pair in chosen for pair in zip(table["model_name"], table["q_bits"])]
    return table.sort_values("complexity", ignore_index=True)


def pivots(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Sheets of models by bit widths: accuracy in clear and encrypted, and seconds a beat, by machine where unlike."""

    def by_bits(values: str, what: str, index: list[str]) -> pd.DataFrame:
        table = (
            summary.pivot_table(values=values, index=index, columns="q_bits", sort=False) if values in summary else None
        )
        if table is None or table.empty:
            return pd.DataFrame()
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
                by_bits("accuracy_clear_test_set", f"accuracy, quantized, in clear, {rows} test rows", ["model_name"]),
                by_bits("accuracy_fhe", f"accuracy, encrypted, {beats} rows", ["model_name"]),
            ]
        ),
        "seconds by bits": by_bits("run_seconds", f"median seconds a beat, encrypted, {beats} rows", machine),
    }


def write_summary(workdir: Path, workbooks: Workbooks, plain: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """Write fhe_summary.xlsx from all batches, and return its first sheet."""
    summary = summarize(workbooks.all_rows(), workbooks.all_predictions(), plain)
    shown = summary[[name for name in SUMMARY_COLUMNS if name in summary]]
    sheets = {"summary": shown, **pivots(summary), "plain way": plain, "settings": settings_sheet(settings)}
    write_workbook(workdir / "fhe_summary.xlsx", sheets)
    return summary


def plot_frontier(summary: pd.DataFrame, others: pd.DataFrame, path: Path) -> None:
    """Test accuracy against complexity and against seconds a beat: every configuration, the front, and the others.

    others: columns name, kind, accuracy, complexity and seconds, missing where unknown. The accuracy axis is a logit
    scale, so that 98 % and 99 % lie as far apart as 50 % and 67 %.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(15, 6.5), sharey=True)
    axes[0].set_ylabel("accuracy, whole test set, quantized")
    for axis, cost, other_cost, label in (
        (axes[0], "complexity", "complexity", "complexity of one encrypted beat"),
        (axes[1], "run_seconds", "seconds", "seconds a beat, median"),
    ):
        table = summary[summary[cost].notna()] if cost in summary else summary[:0].assign(**{cost: []})
        for bits, group in table.groupby("q_bits"):
            axis.scatter(group[cost], clipped(group["accuracy_clear_test_set"]), s=28, label=f"{bits} bits", zorder=3)
        front = table[table["on_front"]].sort_values(cost)
        axis.plot(front[cost], clipped(front["accuracy_clear_test_set"]), color="black", lw=1, label="front")
        for kind, group in others[others[other_cost].notna()].groupby("kind"):
            marker = MARKERS.get(kind, "v")
            points = axis.scatter(
                group[other_cost], clipped(group["accuracy"]), marker=marker, s=40, label=kind, zorder=2
            )
            points.set_facecolor("lightgrey")
            points.set_edgecolor("black")
            for _, row in group.iterrows():
                at = (row[other_cost], clipped(row["accuracy"]))
                dear = row[other_cost] > others[other_cost].max() / 20  # its name would leave the picture
                place = {"xytext": (-5, -9), "ha": "right"} if dear else {"xytext": (5, -9)}
                axis.annotate(row["name"], at, textcoords="offset points", fontsize=7, **place)
        axis.set(xscale="log", yscale="logit", xlabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if cost == "complexity" else (1, 2, 3, 5)))
        axis.xaxis.set_minor_formatter("")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks([0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99], minor=False)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axis.yaxis.set_minor_formatter("")
    axes[0].legend(loc="lower left", fontsize=8)
    figure.suptitle("Price of encrypted inference (front: best validation accuracy at its price)")
    save_figure(figure, path)


def clipped(accuracy: Any) -> Any:
    """Accuracies that have a place on a logit scale."""
    return np.clip(accuracy, 0.45, 0.995)


def read_benchmark(workdir: Path) -> pd.DataFrame:
    """Points of benchmark.xlsx for the picture, none where no benchmark was run in `workdir`."""
    path = workdir / "benchmark.xlsx"
    if not path.exists():
        return pd.DataFrame(columns=POINT_COLUMNS)
    table = read_sheets(path, ["benchmark"], "delete it or run: make bench")[0].reindex(columns=POINT_COLUMNS)
    if any(table[name].dtype.kind not in "fi" for name in ("accuracy", "complexity", "seconds")):
        raise InputError(f"{path}: holds text where numbers belong; delete it or run: make bench")
    return table[table["kind"] != "this pipeline"]


def other_points(plain: pd.DataFrame, benchmark: pd.DataFrame) -> pd.DataFrame:
    """Points for the picture beside our own: the plain way's prices and what read_benchmark gave."""
    plain = plain.reindex(columns=["q_bits", "accuracy_clear_test_set", "complexity"]).dropna()
    points = pd.DataFrame({"name": [f"plain {bits} bits" for bits in plain["q_bits"]], "kind": "plain way"})
    points["accuracy"], points["complexity"] = plain[["accuracy_clear_test_set", "complexity"]].to_numpy().T
    if (benchmark["kind"] == "plain way").any():  # which has the same points, and seconds
        points = points[:0]
    return pd.concat([points, benchmark]).reindex(columns=POINT_COLUMNS).dropna(subset="accuracy")
