"""Measure what one PBS costs, for step 3's prediction; run it again when Concrete's version changes.

Compiles a layer of NEURONS random tables for each rounding bits, p_error and width of the sum of their outputs.

Writes  fhe_mlp/pbs_complexity.csv
Run     python tests/measure_complexity.py          (about 10 minutes on two cores)
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
from fhe_mlp.circuit import compile_circuit
from fhe_mlp.cli import run, whole_file
from fhe_mlp.configuration import Configuration, Setting, calibration_rows, encrypted_part
from fhe_mlp.graphs import to_onnx
from fhe_mlp.quantized import COSTS, HiddenLayer, LastLayer, QuantizedNetwork, signed_bits

NEURONS = 4  # of the layer
FEATURES = 8  # of its input; complexity does not follow them
ROUNDING_BITS = range(2, 8)  # those of which step 3 takes some
P_ERRORS = (2.0**-4, 2.0**-6, 2.0**-9, 2.0**-13)
OUTPUT_BITS = (7, 9, 10, 12, 14)
ROWS = 300  # random
OPSET = 14  # as step 4 writes


def layer(rounding_bits: int, p_error: float, output_bits: int) -> QuantizedNetwork:
    """A random network whose sum of outputs has at most `output_bits`."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-7, 8, (FEATURES, NEURONS)).astype(np.int32)
    top = 2 ** (output_bits - 1) // NEURONS - 1
    table = rng.integers(-top, top + 1, (2**rounding_bits, NEURONS)).astype(np.int32)
    table[::2] = top  # so that the sum reaches its end
    hidden = HiddenLayer(weights, np.zeros(NEURONS, np.int32), table, 1.0, 10)
    last = LastLayer(np.ones(NEURONS, np.int32), 1.0, np.zeros(FEATURES, np.int32), 1.0, 0.0)
    return QuantizedNetwork(4, rounding_bits, p_error, 5, 0.2, (hidden,), last)


def measure(rounding_bits: int, p_error: float, output_bits: int) -> tuple[int, float]:
    """Bits of the sum, and complexity of one PBS."""
    network = layer(rounding_bits, p_error, output_bits)
    X = np.random.default_rng(1).normal(0, 1.5, (ROWS, FEATURES)).clip(-3, 3).astype(np.float32)
    rows = calibration_rows(network, X)
    graph = encrypted_part(to_onnx(network, OPSET)).SerializeToString()
    setting = Setting(None, p_error, 0.0)
    module = compile_circuit(Configuration("layer", 4, graph, rounding_bits, p_error, True, setting, rows, {}))
    return signed_bits(network.run(X)[1][-1]), module.fhe_circuit.complexity / NEURONS


def main() -> None:
    """Measure all and write the table."""
    found = {}
    for bits, p_error, outputs in tqdm(list(itertools.product(ROUNDING_BITS, P_ERRORS, OUTPUT_BITS))):
        reached, complexity = measure(bits, p_error, outputs)
        found[p_error, bits, reached] = complexity
    index = pd.MultiIndex.from_tuples(found, names=["p_error", "rounding_bits", "output_bits"])
    table = pd.Series(found.values(), index, name="complexity").sort_index()
    with whole_file(COSTS) as temporary:
        temporary.write_text(f"# concrete-python {version('concrete-python')}\n{table.to_csv()}")
    print(f"wrote {COSTS}")


if __name__ == "__main__":
    run(main)
