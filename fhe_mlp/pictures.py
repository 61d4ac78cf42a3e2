"""Pictures go to files, whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from fhe_mlp.cli import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

matplotlib.use("Agg")  # no window, no display needed


def save_figure(figure: Any, path: Path) -> None:
    """Add a grid to every axis and write the figure as a PNG, whole."""
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.grid(True, alpha=0.3)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def label_points(axis: Axes, names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Write each name beside its point, inside the axis and, where it can, clear of the other names.

    The axis must have its scales and limits.
    """
    figure, taken = axis.figure, []
    figure.draw_without_rendering()  # which fixes where the axis lies
    renderer, edge = figure.canvas.get_renderer(), axis.get_window_extent()
    for name, point in sorted(zip(names, zip(x, y)), key=lambda one: one[1]):
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
