"""The networks of all steps in one table, and beside those of another folder: float, quantized, encrypted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fhe_mlp import ecg
from fhe_mlp.cli import InputError, first_line
from fhe_mlp.experiments.workbooks import columns_of

STEPS = "fhe_steps.csv"  # the figures of all steps, for a table with those of another folder


def read_json(path: Path) -> dict[str, Any]:
    """Return what a step wrote about its networks, nothing where it has not run here or its file is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


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
    for _, row in summary[summary["balanced_accuracy_test_set"].notna()].iterrows():
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


def read_beside(workdir: Path, beside: Path) -> tuple[dict[Path, str], pd.DataFrame]:
    """Return short names of two folders, and the table that step 5 wrote to the second.

    Raises InputError where the folders are the same, or the second has no such table.
    """
    own, other, path = workdir.resolve(), beside.resolve(), beside / STEPS
    if own == other:
        raise InputError(f"--beside {beside}: is the --workdir itself; name another one")
    names = {folder: folder.name if own.name != other.name else str(folder) for folder in (own, other)}
    try:
        table = pd.read_csv(path).astype({"patients": str, "network": str, "balanced_accuracy": float})
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {first_line(error)}; make it with: python fhe_experiments.py") from None
    return names, table


def side_by_side(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a row a network of any of the tables, the columns of each with the name of its folder."""
    joined = pd.DataFrame({"step": pd.Series(dtype=int), "network": pd.Series(dtype=str)})
    for folder, table in tables.items():
        figures = table.drop(columns="patients").set_index(["step", "network"]).add_suffix(f", {folder}")
        joined = joined.merge(figures.reset_index(), on=["step", "network"], how="outer")
    names = [f"{name}, {folder}" for name in columns_of("steps") for folder in tables]
    return in_order(joined[["step", "network", *(name for name in names if name in joined)]])
