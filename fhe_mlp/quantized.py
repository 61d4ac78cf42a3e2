"""Quantized networks, exactly as the encrypted graph computes them: integers, .h5 and ONNX files, and cost.

Step 3 trains them, step 4 writes them as ONNX, step 5 encrypts them; all three must agree to the last bit.

A hidden layer computes, on the integers x of the layer before it,

    accumulator = x @ weights + bias           integers; additions only, at hardly any cost
    rounded     = the accumulator's leading `rounding_bits` bits, as an index k
    output      = table[k]                     the programmable bootstrap (PBS), whose cost follows rounding_bits

Each neuron has its own table, at no cost: a quantized ReLU with the neuron's own scale and offset, or a function that
was trained. After the last hidden layer the logit is a sum without PBS, and so is the linear path beside it:

    logit = outputs @ weights * step * scale  +  features @ linear * input step * linear_scale  +  offset

The circuit returns the two sums apart, and whoever decrypts them adds them: together they would need a wider type,
which makes every PBS more expensive.
"""

from __future__ import annotations

import functools
import io
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import ec57
from fhe_mlp.cli import InputError, first_line
from fhe_mlp.networks import claimed_bytes, open_h5

BITS = (2, 3, 4, 5, 6, 7)  # of weights (and of activations after quantized ReLUs), as published
TOLERATED_LOSS = 0.01  # of validation accuracy, given up for lower cost: below the baseline (step 3) or the best (5)
SAME_COST = 0.01  # relative difference of complexity that nobody would notice
ROUNDING_BITS = range(2, 9)  # that a network can have
NOISE_DRAWS = 5  # of the noise of p_error, over which an accuracy is averaged
MOST_ACCUMULATOR_BITS = 32  # what an int32 holds; more in a file are a damaged number
MOST_TABLE_BITS = 16  # of a table's entries; more in a file are a damaged number
COSTS = Path(__file__).with_name("pbs_complexity.csv")  # written by: python tests/measure_complexity.py


@dataclass(frozen=True)
class HiddenLayer:
    """weights (inputs, neurons), bias (neurons,), table (2**rounding_bits, neurons), int32; see the module's text."""

    weights: np.ndarray
    bias: np.ndarray
    table: np.ndarray  # outputs for the rounded accumulators from -2**(rounding_bits - 1) units on
    step: float  # what 1 in the table stands for
    accumulator_bits: int  # of the signed accumulator over all training rows

    def outputs(self, units: np.ndarray) -> np.ndarray:
        """What the tables give for accumulators (n, neurons) in rounding units; flat outside of their range."""
        ends = len(self.table) // 2
        index = np.clip(np.floor(units + 0.5).astype(int), -ends, ends - 1) + ends
        return np.take_along_axis(self.table, index, axis=0)


@dataclass(frozen=True)
class LastLayer:
    """weights (inputs,) and linear (features,) int32, float scales, offset of the logit; see the module's text."""

    weights: np.ndarray
    scale: float
    linear: np.ndarray
    linear_scale: float
    offset: float


@dataclass(frozen=True)
class QuantizedNetwork:
    """`bits` names the configuration: no weight is wider, and no activation of a ReLU."""

    bits: int
    rounding_bits: int
    p_error: float  # chance that a PBS is off by a step, as in training
    input_bits: int
    input_step: float
    hidden: tuple[HiddenLayer, ...]
    last: LastLayer

    @property
    def features(self) -> int:
        """Columns of its input."""
        return len(self.last.linear)

    def run(self, X: np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (n,) of rows X (n, features) float32, and all integer sums: the accumulators (n, neurons) of each
        hidden layer, then what the last one's outputs give (n, 1), then the linear path (n, 1), where there is one.

        rng: draws the noise that encryption adds to accumulators; without it there is none.
        """
        top = 2 ** (self.input_bits - 1) - 1
        features = x = np.clip(np.rint(X.astype(np.float64) / self.input_step), -top, top)
        logit, sums = np.full(len(X), self.last.offset), []
        for layer in self.hidden:
            sums.append(x @ layer.weights + layer.bias)
            units = sums[-1] / self.rounding_unit(layer)
            if rng is not None:
                units = units + rng.normal(0, noise_steps(self.p_error), units.shape)
            x = layer.outputs(units).astype(np.float64)
        if self.hidden:
            sums.append(x @ self.last.weights[:, None])
            logit += sums[-1][:, 0] * (self.hidden[-1].step * self.last.scale)
        if self.last.linear.any():
            sums.append(features @ self.last.linear[:, None])
            logit += sums[-1][:, 0] * (self.input_step * self.last.linear_scale)
        return logit, sums

    def rounding_unit(self, layer: HiddenLayer) -> int:
        """What accumulators of a hidden layer are rounded to multiples of."""
        return 2 ** max(0, layer.accumulator_bits - self.rounding_bits)

    def balanced_accuracy(self, X: np.ndarray, y: np.ndarray) -> float:
        """Balanced accuracy on the rows X (n, features) with labels y (n,); a logit over 0 is an abnormal beat."""
        return ec57.balanced_accuracy(self.run(X)[0] > 0, y)

    def noisy_balanced_accuracy(self, X: np.ndarray, y: np.ndarray) -> float:
        """The same with the noise of encryption, the mean of NOISE_DRAWS draws, which are the same at every call."""
        rng = np.random.default_rng(0)
        draws = NOISE_DRAWS if self.hidden else 1  # without bootstraps there is no such noise
        return float(np.mean([ec57.balanced_accuracy(self.run(X, rng)[0] > 0, y) for _ in range(draws)]))

    def pbs(self) -> int:
        """Programmable bootstraps of one beat: one a hidden neuron."""
        return sum(layer.weights.shape[1] for layer in self.hidden)

    def predicted_complexity(self, X: np.ndarray) -> float:
        """Complexity estimated without compiling, from what one PBS of its widths costs; X: training rows."""
        sums = self.run(X)[1]
        return sum(
            len(layer.bias) * pbs_complexity(self.p_error, self.rounding_bits, signed_bits(into))
            for layer, into in zip(self.hidden, sums[1:])
        )


@functools.cache
def measured_complexities() -> dict[float, dict[int, dict[int, float]]]:
    """Complexity of one PBS by p_error, rounding bits and bits of its output, as COSTS has it."""
    measured: dict[float, dict[int, dict[int, float]]] = {}
    for row in pd.read_csv(COSTS, comment="#").itertuples():
        measured.setdefault(row.p_error, {}).setdefault(row.rounding_bits, {})[row.output_bits] = row.complexity
    return measured


def pbs_complexity(p_error: float, rounding_bits: int, output_bits: int) -> float:
    """Complexity of one PBS, from the nearest widths that were measured and the nearest p_error that is no larger."""
    measured = measured_complexities()
    widths = measured[max((p for p in measured if p <= p_error), default=min(measured))]
    outputs = widths[min(widths, key=lambda bits: abs(bits - rounding_bits))]
    return outputs[min(outputs, key=lambda bits: abs(bits - output_bits))]


def noise_steps(p_error: float) -> float:
    """Standard deviation, in rounding steps, of Gaussian noise that leaves half a step with probability p_error.

    So Concrete simulates it down to a p_error of 2^-2.
    """
    return 0.5 / NormalDist().inv_cdf(1 - p_error / 2)


def signed_bits(values: np.ndarray) -> int:
    """Bits of the least two's complement type that holds all integers in `values`."""
    return int(max(values.max(), -values.min() - 1, 0)).bit_length() + 1


def add_to_h5(content: bytes, networks: Sequence[QuantizedNetwork]) -> bytes:
    """The .h5 file `content` of a float network with the networks quantized from it in its group "quantized"."""
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        for network in networks:
            group = file.create_group(f"quantized/{network.bits}")
            for field in fields(network)[:-2]:
                group.attrs[field.name] = getattr(network, field.name)
            for name, layer in (*enumerate(network.hidden), ("last", network.last)):
                for field in fields(layer):
                    group[f"{name}/{field.name}"] = getattr(layer, field.name)
    return buffer.getvalue()


def read_h5(path: Path, made_by: str) -> list[QuantizedNetwork]:
    """The quantized networks in an .h5 file of step 3, none in another's; `made_by` is the command that makes the file.

    Raises InputError for a damaged group.
    """
    networks, claimed = [], 0
    try:
        with open_h5(path) as file:
            for group in file.get("quantized", {}).values():
                layers = []
                for name in (*sorted(set(group) - {"last"}, key=int), "last"):
                    kind = LastLayer if name == "last" else HiddenLayer
                    stored = {field.name: group[name][field.name] for field in fields(kind)}
                    claimed += sum(claimed_bytes(dataset, path) for dataset in stored.values())
                    if claimed > path.stat().st_size:  # also where many names stand for the same values
                        raise ValueError("its arrays claim to be larger than the file")
                    layers.append(kind(**converted(kind, {key: dataset[()] for key, dataset in stored.items()})))
                numbers = converted(QuantizedNetwork, group.attrs)
                networks.append(check(QuantizedNetwork(**numbers, hidden=tuple(layers[:-1]), last=layers[-1])))
    except Exception as error:  # HDF5 and NumPy raise a dozen unrelated types
        raise InputError(
            f"{path}: its quantized networks are damaged ({first_line(error)}); make it with: {made_by}"
        ) from None
    return networks


def converted(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and arrays that `owner`, one of the classes above, is made of, from NumPy's types to its own."""
    types = {"int": operator.index, "float": float, "np.ndarray": np.asarray}
    return {field.name: types[field.type](values[field.name]) for field in fields(owner) if field.type in types}


def check(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network itself. Raises ValueError when its parts do not fit together or hold what no training gives."""
    last, top = network.last, 2 ** (network.bits - 1) - 1
    if network.bits not in BITS or network.rounding_bits not in ROUNDING_BITS or not 2.0**-60 <= network.p_error < 1:
        raise ValueError("bits or a p_error that no network has")
    if network.input_bits not in BITS or not 0 < network.input_step < np.inf:
        raise ValueError("an input of no known width or step")
    numbers = [last.scale, last.linear_scale, last.offset, *(layer.step for layer in network.hidden)]
    if not np.isfinite(numbers).all() or min(numbers[:2] + numbers[3:]) <= 0:
        raise ValueError("values that are not finite, or a step that is not positive")
    inputs = network.features
    for index, layer in enumerate(network.hidden):
        shapes = [values.shape for values in (layer.weights, layer.bias, layer.table)]
        neurons = shapes[1][0] if shapes[1] else 0
        if not neurons or shapes != [(inputs, neurons), (neurons,), (2**network.rounding_bits, neurons)]:
            raise ValueError(f"layer {index}: shapes that do not fit")
        if not 0 < layer.accumulator_bits <= MOST_ACCUMULATOR_BITS or signed_bits(layer.table) > MOST_TABLE_BITS:
            raise ValueError(f"layer {index}: accumulators or outputs of no known width")
        inputs = neurons
    if last.linear.ndim != 1 or last.weights.shape != ((inputs,) if network.hidden else (0,)):
        raise ValueError("last layer: shapes that do not fit")
    arrays = [values for layer in network.hidden for values in (layer.weights, layer.bias, layer.table)]
    if any(values.dtype != np.int32 for values in (*arrays, last.weights, last.linear)):
        raise ValueError("numbers of other types")
    for weights in (*(layer.weights for layer in network.hidden), last.weights, last.linear):
        if weights.size and not -top <= weights.min() <= weights.max() <= top:
            raise ValueError(f"weights of more than {network.bits} bits")
    return network
