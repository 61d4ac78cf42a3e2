"""Pictures, written to files, whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fhe_mlp.cli import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

os.environ.setdefault("MPLBACKEND", "Agg")  # no window, no display needed
MARKERS = {  # of other models
    "Concrete ML models": "s",
    "linear on a public map": "P",
    "CKKS": "^",
}
ACCURACY_TICKS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
COSTS = {"complexity": "complexity of one encrypted beat", "run_seconds": "seconds per beat, median"}
DRAWN = (0.45, 0.9995)  # accuracies that have a place on a logit scale; those beyond stand at its ends


def save_figure(figure: Any, path: Path) -> None:
    """Add a grid to every axis and write the figure as a PNG."""
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.grid(True, alpha=0.3)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def label_points(axis: Axes, names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Write each name beside its point, inside the axis and, where possible, clear of the other names.

    The axis must have its scales and limits.
    """
    axis.figure.draw_without_rendering()  # which fixes where the axis lies
    edge, taken = axis.get_window_extent(), []
    for name, point in sorted(zip(names, zip(x, y)), key=lambda labelled: labelled[1]):
        for height, (side, away) in itertools.product((-9, 4, -18, 13), (("left", 5), ("right", -5))):
            note = axis.annotate(name, point, (away, height), textcoords="offset points", ha=side, fontsize=7)
            box = note.get_window_extent()
            if edge.x0 <= box.x0 and box.x1 <= edge.x1 and not any(map(box.overlaps, taken)):
                break
            note.set_visible(False)
        note.set_visible(True)  # the last place, where none is free
        taken.append(box)


def plot_frontier(summary: pd.DataFrame, others: pd.DataFrame, path: Path) -> None:
    """Draw test accuracy against complexity and seconds per beat: every configuration, the front, and other models.

    others: columns name, kind, balanced_accuracy, complexity and seconds, missing where unknown. The accuracy axis is a
    logit scale, so that 98 % and 99 % lie as far apart as 50 % and 67 %.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(15, 7), sharey=True, layout="constrained")
    own = summary.assign(drawn=summary["balanced_accuracy_test_set"].clip(*DRAWN))
    others = others.assign(drawn=others["balanced_accuracy"].astype(float).clip(*DRAWN)).dropna(subset=["drawn"])
    others = others.rename(columns={"seconds": "run_seconds"}).dropna(subset=list(COSTS), how="all")
    accuracies = pd.concat([own["drawn"], others["drawn"]]).dropna()
    axes[0].set_ylabel("balanced accuracy, whole test set, quantized")
    for axis, (cost, label) in zip(axes, COSTS.items()):
        table = own.assign(cost=own[cost].where(own[cost] > 0))  # without bootstraps, complexity is 0
        for bits, group in table.groupby("q_bits"):
            axis.scatter(group["cost"], group["drawn"], s=28, label=f"{bits} bits", zorder=3)
        front = table[table["on_front"]].sort_values("cost")
        axis.plot(front["cost"], front["drawn"], color="black", lw=1, label="front")
        measured = others.dropna(subset=[cost])
        for kind, group in measured.groupby("kind"):
            style = {"facecolor": "lightgrey", "edgecolor": "black", "marker": MARKERS.get(kind, "v")}
            axis.scatter(group[cost], group["drawn"], s=40, label=kind, zorder=2, **style)
        axis.set(yscale="logit", xlabel=label)
        if table["cost"].notna().any() or len(measured):  # matplotlib has no logarithmic axis of nothing
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1,) if cost == "complexity" else (1, 2, 3, 5)))
        axis.xaxis.set_minor_formatter("")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks(ACCURACY_TICKS, minor=False)
        axis.set_ylim(1 - 1.3 * (1 - accuracies.min()), 1 - (1 - accuracies.max()) / 1.3)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axis.yaxis.set_minor_formatter("")
        label_points(axis, measured["name"], measured[cost], measured["drawn"])
    shown = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8)
    figure.suptitle("Cost of encrypted inference (front: best validation accuracy at its cost)")
    save_figure(figure, path)


def plot_steps(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw balanced accuracy along the steps, float and quantized (of each network that of the most bits).

    tables: of report.steps_table, by the name of their folder.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(12, 5))  # so that the names of the steps stand apart
    for number, (folder, table) in enumerate(tables.items()):
        table = table.assign(float=table["network"].str.replace(r", \d bits$", "", regex=True))
        quantized = table[table["step"] == 5].sort_values("network").groupby("float").tail(1).sort_index()
        style = {"color": f"C{number}", "capsize": 3}
        for kind, points, look in (
            ("float", table[table["step"] < 5], {"marker": "o", "ls": "-", "alpha": 1}),
            ("quantized", quantized, {"marker": "s", "ls": "--", "alpha": 0.6}),
        ):
            middle = 100 * points["balanced_accuracy"].to_numpy()
            ends = points.reindex(columns=["balanced_accuracy_low95", "balanced_accuracy_high95"])
            errors = np.abs(middle - 100 * ends.to_numpy(float).T)
            names = points["float"].str.replace(" of neurons removed", "").str.replace(" ", "\n")
            axis.errorbar(
                names.str.replace("\n%", " %"),
                middle,
                yerr=errors if np.isfinite(errors).all() else None,
                label=f"{folder} ({table['patients'].iloc[0]}), {kind}",
                **style,
                **look,
            )
    axis.set(xlabel="neurons removed", ylabel="balanced accuracy, test set (%)")
    axis.set_title("Accuracy step by step, 95 % intervals over records")
    axis.tick_params(axis="x", labelsize=7)
    axis.legend()
    save_figure(figure, path)
