"""The networks of all steps in one table and picture, beside those of another folder: float, quantized, encrypted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import ec57
from fhe_mlp.cli import InputError, first_line
from fhe_mlp.pictures import save_figure

STEPS = "fhe_steps.csv"  # the figures of all steps, for a table with those of another folder
SIDE_BY_SIDE = (  # columns of that table
    "balanced_accuracy balanced_accuracy_low95 balanced_accuracy_high95 sensitivity specificity "
    "positive_predictive_value found_S found_V found_F rounding_bits pbs complexity n accuracy_fhe accuracy_fhe_low95 "
    "accuracy_fhe_high95 decisions_equal_clear"
).split()


def read_json(path: Path) -> dict[str, Any]:
    """What a step wrote about its networks, or nothing where it has not run here or its file is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def network_name(model_name: str) -> str:
    """Name of a float network in tables that compare two folders, where ranks differ: by the neurons removed."""
    found = re.search(r"_prune_(\d+)_acc_", model_name)
    return f"{found[1]} % of neurons removed" if found else model_name


def steps_table(workdir: Path, summary: pd.DataFrame, patients: str) -> pd.DataFrame:
    """A row a network of steps 1 to 5, in their order: figures of the test set (ec57.columns) and encrypted decisions.

    What a step has not written to `workdir` is left out; patients: which the test set has, for the column of that name.
    """
    zeros = read_json(workdir / "tf_pruned_model_metrics.json")
    found = {"baseline": read_json(workdir / "MLP_model_0_metrics.json").get("test")}
    found["hidden weights zeroed"] = zeros.get("figures", {}).get("reloaded", {}).get("test")
    rows = [{"step": n, "network": name, **ec57.columns(f)} for n, (name, f) in enumerate(found.items(), 1) if f]
    for rate in read_json(workdir / "dynamic_pruning_metrics.json").get("rates", []):
        figures = {name.removeprefix("test_"): rate[name] for name in rate if name.startswith("test_")}
        rows.append({"step": 3, "network": f"{rate['rate_percent']} % of neurons removed", **figures})
    for _, row in summary[summary["balanced_accuracy_test_set"].notna()].iterrows():
        names = [name for name in row.index if name.endswith("_test_set")]
        figures = {name.removesuffix("_test_set"): row[name] for name in names}
        more = ["rounding_bits", "pbs", "complexity", "balanced_accuracy_validation", "n", "accuracy_fhe"]
        figures |= row.reindex([*more, "accuracy_fhe_low95", "accuracy_fhe_high95", "decisions_equal_clear"]).to_dict()
        rows.append({"step": 5, "network": f"{network_name(row['model_name'])}, {row['q_bits']} bits", **figures})
    table = pd.DataFrame(rows, columns=None if rows else ["step", "network"]).drop_duplicates("network")
    table.insert(0, "patients", patients)
    return in_order(table)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by step, share of neurons removed, and bits; table: columns step and network."""
    removed = table["network"].astype(str).str.extract(r"^(\d+) %", expand=False).astype(float)
    table = table.assign(removed=removed).sort_values(["step", "removed", "network"], ignore_index=True)
    return table.drop(columns="removed")


def read_steps(workdir: Path) -> pd.DataFrame:
    """The table that step 5 left in another folder. Raises InputError where there is none."""
    path = workdir / STEPS
    try:
        table = pd.read_csv(path)
        return table.astype({"patients": str, "network": str, "balanced_accuracy": float})
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {first_line(error)}; make it with: python fhe_experiments.py") from None


def side_by_side(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One row a network of any of the tables, the columns of each with the name of its patients."""
    tables, joined = [table for table in tables if len(table)], None
    for table in tables:
        patients = table["patients"].iloc[0]
        kept = [name for name in table if name in SIDE_BY_SIDE]
        mine = table[["step", "network", *kept]].rename(columns={name: f"{name}, {patients}" for name in kept})
        joined = mine if joined is None else joined.merge(mine, on=["step", "network"], how="outer")
    if joined is None:
        return pd.DataFrame()
    order = [f"{name}, {table['patients'].iloc[0]}" for name in SIDE_BY_SIDE for table in tables]
    joined = joined[["step", "network", *(name for name in order if name in joined)]]
    return in_order(joined)


def plot_steps(tables: Sequence[pd.DataFrame], path: Path) -> None:
    """Balanced accuracy along the steps, float and quantized (of each network that of the most bits)."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(12, 5))  # so that the names of the steps stand apart
    for number, table in enumerate(tables):
        table = table.assign(float=table["network"].str.replace(", . bits", "", regex=True))
        series = {"float": table[table["step"] < 5]}
        if (table["step"] == 5).any():
            quantized = table[table["step"] == 5].sort_values("network").groupby("float").tail(1)
            series["quantized"] = quantized.sort_index()
        for kind, points in series.items():
            ends = points.reindex(columns=["balanced_accuracy_low95", "balanced_accuracy_high95"])
            low, high = 100 * ends.to_numpy().T
            middle = 100 * points["balanced_accuracy"]
            axis.errorbar(
                points["float"].str.replace(" of neurons removed", "").str.replace(" ", "\n").str.replace("\n%", " %"),
                middle,
                yerr=np.abs([middle - low, high - middle]) if np.isfinite(low).all() else None,
                marker="o" if kind == "float" else "s",
                ls="-" if kind == "float" else "--",
                color=f"C{number}",
                alpha=1 if kind == "float" else 0.6,
                capsize=3,
                label=f"{table['patients'].iloc[0]}, {kind}",
            )
    axis.set(
        xlabel="neurons removed",
        ylabel="balanced accuracy, test set (%)",
        title="Accuracy step by step, 95 % intervals over records",
    )
    axis.tick_params(axis="x", labelsize=7)
    axis.legend()
    save_figure(figure, path)
