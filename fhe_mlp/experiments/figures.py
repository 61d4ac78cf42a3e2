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
    "post-training quantization": "D",
    "linear on a public map": "P",
    "CKKS": "^",
}
ACCURACY_TICKS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
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
    figure, taken = axis.figure, []
    figure.draw_without_rendering()  # which fixes where the axis lies
    renderer, edge = figure.canvas.get_renderer(), axis.get_window_extent()
    for name, point in sorted(zip(names, zip(x, y)), key=lambda labelled: labelled[1]):
        for height, (side, away) in itertools.product((-9, 4, -18, 13), (("left", 5), ("right", -5))):
            place = {"xytext": (away, height), "textcoords": "offset points", "ha": side, "fontsize": 7}
            note = axis.annotate(name, point, **place)
            box = note.get_window_extent(renderer)
            inside = edge.x0 <= box.x0 and box.x1 <= edge.x1
            if inside and not any(box.overlaps(other) for other in taken):
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
    placed = others[others[["complexity", "seconds"]].notna().any(axis=1)]
    accuracies = pd.concat([own["drawn"], placed["drawn"]]).dropna()
    axes[0].set_ylabel("balanced accuracy, whole test set, quantized")
    for axis, cost, other_cost, label in (
        (axes[0], "complexity", "complexity", "complexity of one encrypted beat"),
        (axes[1], "run_seconds", "seconds", "seconds per beat, median"),
    ):
        costs = own[cost] if cost in own else pd.Series(np.nan, own.index)
        table = own.assign(cost=costs.where(costs > 0))  # without bootstraps, complexity is 0
        for bits, group in table.groupby("q_bits"):
            axis.scatter(group["cost"], group["drawn"], s=28, label=f"{bits} bits", zorder=3)
        front = table[table["on_front"]].sort_values("cost")
        axis.plot(front["cost"], front["drawn"], color="black", lw=1, label="front")
        measured = others[others[other_cost].notna()]
        for kind, group in measured.groupby("kind"):
            style = {"facecolor": "lightgrey", "edgecolor": "black", "marker": MARKERS.get(kind, "v")}
            axis.scatter(group[other_cost], group["drawn"], s=40, label=kind, zorder=2, **style)
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
        label_points(axis, measured["name"], measured[other_cost], measured["drawn"])
    shown = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8)
    figure.suptitle("Cost of encrypted inference (front: best validation accuracy at its cost)")
    save_figure(figure, path)


def plot_steps(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw balanced accuracy along the steps, float and quantized (of each network that of the most bits).

    tables: of steps.steps_table, by the name of their folder.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(12, 5))  # so that the names of the steps stand apart
    for number, (folder, table) in enumerate(tables.items()):
        table = table.assign(float=table["network"].str.replace(r", \d bits$", "", regex=True))
        quantized = table[table["step"] == 5].sort_values("network").groupby("float").tail(1).sort_index()
        for kind, points in (("float", table[table["step"] < 5]), ("quantized", quantized)):
            ends = points.reindex(columns=["balanced_accuracy_low95", "balanced_accuracy_high95"])
            low, high = 100 * ends.to_numpy(float).T
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
                label=f"{folder} ({table['patients'].iloc[0]}), {kind}",
            )
    axis.set(
        xlabel="neurons removed",
        ylabel="balanced accuracy, test set (%)",
        title="Accuracy step by step, 95 % intervals over records",
    )
    axis.tick_params(axis="x", labelsize=7)
    axis.legend()
    save_figure(figure, path)
