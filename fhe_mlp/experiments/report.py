"""Workbooks and pictures of step 5, written from the database and never read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.cli import InputError, digest, whole_file
from fhe_mlp.experiments.configuration import Experiment
from fhe_mlp.experiments.figures import plot_frontier, plot_steps
from fhe_mlp.experiments.results import Results
from fhe_mlp.experiments.steps import STEPS, read_beside, side_by_side, steps_table
from fhe_mlp.experiments.workbooks import columns_of, settings_sheet, write_workbook

OURS = "this pipeline"  # kind of the models in a comparison that the summary has already


@dataclass(frozen=True, eq=False)
class Draws:
    """Test rows that are drawn: the first of each batch, which is a stretch of an order of all."""

    order: np.ndarray  # (test rows,)
    size: int  # of a batch
    samples: int  # rows drawn from each
    batches: range

    @property
    def all_rows(self) -> np.ndarray:
        """Numbers of the test rows drawn from all batches."""
        return np.concatenate([self.rows(batch) for batch in self.batches])

    def rows(self, batch: int) -> np.ndarray:
        """Return the rising numbers of the test rows drawn from a batch."""
        return np.sort(self.order[batch * self.size : (batch + 1) * self.size][: self.samples])

    def batch_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the batches of test rows, both (n,)."""
        return np.argsort(self.order)[rows] // self.size


@dataclass(frozen=True, eq=False)
class Report:
    """Workbooks and pictures of the configurations with these keys, in their order."""

    workdir: Path
    results: Results
    keys: list[str]
    experiment: Experiment
    draws: Draws
    settings: dict[str, Any]
    beside: Path | None  # another folder, to be shown beside

    def write(self) -> None:
        """Write all workbooks and pictures, and print what they show.

        Raises InputError when the database has no row of these configurations.
        """
        facts = pd.DataFrame(self.results.facts(self.keys))
        if not len(facts):
            raise InputError(f"{self.results.path}: holds no result of these networks, data and settings yet")
        runs, settings = self.runs(facts), settings_sheet(self.settings)
        batches = sorted({*self.draws.batches, *runs["batch"]})
        for batch in batches:
            predictions = select(runs[runs["batch"] == batch], "predictions")
            sheets = {"results": self.batch_table(batch, facts, runs), "predictions": predictions, "settings": settings}
            write_workbook(self.workdir / f"results_batch_{batch}.xlsx", sheets)
        summary, others = summarize(facts, runs), self.results.comparison(digest(repr(self.experiment.basis)))
        steps, others = self.steps(summary), others.reindex(columns=columns_of("comparison"))
        sheets = {"summary": select(summary, "summary"), **pivots(summary), "encrypted by class": by_class(runs)}
        sheets |= {"steps": side_by_side(steps), "comparison": others, "settings": settings}
        write_workbook(self.workdir / "fhe_summary.xlsx", {name: table for name, table in sheets.items() if len(table)})
        written = [f"{len(batches)} results_batch_*.xlsx" if len(batches) > 1 else f"results_batch_{batches[0]}.xlsx"]
        written += ["fhe_summary.xlsx", STEPS]
        if summary["complexity"].notna().any():
            plot_frontier(summary, others[others["kind"] != OURS], self.workdir / "fhe_frontier.png")
            written.append("fhe_frontier.png")
        if len(sheets["steps"]):
            plot_steps(steps, self.workdir / "fhe_steps.png")
            written.append("fhe_steps.png")
        print(f"\n{select(summary, 'printed').to_string(index=False, float_format='{:.4g}'.format)}\n")
        for _, row in summary[summary["status"] != "ok"].iterrows():
            print(f"{row['model_name']} at {row['q_bits']} bits: {row['status']}, {row['reason']}")
        print(f"wrote {', '.join(written)} to {self.workdir}")

    def runs(self, facts: pd.DataFrame) -> pd.DataFrame:
        """Return a row a configuration and test row that ran encrypted, with what is known of the beat.

        facts: a row a configuration, of Results.facts.
        """
        test = self.experiment.data.test
        runs = self.results.runs(self.keys).merge(facts[["identity", "model_name", "q_bits"]], on="identity")
        rows = runs["test_row"].to_numpy(int)
        clear = {identity: self.results.clear(identity) for identity in runs["identity"].unique()}
        runs["output_clear"] = [clear[identity][row] for identity, row in zip(runs["identity"], rows)]
        for kind in ("clear", "fhe"):
            runs[f"decision_{kind}"] = (runs[f"output_{kind}"] > 0).astype(int)
        for name in ("record", "aami"):
            runs[name] = test.beats[name].to_numpy()[rows] if test.named else ""
        return runs.assign(batch=self.draws.batch_of(rows), label=test.y[rows])

    def batch_table(self, batch: int, facts: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
        """Return a row a configuration that ran on a batch, or on none, the published columns first."""
        table, y = [], self.experiment.data.test.y
        for row in facts.to_dict("records"):
            everywhere = runs[runs["identity"] == row["identity"]]
            own, clear = everywhere[everywhere["batch"] == batch], self.results.clear(row["identity"])
            if len(everywhere) and not len(own):
                continue
            index = own["test_row"].to_numpy() if len(own) else self.draws.rows(batch)
            row |= {"batch": batch, "num_items": len(index), **shares("gt", y[index])}
            if clear is not None:
                decided = clear[index] > 0
                row |= {"clear_time": row["clear_seconds_per_row"] * len(index), **shares("pred_clear", decided)}
                row["accuracy_clear"] = np.mean(decided == y[index])
            table.append(row | (encrypted_columns(own) if len(own) else {}))
        table = pd.DataFrame(table)
        return table.reindex(columns=list(dict.fromkeys([*columns_of("batch"), *table])))

    def steps(self, summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Write the figures of all steps, and return them with those of the folder beside, by name of the folder."""
        table = steps_table(self.workdir, summary, self.experiment.data.patients)
        with whole_file(self.workdir / STEPS) as temporary:
            table.to_csv(temporary, index=False)
        if not self.beside:
            return {self.workdir.resolve().name: table}
        names, other = read_beside(self.workdir, self.beside)
        return dict(zip(names.values(), (table, other)))


def select(table: pd.DataFrame, sheet: str) -> pd.DataFrame:
    """Return those columns of a table that stand in a sheet."""
    return table[[name for name in columns_of(sheet) if name in table]]


def shares(kind: str, abnormal: np.ndarray) -> dict[str, float]:
    """Return the published percentages of abnormal and normal beats; abnormal: (n,)."""
    ones = 100 * float(np.mean(abnormal))
    return {f"perc_ones_{kind}": ones, f"perc_zeros_{kind}": 100 - ones}


def encrypted_columns(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the columns that encrypted runs of one configuration add to a row.

    Times per beat are medians with their interquartile range; the interval is Wilson's, JASA 22:209-212, 1927.
    """
    from scipy.stats import binomtest

    equal = int((runs["decision_fhe"] == runs["decision_clear"]).sum())
    interval = binomtest(equal, len(runs)).proportion_ci(0.95, method="wilson")
    parts, alone = ["encrypt_seconds", "run_seconds", "decrypt_seconds"], runs[runs["beats"] == 1]
    quartiles = alone[parts].quantile([0.25, 0.5, 0.75])
    return {
        "fhe_time": float(runs[parts].to_numpy().sum()),
        "accuracy_fhe": float((runs["decision_fhe"] == runs["label"]).mean()),
        **shares("pred_fhe", runs["decision_fhe"]),
        "decisions_equal_clear": equal,
        "agreement": equal / len(runs),
        "agreement_low95": float(interval.low),
        "agreement_high95": float(interval.high),
        "outputs_equal_clear": int(np.isclose(runs["output_fhe"], runs["output_clear"]).sum()),
        **quartiles.loc[0.5].to_dict(),
        "run_seconds_iqr": quartiles.loc[0.75, "run_seconds"] - quartiles.loc[0.25, "run_seconds"],
        "run_seconds_grouped": runs.loc[runs["beats"] > 1, "run_seconds"].median(),
        "beats_per_call": runs["beats"].max(),
        "input_ciphertext_kB": alone["input_bytes"].median() / 1e3,
        "output_ciphertext_kB": alone["output_bytes"].median() / 1e3,
        **runs[["processor", "cores"]].iloc[0].to_dict(),
    }


def pareto(cost: pd.Series, accuracy: pd.Series) -> pd.Series:
    """Return True for each point whose accuracy no other point of the same or lower cost reaches."""
    order = pd.DataFrame({"cost": cost, "accuracy": accuracy}).sort_values(
        ["cost", "accuracy"], ascending=[True, False]
    )
    best_before = order["accuracy"].cummax().shift(fill_value=-np.inf)
    return (order["accuracy"] > best_before).reindex(cost.index)


def summarize(facts: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row a configuration (two where unlike machines ran it), the lowest complexity first.

    facts: of Results.facts; runs: of Report.runs. on_front is judged by validation accuracy, with the noise of
    encryption where it is known.
    """
    rows = []
    for row in facts.to_dict("records"):
        own = runs[runs["identity"] == row["identity"]]
        for _, ran in own.groupby(["processor", "cores"], sort=False):
            rows.append(row | {"batches": ran["batch"].nunique(), "n": len(ran), **encrypted_columns(ran)})
        if not len(own):
            rows.append(row)
    table = pd.DataFrame(rows)
    table = table.reindex(columns=list(dict.fromkeys([*table, *columns_of("summary")])))  # where all failed, some lack
    table["complexity"] = pd.to_numeric(table["complexity"])
    accuracy = table["noisy_balanced_accuracy_validation"].fillna(table["balanced_accuracy_validation"])
    ranked = table[table["complexity"].notna() & accuracy.notna()].drop_duplicates("identity").index
    front = pareto(table["complexity"][ranked], accuracy[ranked].astype(float))
    table["on_front"] = table["identity"].isin(table["identity"][ranked][front])
    return table.sort_values(["complexity", "model_name", "q_bits"], ignore_index=True)


def pivots(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return sheets of models by bits: accuracy cleartext and encrypted, and seconds per beat, by machine if unlike."""

    def by_bits(values: str, what: str, index: list[str]) -> pd.DataFrame:
        table = summary.pivot_table(values=values, index=index, columns="q_bits", sort=False)
        table = table[sorted(table)].rename(columns="{:.0f} bits".format).reset_index()
        table.insert(1, "measured", what)
        return table

    beats = "{:.0f} to {:.0f} rows".format(summary["n"].min(), summary["n"].max())
    clear = by_bits("balanced_accuracy_test_set", "balanced accuracy, cleartext, test set", ["model_name"])
    encrypted = by_bits("accuracy_fhe", f"accuracy, encrypted, {beats}", ["model_name"])
    seconds = by_bits(
        "run_seconds", f"median seconds per beat, encrypted, {beats}", ["model_name", "processor", "cores"]
    )
    return {"accuracy by bits": pd.concat([clear, encrypted]), "seconds by bits": seconds}


def by_class(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row a configuration and AAMI class of its encrypted beats: how many, right, and equal to cleartext."""
    named = runs[runs["aami"] != ""]
    right, equal = (named["decision_fhe"] == named[other] for other in ("label", "decision_clear"))
    groups = named.assign(right=right, equal=equal).groupby(["model_name", "q_bits", "aami"], sort=False)
    counts = {"beats": ("label", "size"), "records": ("record", "nunique")}
    return groups.agg(**counts, right=("right", "sum"), equal=("equal", "sum")).reset_index()
