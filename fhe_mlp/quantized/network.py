"""The integer network, exactly as it is encrypted: what it computes and what it costs.

On the integers x of a beat (scaling.quantize), `neurons` lookup tables stand beside a linear path:

    accumulator = x @ weights + bias            integers; additions only, at hardly any cost
    index       = the accumulator's leading `rounding_bits` bits
    logit       = offset + table_step * sum of tables[neuron, index] + input_step * linear_scale * (x @ linear)

Each lookup is a programmable bootstrap (PBS), whose cost follows rounding_bits; what a table holds costs nothing. The
sums stay integers, and whoever decrypts them adds them: one sum would need a wider type, which makes every PBS more
expensive. Without neurons the network is linear and needs no PBS.

Integers are as wide as training rows need. Another row can leave the range; then the network computes what its circuit
does: beyond either end a table continues negated, then repeats; sums come back at the other end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.dataset import Part
from fhe_mlp.ecg import balanced_accuracy
from fhe_mlp.scaling import logits_of_sums, quantize

BITS = (2, 3, 4, 5, 6, 7)  # of weights, as published
TOLERATED_LOSS = 0.01  # of validation accuracy, given up for lower cost: below the baseline (step 3) or the best (5)
SAME_COST = 0.01  # relative difference of complexity that nobody would notice
NOISE_DRAWS = 5  # of the noise of p_error, over which an accuracy is averaged
COSTS = Path(__file__).with_name("pbs_complexity.csv")  # written by: python benchmarks/measure_pbs.py


@dataclass(frozen=True, eq=False)
class QuantizedNetwork:
    """Integers and steps of the module's formula; raises ValueError where they do not fit together.

    bits: width of the weights, which names the network; p_error: probability that a PBS is off by a step.
    """

    bits: int
    rounding_bits: int
    p_error: float
    input_bits: int
    input_step: float
    accumulator_bits: int  # of the signed accumulators of all training rows; 0 without neurons
    tables_bits: int  # of the signed sums of the tables
    linear_bits: int  # of the signed sums of the linear path
    weights: np.ndarray  # (features, neurons) int32
    bias: np.ndarray  # (neurons,) int32
    tables: np.ndarray  # (neurons, 2**rounding_bits) int32, the lowest accumulator first
    table_step: float  # logits that 1 in a table stands for
    linear: np.ndarray  # (features,) int32
    linear_scale: float
    offset: float

    def __post_init__(self) -> None:
        arrays, neurons = (self.weights, self.bias, self.tables, self.linear), self.neurons
        shapes = [(self.features, neurons), (neurons,), (neurons, 2**self.rounding_bits), (self.features,)]
        if [array.shape for array in arrays] != shapes or any(array.dtype != np.int32 for array in arrays):
            raise ValueError("arrays whose shapes or types do not fit")
        steps = (self.input_step, self.table_step, self.linear_scale)
        if not (np.isfinite([*steps, self.offset]).all() and min(steps) > 0):
            raise ValueError("values that are not finite, or a step that is not positive")
        if max(signed_bits(np.abs(w)) for w in (self.weights, self.linear)) > self.bits:
            raise ValueError(f"weights of more than {self.bits} bits")

    @property
    def features(self) -> int:
        """Columns of its input."""
        return len(self.linear)

    @property
    def neurons(self) -> int:
        """Lookup tables, and so programmable bootstraps of a beat."""
        return len(self.bias)

    @property
    def rounding_unit(self) -> int:
        """Multiple that accumulators are rounded to."""
        return 2 ** max(0, self.accumulator_bits - self.rounding_bits)

    @property
    def numbers(self) -> dict[str, Any]:
        """Widths and steps that a client needs to quantize a beat and to read its answer."""
        numbers = {"input_bits": self.input_bits, "input_step": self.input_step, "table_step": self.table_step}
        return numbers | {"linear_step": self.input_step * self.linear_scale, "offset": self.offset}

    def accumulators(self, X: np.ndarray) -> np.ndarray:
        """Return the accumulators (n, neurons) int64 of rows X (n, features) float32."""
        x = quantize(X, self.input_bits, self.input_step).astype(np.float64)  # exact, and faster than of integers
        return (x @ self.weights + self.bias).astype(np.int64)

    def sums(self, X: np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of the tables (n,) and of the linear path (n,), int64, of rows X (n, features) float32.

        rng: draws the noise that encryption adds to accumulators; without it there is none.
        """
        tables, linear, _ = self._sums(X, rng)
        return decoded(tables, self.tables_bits), decoded(linear, self.linear_bits)

    def _sums(self, X: np.ndarray, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return both sums (n,) before they are decrypted, and the places (n, neurons) in the tables."""
        x, entries = quantize(X, self.input_bits, self.input_step), 2**self.rounding_bits
        steps = self.accumulators(X) / self.rounding_unit
        if rng is not None:
            steps += rng.normal(0, noise_steps(self.p_error), steps.shape)
        place = np.floor(steps + 0.5).astype(int) + entries // 2
        outputs = np.hstack([self.tables, -self.tables])[np.arange(self.neurons), place % (2 * entries)]
        return outputs.sum(axis=1, dtype=np.int64), (x.astype(np.float64) @ self.linear).astype(np.int64), place

    def overflowing(self, X: np.ndarray) -> int:
        """Return how many of the rows X (n, features) have an accumulator or a sum outside its range."""
        tables, linear, place = self._sums(X, None)
        outside = ((place < 0) | (place >= 2**self.rounding_bits)).any(axis=1)
        outside |= (decoded(tables, self.tables_bits) != tables) | (decoded(linear, self.linear_bits) != linear)
        return int(outside.sum())

    def fitted(self, X: np.ndarray) -> QuantizedNetwork:
        """Return the network with sums as wide as the training rows X (n, features) need.

        The linear path of one without neurons has room for any row, since width costs nothing there.
        """
        tables, linear, _ = self._sums(X, None)
        if not self.neurons:
            linear = (2 ** (self.input_bits - 1) - 1) * np.abs(self.linear).sum(keepdims=True)
        return replace(self, tables_bits=signed_bits(tables), linear_bits=signed_bits(linear))

    def logits(self, X: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return the logits (n,) float64 of rows X (n, features) float32; over 0, a beat is abnormal. rng: of sums."""
        return logits_of_sums(self.numbers, *self.sums(X, rng))

    def balanced_accuracy(self, part: Part) -> float:
        return balanced_accuracy(self.logits(part.X) > 0, part.y)

    def noisy_balanced_accuracy(self, part: Part) -> float:
        """Return the mean over NOISE_DRAWS draws of the noise of p_error, which are the same at every call."""
        rng = np.random.default_rng(0)
        draws = NOISE_DRAWS if self.neurons else 1  # without bootstraps there is no such noise
        return float(np.mean([balanced_accuracy(self.logits(part.X, rng) > 0, part.y) for _ in range(draws)]))

    @property
    def predicted_complexity(self) -> float:
        """Complexity of a beat without compiling, from that of one PBS of the same widths."""
        return self.neurons * pbs_complexity(self.p_error, self.rounding_bits, self.tables_bits)


def pbs_complexity(p_error: float, rounding_bits: int, output_bits: int) -> float:
    """Return the complexity of one PBS at the nearest widths and the nearest p_error that is no larger, as measured."""
    table = pd.read_csv(COSTS, comment="#")
    known = table["p_error"]
    table = table[known == known.where(known <= p_error, known.min()).max()]
    for column, bits in (("rounding_bits", rounding_bits), ("output_bits", output_bits)):
        table = table[table[column] == table.loc[(table[column] - bits).abs().idxmin(), column]]
    return float(table["complexity"].iloc[-1])


def noise_steps(p_error: float) -> float:
    """Return the standard deviation, in rounding steps, of Gaussian noise that is off by half a step with p_error.

    So Concrete simulates p_error, up to 2^-2.
    """
    return 0.5 / -NormalDist().inv_cdf(p_error / 2)


def decoded(values: np.ndarray, bits: int) -> np.ndarray:
    """Return integers as Concrete decrypts a signed sum of `bits`, which leaves those in range as they are.

    It has one bit more, and one half of the range beyond: what leaves the upper end comes back as a negative number.
    """
    whole = 2**bits
    values = values % (2 * whole)
    return values - whole * (values >= whole // 2) - whole * (values >= whole)


def signed_bits(values: np.ndarray) -> int:
    """Return the bits of the least two's complement type that holds all integers in `values`."""
    return int(max(values.max(initial=0), -1 - values.min(initial=0))).bit_length() + 1
