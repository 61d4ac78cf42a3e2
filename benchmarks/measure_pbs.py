"""Measure the complexity of one PBS, for step 3's prediction; run it again when Concrete's version changes.

Compiles NEURONS random lookup tables for each number of rounding bits, p_error and width of the sum of their outputs.

Writes  fhe_mlp/quantized/pbs_complexity.csv
Run     python benchmarks/measure_pbs.py
"""

from __future__ import annotations

import itertools
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fhe_mlp import cli, encrypted, quantized

P_ERRORS = (2.0**-13, 2.0**-9, 2.0**-6, 2.0**-4)
ROUNDING_BITS = range(2, 8)  # of which step 3 uses some
OUTPUT_BITS = (7, 9, 10, 12, 14)
NEURONS, FEATURES, ROWS = 4, 8, 300  # of a network, which is random, and of its data


def measure(p_error: float, rounding_bits: int, output_bits: int) -> tuple[float, int, int, float]:
    """Return a row of the table, of a network whose sum of outputs has at most `output_bits`."""
    rng, top = np.random.default_rng(0), 2 ** (output_bits - 1) // NEURONS - 1
    weights = rng.integers(-7, 8, (FEATURES, NEURONS)).astype(np.int32)
    tables = rng.integers(-top, top + 1, (2**rounding_bits, NEURONS)).astype(np.int32).T
    tables[:, ::2] = top  # so that the sum reaches its end
    widths = {"bits": 4, "rounding_bits": rounding_bits, "input_bits": 5, "accumulator_bits": 10}
    sums = {"tables_bits": output_bits, "linear_bits": 1}
    scales = {"p_error": p_error, "input_step": 0.2, "table_step": 1.0, "linear_scale": 1.0, "offset": 0.0}
    zeros = {"bias": np.zeros(NEURONS, np.int32), "linear": np.zeros(FEATURES, np.int32)}
    X = np.random.default_rng(1).normal(0, 1.5, (ROWS, FEATURES)).clip(-3, 3).astype(np.float32)
    network = quantized.QuantizedNetwork(weights=weights, tables=tables, **widths, **sums, **scales, **zeros).fitted(X)
    complexity = encrypted.choose(network)(network, X).cost()["complexity"] / NEURONS
    return p_error, rounding_bits, network.tables_bits, complexity


def main() -> None:
    """Measure all and write the table."""
    rows = [measure(*form) for form in tqdm(list(itertools.product(P_ERRORS, ROUNDING_BITS, OUTPUT_BITS)))]
    table = pd.DataFrame(rows, columns=["p_error", "rounding_bits", "output_bits", "complexity"])
    with cli.whole_file(quantized.COSTS) as temporary:
        temporary.write_text(f"# concrete-python {version('concrete-python')}\n{table.to_csv(index=False)}")
    print(f"wrote {quantized.COSTS}")


if __name__ == "__main__":
    cli.run_and_leave(main, "nothing was written")
