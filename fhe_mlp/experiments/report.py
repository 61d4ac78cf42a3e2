"""Workbooks and pictures of step 5, written from the database and never read back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import ecg
from fhe_mlp.cli import InputError, digest, first_line, whole_file
from fhe_mlp.experiments.configuration import Draws, Experiment
from fhe_mlp.experiments.figures import plot_frontier, plot_steps
from fhe_mlp.experiments.results import Results
from fhe_mlp.experiments.workbooks import columns_of, settings_sheet, write_workbook

OURS = "this pipeline"  # kind of the models in a comparison that the summary has already
STEPS = "fhe_steps.csv"  # the figures of all steps, for a table with those of another folder
Tables = dict[str, pd.DataFrame]  # of steps_table, by the name of their folder


@dataclass(frozen=True, eq=False)
class Report:
    """Workbooks and pictures of the configurations with these keys, in their order."""

    workdir: Path
    results: Results
    keys: list[str]
    experiment: Experiment
    draws: Draws
    settings: dict[str, Any]
    beside: tuple[str, Tables] | None  # of read_beside

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
        others = others.reindex(columns=columns_of("comparison"))
        own = steps_table(self.workdir, summary, self.experiment.data.patients)
        with whole_file(self.workdir / STEPS) as temporary:
            own.to_csv(temporary, index=False)
        name, beside = self.beside or (self.workdir.resolve().name, {})
        steps = {name: own, **beside}
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


def summarize(facts: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row a configuration (two where unlike machines ran it), the lowest complexity first.

    facts: of Results.facts; runs: of Report.runs. on_front: no other configuration of the same or lower complexity has
    as good a validation accuracy, with the noise of encryption where it is known.
    """
    rows = []
    for row in facts.to_dict("records"):
        by_machine = runs[runs["identity"] == row["identity"]].groupby(["processor", "cores"], sort=False)
        ran = [{"batches": own["batch"].nunique(), "n": len(own), **encrypted_columns(own)} for _, own in by_machine]
        rows += [row | columns for columns in ran or [{}]]
    table = pd.DataFrame(rows)
    table = table.reindex(columns=list(dict.fromkeys([*table, *columns_of("summary")])))  # where all failed, some lack
    table["complexity"] = pd.to_numeric(table["complexity"])
    accuracy = table["noisy_balanced_accuracy_validation"].fillna(table["balanced_accuracy_validation"]).astype(float)
    ranked = table.assign(accuracy=accuracy).dropna(subset=["complexity", "accuracy"]).drop_duplicates("identity")
    ranked = ranked.sort_values(["complexity", "accuracy"], ascending=[True, False])
    better = ranked["accuracy"] > ranked["accuracy"].cummax().shift(fill_value=-np.inf)
    table["on_front"] = table["identity"].isin(ranked["identity"][better])
    return table.sort_values(["complexity", "model_name", "q_bits"], ignore_index=True)


def pivots(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return sheets of models by bits: accuracy cleartext and encrypted, and seconds per beat, by machine if unlike."""

    def by_bits(values: str, what: str, *machine: str) -> pd.DataFrame:
        table = summary.pivot_table(values=values, index=["model_name", *machine], columns="q_bits", sort=False)
        table = table[sorted(table)].rename(columns="{:.0f} bits".format).reset_index()
        table.insert(1, "measured", what)
        return table

    encrypted = "encrypted, {:.0f} to {:.0f} rows".format(summary["n"].min(), summary["n"].max())
    accuracies = [
        by_bits("balanced_accuracy_test_set", "balanced accuracy, cleartext, test set"),
        by_bits("accuracy_fhe", f"accuracy, {encrypted}"),
    ]
    seconds = by_bits("run_seconds", f"median seconds per beat, {encrypted}", "processor", "cores")
    return {"accuracy by bits": pd.concat(accuracies), "seconds by bits": seconds}


def by_class(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row a configuration and AAMI class of its encrypted beats: how many, right, and equal to cleartext."""
    named = runs[runs["aami"] != ""]
    right, equal = (named["decision_fhe"] == named[other] for other in ("label", "decision_clear"))
    groups = named.assign(right=right, equal=equal).groupby(["model_name", "q_bits", "aami"], sort=False)
    counts = {"beats": ("label", "size"), "records": ("record", "nunique")}
    return groups.agg(**counts, right=("right", "sum"), equal=("equal", "sum")).reset_index()


def read_json(path: Path) -> dict[str, Any]:
    """Return what a step wrote about its networks, nothing where it has not run here."""
    return json.loads(path.read_text()) if path.exists() else {}


def steps_table(workdir: Path, summary: pd.DataFrame, patients: str) -> pd.DataFrame:
    """Return a row a network of steps 1 to 5, in their order, with the figures of the test set and encrypted decisions.

    What a step has not written to `workdir` is left out. Float networks are named by the neurons removed, since ranks
    differ between folders. patients: of the test set, for the column of that name.
    """
    zeros = read_json(workdir / "tf_pruned_model_metrics.json")
    tested = {"baseline": read_json(workdir / "MLP_model_0_metrics.json").get("test")}
    tested["hidden weights zeroed"] = zeros.get("figures", {}).get("reloaded", {}).get("test")
    rows = [{"step": n, "network": name, **ecg.columns(f)} for n, (name, f) in enumerate(tested.items(), 1) if f]
    for rate in read_json(workdir / "dynamic_pruning_metrics.json").get("rates", []):
        figures = {name.removeprefix("test_"): rate[name] for name in rate if name.startswith("test_")}
        rows.append({"step": 3, "network": f"{rate['rate_percent']} % of neurons removed", **figures})
    for row in summary.dropna(subset="balanced_accuracy_test_set").to_dict("records"):
        removed = re.search(r"_prune_(\d+)_acc_", row["model_name"])
        name = f"{removed[1]} % of neurons removed" if removed else row["model_name"]
        figures = {column.removesuffix("_test_set"): value for column, value in row.items()}
        rows.append({"step": 5, "network": f"{name}, {row['q_bits']} bits", **figures})
    table = pd.DataFrame(rows, columns=None if rows else ["step", "network"]).drop_duplicates("network")
    table.insert(0, "patients", patients)
    shown = ["patients", "step", "network", *columns_of("steps")]
    return in_order(table[[name for name in shown if name in table]])


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by step, share of neurons removed, and bits; table: columns step and network."""
    removed = table["network"].astype(str).str.extract(r"^(\d+) %", expand=False).astype(float)
    table = table.assign(removed=removed).sort_values(["step", "removed", "network"], ignore_index=True)
    return table.drop(columns="removed")


def read_beside(workdir: Path, beside: Path) -> tuple[str, Tables]:
    """Return a short name of `workdir`, and the table that step 5 wrote to another folder by the name of that.

    Raises InputError where the folders are the same, or the second has no such table.
    """
    own, other, path = workdir.resolve(), beside.resolve(), beside / STEPS
    if own == other:
        raise InputError(f"--beside {beside}: is the --workdir itself; name another one")
    try:
        table = pd.read_csv(path).astype({"patients": str, "network": str, "balanced_accuracy": float})
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {first_line(error)}; make it with: python fhe_experiments.py") from None
    return (own.name, {other.name: table}) if own.name != other.name else (str(own), {str(other): table})


def side_by_side(tables: Tables) -> pd.DataFrame:
    """Return a row a network of any of the tables, the columns of each with the name of its folder."""
    index = ["step", "network"]
    figures = {folder: table.drop(columns="patients").set_index(index) for folder, table in tables.items()}
    joined = pd.concat(figures, axis=1)
    joined.columns = [f"{name}, {folder}" for folder, name in joined.columns]
    names = [f"{name}, {folder}" for name in columns_of("steps") for folder in tables]
    return in_order(joined.reset_index()[[*index, *(name for name in names if name in joined)]])
