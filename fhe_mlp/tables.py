"""Training of networks whose neurons are free tables, with a linear path beside them (step 3).

Under TFHE a bootstrap computes any table at the same cost, and additions are free. So

    logit = x @ linear + offset + the sum over neurons j of table_j(rounded accumulator of neuron j)

where x are the quantized features, and the weights that would follow an activation are part of its table. Neurons are
removed between trainings, in each member its own. LinearEnsemble is the linear path alone, which needs no bootstrap.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from fhe_mlp.networks import Layers
from fhe_mlp.neuron_removal import replace_neurons
from fhe_mlp.qat import ROOM, Ensemble, Noise, best_scale, hidden_layer, integers, largest_integer, straight_through
from fhe_mlp.quantized import HiddenLayer, LastLayer, QuantizedNetwork

if TYPE_CHECKING:
    import tensorflow as tf

SUM_BITS = 9  # of the sum of the tables; with 10, some numbers of rounding bits cost 45 % more
SUM_STEP = 1 / 16  # of the sum and the tables, in logits, at least; 9 bits reach from -16 to 16
MOST_STEPS = 2 ** (SUM_BITS - 1) - 1  # of a table's entry or a sum, on each side of 0
MOST = SUM_STEP * MOST_STEPS  # the same in logits
COARSER = 1.02  # factor by which the step of a network whose sums need more bits grows, until they do not
VALUES_AT_ONCE = 2_000_000  # of features, in the memory of all members
FITTING_ROUNDS = 2  # the second sees what rounding the weights anew has moved
LEAST_CURVATURE = 0.02  # of the loss, of a row whose decision is certain, when neurons are removed
SMOOTHNESS = 2e-4  # weight of the squared second differences of the tables (2e-3: 0.2 points less on validation rows)


class LinearEnsemble(Ensemble):
    """Candidates that start as a float network without hidden layers."""

    learning_rate = 1e-3  # 3e-4 and 1e-3 do the same, 1e-2 loses 0.1 to 0.5 points on validation rows

    def start(self, layers: Layers, X: np.ndarray) -> None:
        """As Ensemble's."""
        self.top = largest_integer(self.bits)  # of a weight
        self.parts: dict[str, Any] = {}
        self._set(self.first_values(layers, X))

    def first_values(self, layers: Layers, X: np.ndarray) -> dict[str, np.ndarray]:
        """What is trained, each with the leading axis (members,), as it is at the start."""
        ((kernel, offset),) = layers
        kernel = np.broadcast_to(kernel, (len(self.bits), *kernel.shape))
        scale = np.log(best_scale(kernel, self.top, 2))
        return {"linear": kernel, "linear_scale": scale, "offset": np.full((len(self.bits), 1, 1), offset[0])}

    def _set(self, values: dict[str, np.ndarray]) -> None:
        import tensorflow as tf

        self.parts = {name: tf.Variable(value, dtype=self.dtype) for name, value in values.items()}

    def variables(self) -> list[tf.Variable]:
        """As Ensemble's."""
        return list(self.parts.values())

    def path(self, x: tf.Tensor) -> tf.Tensor:
        """Logits (members, n) of the linear path for the inputs x."""
        import tensorflow as tf

        parts = self.parts
        scale = tf.exp(parts["linear_scale"])
        weights = tf.clip_by_value(parts["linear"] / scale, -self.top, self.top)
        logits = x @ straight_through(weights, tf.round(weights)) * self.input_step * scale
        return (logits + parts["offset"])[..., 0]

    def forward(self, X: Any, noise: Noise = None) -> tuple[tf.Tensor, tf.Tensor]:
        """As Ensemble's."""
        import tensorflow as tf

        return self.path(self.inputs(X)), tf.zeros(len(self.bits), self.dtype)

    def networks(self, X: np.ndarray) -> list[QuantizedNetwork]:
        """As Ensemble's."""
        parts, found = {name: variable.numpy().astype(np.float64) for name, variable in self.parts.items()}, []
        for m, (bits, input_bits) in enumerate(zip(self.bits.ravel(), self.input_bits.ravel())):
            scale = float(np.exp(parts["linear_scale"][m, 0, 0]))
            linear = integers(parts["linear"][m, :, 0] / scale, bits)
            hidden = self.hidden(parts, m, X)
            ones = np.ones(sum(len(layer.bias) for layer in hidden), np.int32)
            last = LastLayer(ones, 1.0, linear, scale, float(parts["offset"][m, 0, 0]))
            step = float(self.input_step[m, 0, 0])
            network = QuantizedNetwork(int(bits), self.rounding_bits, self.p_error, int(input_bits), step, hidden, last)
            found.append(network)
        return found

    def hidden(self, parts: dict[str, np.ndarray], m: int, X: np.ndarray) -> tuple[HiddenLayer, ...]:
        """Layers beside the path in member m; parts: the values of all; X: training rows (n, features)."""
        return ()


class TableEnsemble(LinearEnsemble):
    """Candidates that start as a float network of one hidden layer."""

    learning_rate = 1e-2  # 5e-3: 0.1 points less on validation rows

    def first_values(self, layers: Layers, X: np.ndarray) -> dict[str, np.ndarray]:
        """As LinearEnsemble's."""
        (kernel, bias), (outgoing, offset) = layers
        members, features, real = len(self.bits), len(kernel), X @ kernel
        kernel = np.broadcast_to(kernel, (members, *kernel.shape))
        finest = best_scale(kernel, self.top, 1)
        middle, scale, self.range_bits = self.range_of(real[None], self.input_step, finest)
        k = np.arange(-self.half, self.half)[:, None]
        reached = (self.unit(self.range_bits) * self.input_step * scale).swapaxes(1, 2)  # by a step of k
        outputs = np.maximum(reached * k[:, 0] + (bias + middle[0, 0])[:, None], 0) * outgoing
        return {
            "kernel": kernel,
            "scale": np.log(scale),
            "bias": np.broadcast_to(-middle, scale.shape),  # added to the accumulator, it centres its range
            "table": outputs,  # (members, neurons, entries), in logits
            "linear": np.zeros((members, features, 1)),
            "linear_scale": np.log(0.5 / self.top),
            "offset": np.full((members, 1, 1), offset[0]),
        }

    @property
    def neurons(self) -> int:
        """Of each member."""
        return self.parts["kernel"].shape[2]

    def outputs(self, x: tf.Tensor, noise: Noise = None) -> tuple[tf.Tensor, tf.Tensor]:
        """What the tables give (members, n, neurons), in logits, for the inputs x, and the range penalty (members,)."""
        import tensorflow as tf

        parts, step, scale = self.parts, self.input_step, tf.exp(self.parts["scale"])
        weights = tf.clip_by_value(parts["kernel"] / scale, -self.top, self.top)
        bias = parts["bias"] / (step * scale)
        accumulator = x @ straight_through(weights, tf.round(weights)) + straight_through(bias, tf.round(bias))
        steps, penalty = self.rounded(accumulator, self.range_bits, noise)
        steps = tf.clip_by_value(steps, -self.half, self.half - 1)
        below = tf.stop_gradient(tf.minimum(tf.floor(steps), self.half - 2))
        members, entries = len(self.bits), 2 * self.half
        first = entries * np.arange(members * self.neurons, dtype=np.int32).reshape(members, 1, -1)
        place = first + tf.cast(below, tf.int32) + self.half
        flat, share = tf.reshape(parts["table"], [-1]), steps - below
        low, high = tf.gather(flat, place), tf.gather(flat, place + 1)
        # The gradient is that of the line between two entries, and reaches both.
        entry = SUM_STEP * tf.round(tf.clip_by_value(tf.where(share >= 0.5, high, low), -MOST, MOST) / SUM_STEP)
        return straight_through(low + share * (high - low), entry), penalty

    def forward(self, X: Any, noise: Noise = None) -> tuple[tf.Tensor, tf.Tensor]:
        """As Ensemble's."""
        import tensorflow as tf

        x = self.inputs(X)
        outputs, penalty = self.outputs(x, noise)
        total = tf.reduce_sum(outputs, axis=2)
        penalty += tf.nn.relu(tf.reduce_max(tf.abs(total), axis=1) / (MOST - SUM_STEP) - 1)
        table = self.parts["table"]
        bends = table[..., 2:] - 2 * table[..., 1:-1] + table[..., :-2]
        return self.path(x) + total, penalty + SMOOTHNESS * tf.reduce_sum(bends**2, axis=(1, 2))

    def fit_ranges(self, X: np.ndarray) -> None:
        """Move and widen the range of each accumulator so that those of all rows X (n, features) lie in it.

        Batches show few of the extreme rows, and one accumulator out of its range costs all of its layer a bit.
        """
        values = {name: self.parts[name].numpy().astype(np.float64) for name in ("kernel", "scale", "bias", "table")}
        k, parts = np.arange(-self.half, self.half), np.array_split(X, 1 + X.size // VALUES_AT_ONCE)
        unit, step = self.unit(self.range_bits), self.input_step
        for _ in range(FITTING_ROUNDS):
            scale = np.exp(values["scale"])
            bias = np.rint(values["bias"] / (step * scale))
            weights = np.clip(np.rint(values["kernel"] / scale), -self.top, self.top)
            ends = []
            for part in parts:
                accumulator = (self.inputs(part).numpy() @ weights.astype(self.dtype) + bias) / unit
                ends += [accumulator.max(axis=1), accumulator.min(axis=1)]
            highest, lowest = np.max(ends, axis=0)[:, None], np.min(ends, axis=0)[:, None]
            shift = np.rint((highest + lowest) / 2)
            reach = np.maximum(np.maximum(highest - shift, shift - lowest) / (self.half - ROOM), 1)
            values["bias"] = (bias - shift * unit) * step * scale
            values["scale"] += np.log(reach)
            for m, n in zip(*np.nonzero((reach[:, 0] > 1) | (shift[:, 0] != 0))):
                values["table"][m, n] = np.interp(k * reach[m, 0, n] + shift[m, 0, n], k, values["table"][m, n])
        for name, value in values.items():
            self.parts[name].assign(value)

    def remove(self, keep: int, rows: np.ndarray) -> None:
        """Keep in each member the `keep` neurons that the others and the linear path replace worst over `rows`
        (n, features), and have them replace the rest; see neuron_removal.replace_neurons.

        A row counts by the curvature of the cross-entropy there, so most where the decision is open.
        """
        values = {name: variable.numpy().astype(np.float64) for name, variable in self.parts.items()}
        inputs, probability = self.inputs(rows), special.expit(self.forward(rows)[0].numpy().astype(np.float64))
        outputs, kept = self.outputs(inputs)[0].numpy().astype(np.float64), []
        for m, weights in enumerate(probability * (1 - probability) + LEAST_CURVATURE):
            X = inputs[m].numpy() * self.input_step[m, 0, 0]
            stay, factor, linear, constant = replace_neurons(X, outputs[m], weights, keep)
            kept.append(stay)
            values["table"][m] *= factor[:, None]
            values["linear"][m, :, 0] += linear
            values["offset"][m] += constant
        reach = np.abs(values["linear"]).max(axis=1, keepdims=True)
        values["linear_scale"] = np.maximum(values["linear_scale"], np.log(np.maximum(reach, 1e-9) / self.top))
        for name in ("kernel", "scale", "bias"):
            values[name] = np.take_along_axis(values[name], np.array(kept)[:, None], axis=2)
        values["table"] = np.take_along_axis(values["table"], np.array(kept)[:, :, None], axis=1)
        self._set(values)

    def hidden(self, parts: dict[str, np.ndarray], m: int, X: np.ndarray) -> tuple[HiddenLayer, ...]:
        """As LinearEnsemble's."""
        step, scale, unit = float(self.input_step[m, 0, 0]), np.exp(parts["scale"][m]), self.unit(self.range_bits)[m]
        weights = integers(parts["kernel"][m] / scale, self.bits[m, 0, 0])
        bias = np.rint(parts["bias"][m, 0] / (step * scale[0])).astype(np.int32)
        top = largest_integer(self.input_bits[m, 0, 0])
        x = np.clip(np.rint(X / step), -top, top)
        aim = int(self.range_bits[m, 0, 0])
        return (narrow_layer(x, weights, bias, unit, parts["table"][m], aim, self.rounding_bits),)


def entries(accumulator: np.ndarray, unit: np.ndarray, table: np.ndarray, sum_step: float) -> np.ndarray:
    """What the tables (neurons, entries), in logits, give for accumulators (n, neurons), in steps of `sum_step`.

    unit: (1, neurons) or (1, 1), of an accumulator in training, between whose multiples the tables are interpolated.
    """
    k = np.arange(table.shape[1]) - table.shape[1] // 2
    found = np.array([np.interp(a, k, t) for a, t in zip((accumulator / unit).T, table)]).T
    return np.rint(np.clip(found, -MOST, MOST) / sum_step)


def narrow_layer(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray, unit: np.ndarray, table: np.ndarray, aim: int, bits: int
) -> HiddenLayer:
    """qat.hidden_layer of tables, with the finest step of at least SUM_STEP at which the sums of all rows x keep to
    SUM_BITS. unit, table: as `entries` has them; bits: rounding bits."""
    step = SUM_STEP
    while True:
        function = functools.partial(entries, unit=unit, table=table, sum_step=step)
        outputs, layer = hidden_layer(x, weights, bias, function, step, aim, bits)
        if np.abs(outputs.sum(axis=1)).max() <= MOST_STEPS:
            return layer
        step *= COARSER
