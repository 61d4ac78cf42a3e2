"""Pictures go to files, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from fhe_mlp.cli import whole_file

matplotlib.use("Agg")  # no window, no display needed


def save_figure(figure: Any, path: Path) -> None:
    """Add a grid to every axis and write the figure as a PNG, whole."""
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.grid(True, alpha=0.3)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
