"""Quantization-aware training: networks learn as they will be computed encrypted, rounding and its noise included.

Members of an ensemble, each of its own number of bits, are trained side by side as one batch, which is fast: each
variable of all is one tensor with a leading axis (members,). What a neuron's table holds is learned too: under TFHE a
bootstrap computes any table at the same cost, so the weights that would follow an activation are part of its table.
This module imports TensorFlow, and is itself imported only where networks are trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
import tf_keras
from scipy import special
from tqdm import tqdm

from fhe_mlp.networks import Layers, balanced_weights, epoch_rows, replace_neurons
from fhe_mlp.quantized.network import QuantizedNetwork, noise_steps, signed_bits
from fhe_mlp.scaling import CLIP_SD, quantize

if TYPE_CHECKING:
    from fhe_mlp.quantized.selection import Form, Lesson

INPUT_BITS = 5  # of the features at least
BATCH_SIZE = 128  # beats a gradient step
LOSS_POWER = 0.4  # of generalized_cross_entropy; docs/METHOD.md has what was tried
ROOM = 0.6  # steps that the range penalty keeps free at both ends of the accumulator's range
LINEAR_RATE = 1e-3  # of Adam without neurons; 3e-4 and 1e-3 do the same, 1e-2 loses 0.1 to 0.5 points (validation)
TABLES_RATE = 1e-2  # of Adam with neurons; 5e-3: 0.1 points less on validation rows. Both fall to 0 along a cosine
SUM_BITS = 9  # of the sum of the tables; with 10, some numbers of rounding bits cost 45 % more
SUM_STEP = 1 / 16  # of the sum and the tables, in logits, at least; 9 bits reach from -16 to 16
MOST_STEPS = 2 ** (SUM_BITS - 1) - 1  # of a table's entry or a sum, on each side of 0
MOST = SUM_STEP * MOST_STEPS  # the same in logits
COARSER = 1.02  # factor by which the step of a network whose sums need more bits grows, until they do not
LEAST_CURVATURE = 0.02  # of the loss, of a row whose decision is certain, when neurons are removed
SMOOTHNESS = 2e-4  # weight of the squared second differences of the tables (2e-3: 0.2 points less on validation rows)


def straight_through(x: tf.Tensor, rounded: tf.Tensor) -> tf.Tensor:
    """Return `rounded` with the gradient of `x` (Bengio, Leonard & Courville, arXiv:1308.3432)."""
    return x + tf.stop_gradient(rounded - x)


def generalized_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return the loss (1 - p^q) / q of each logit, where p is the probability of its label, which may be soft.

    Zhang & Sabuncu, NeurIPS 2018 (arXiv:1805.07836), with q = LOSS_POWER; cross-entropy is its limit for q = 0. A beat
    that a small network cannot get right costs at most 1 / q, so that it does not pull the others over the threshold.
    """
    loss = (-tf.math.expm1(LOSS_POWER * tf.math.log_sigmoid(sign * logits)) / LOSS_POWER for sign in (1, -1))
    return labels * next(loss) + (1 - labels) * next(loss)


def largest_integer(bits: Any) -> Any:
    """Return the largest integer of a signed type of `bits` whose range is symmetric."""
    return 2.0 ** (bits - 1) - 1


class Ensemble:
    """Members that start as one float network, of one hidden layer or of none, in the same `form`.

    Scales are learned with the weights (LSQ, Esser et al., ICLR 2020), as logarithms. X: training rows (n, features).
    """

    def __init__(self, layers: Layers, form: Form, X: np.ndarray, dtype: str = "float32") -> None:
        self.form, self.dtype = form, dtype
        self.bits = np.array(form.bits).reshape(-1, 1, 1)
        self.half = 2 ** (form.rounding_bits - 1)  # rounded accumulators reach from -half to half - 1 units
        self.input_bits = np.maximum(self.bits, INPUT_BITS)
        self.input_step = (CLIP_SD / largest_integer(self.input_bits)).astype(np.float32).astype(dtype)
        self.top = largest_integer(self.bits)  # of a weight
        self._set(self._linear_start(*layers[-1]) if len(layers) == 1 else self._tables_start(layers, X))

    def _linear_start(self, kernel: np.ndarray, offset: np.ndarray) -> dict[str, np.ndarray]:
        """Return what is trained without neurons, each with the leading axis (members,)."""
        kernel = np.broadcast_to(kernel, (len(self.bits), *kernel.shape))
        scale = np.log(best_scale(kernel, self.top, (1, 2)))
        return {"linear": kernel, "linear_scale": scale, "offset": np.full((len(self.bits), 1, 1), offset[0])}

    def _tables_start(self, layers: Layers, X: np.ndarray) -> dict[str, np.ndarray]:
        """Return what is trained with neurons; at the start each table is a ReLU times its outgoing weight."""
        (kernel, bias), (outgoing, offset) = layers
        members, features, real = len(self.bits), len(kernel), X @ kernel
        kernel = np.broadcast_to(kernel, (members, *kernel.shape))
        # The accumulators, which stand for `real`, fill a power-of-two range, and no scale is finer than fits.
        finest, middle = best_scale(kernel, self.top, (1,)), (real.max(0) + real.min(0)) / 2
        reach = np.abs(real - middle).max(0) / (1 - ROOM / self.half)
        reach = np.maximum(reach, self.input_step * finest)  # of a neuron whose accumulator never changes
        aim = np.round(np.log2(reach / (self.input_step * finest)).mean(2, keepdims=True) + 0.25)
        scale, self.range_bits = np.maximum(finest, reach / (self.input_step * 2.0**aim)), aim + 1
        self.unit = (2.0 ** np.maximum(self.range_bits - self.form.rounding_bits, 0)).astype(self.dtype)  # of rounding
        k = np.arange(-self.half, self.half)[:, None]
        reached = (self.unit * self.input_step * scale).swapaxes(1, 2)  # by a step of k
        outputs = np.maximum(reached * k[:, 0] + (bias + middle)[:, None], 0) * outgoing
        return {
            "kernel": kernel,
            "scale": np.log(scale),
            "bias": np.broadcast_to(-middle, scale.shape),  # added to the accumulator, it centres its range
            "table": outputs,  # (members, neurons, entries), in logits
            "linear": np.zeros((members, features, 1)),
            "linear_scale": np.log(0.5 / self.top),
            "offset": np.full((members, 1, 1), offset[0]),
        }

    def _set(self, values: dict[str, np.ndarray]) -> None:
        self.parts = {name: tf.Variable(value, dtype=self.dtype) for name, value in values.items()}

    def _values(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy().astype(np.float64) for name, variable in self.parts.items()}

    @property
    def neurons(self) -> int:
        return self.parts["kernel"].shape[2] if "kernel" in self.parts else 0

    def inputs(self, X: Any) -> tf.Tensor:
        """Return the features (members, n, features), in steps of the input, of rows X (n, features)."""
        top = largest_integer(self.input_bits)
        return tf.clip_by_value(tf.round(tf.cast(X, self.dtype)[None] / self.input_step), -top, top)

    def outputs(self, x: tf.Tensor, noise: tf.random.Generator | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the tables' outputs (members, n, neurons), in logits, for the inputs x, and a penalty (members,).

        The penalty is on accumulators that reach the minimum or maximum of their range.
        """
        parts, step, scale = self.parts, self.input_step, tf.exp(self.parts["scale"])
        weights = tf.clip_by_value(parts["kernel"] / scale, -self.top, self.top)
        bias = parts["bias"] / (step * scale)
        accumulator = x @ straight_through(weights, tf.round(weights)) + straight_through(bias, tf.round(bias))
        steps = accumulator / self.unit
        reach = tf.reduce_max(tf.abs(steps), axis=1, keepdims=True) / self.half
        penalty = tf.reduce_mean(tf.nn.relu(reach - (1 - ROOM / self.half)), axis=(1, 2))
        if noise:
            steps += noise_steps(self.form.p_error) * noise.normal(tf.shape(steps), dtype=self.dtype)
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

    def forward(self, X: Any, noise: tf.random.Generator | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the logits (members, n) of rows X (n, features), and what is added to the loss (members,).

        noise: draws that of p_error, which is added to each accumulator; None: there is none.
        """
        x, parts, scale = self.inputs(X), self.parts, tf.exp(self.parts["linear_scale"])
        weights = tf.clip_by_value(parts["linear"] / scale, -self.top, self.top)
        linear = x @ straight_through(weights, tf.round(weights)) * self.input_step * scale
        logits = (linear + parts["offset"])[..., 0]
        if not self.neurons:
            return logits, tf.zeros(len(self.bits), self.dtype)
        outputs, penalty = self.outputs(x, noise)
        total = tf.reduce_sum(outputs, axis=2)
        penalty += tf.nn.relu(tf.reduce_max(tf.abs(total), axis=1) / (MOST - SUM_STEP) - 1)
        table = parts["table"]
        bends = table[..., 2:] - 2 * table[..., 1:-1] + table[..., :-2]
        return logits + total, penalty + SMOOTHNESS * tf.reduce_sum(bends**2, axis=(1, 2))

    def train(self, lesson: Lesson, seed: int, title: str = "") -> None:
        """Train, and leave in each member the weights of its epoch of least validation loss. title: of its bar."""
        train, val = lesson.data.train, lesson.data.val
        drawn = epoch_rows(train.y)
        steps = -(-drawn // BATCH_SIZE)
        variables = list(self.parts.values())
        rate = TABLES_RATE if self.neurons else LINEAR_RATE
        optimizer = tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.CosineDecay(rate, lesson.epochs * steps))
        optimizer.build(variables)
        rows, wanted = tf.constant(train.X, self.dtype), tf.constant(lesson.targets, self.dtype)
        rng, generator = np.random.default_rng(seed), tf.random.Generator.from_seed(seed, alg="philox")

        @tf.function
        def epoch(order: tf.Tensor) -> None:
            for number in tf.range(steps):
                chosen = order[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
                batch = tf.gather(rows, chosen)
                batch += lesson.noise * generator.normal(tf.shape(batch), dtype=self.dtype)
                with tf.GradientTape() as tape:
                    logits, penalty = self.forward(batch, generator)
                    labels = tf.broadcast_to(tf.gather(wanted, chosen), tf.shape(logits))
                    losses = generalized_cross_entropy(labels, logits)
                    loss = tf.reduce_sum(tf.reduce_mean(losses, axis=1) + penalty)
                gradients = map(tf.convert_to_tensor, tape.gradient(loss, variables))  # of tables: sparse ones
                optimizer.apply_gradients(zip(gradients, variables))

        weights, labels_val = (tf.constant(part, self.dtype) for part in (balanced_weights(val.y), val.y))

        @tf.function
        def validation_loss() -> tf.Tensor:
            logits = self.forward(val.X, generator)[0] - lesson.shift  # labels have no threshold
            losses = generalized_cross_entropy(labels_val, logits)
            return tf.reduce_mean(weights * losses, axis=1)

        best, kept = np.full(len(self.bits), np.inf), [variable.numpy() for variable in variables]
        for _ in tqdm(range(lesson.epochs), desc=title, unit="epoch"):
            epoch(tf.constant(rng.choice(len(train.y), drawn, p=lesson.data.draw)))
            if self.neurons:
                self.fit_ranges(train.X)
            loss = validation_loss().numpy()
            for old, new in zip(kept, variables):
                old[loss < best] = new.numpy()[loss < best]
            best = np.minimum(best, loss)
        self._set(dict(zip(self.parts, kept)))

    def fit_ranges(self, X: np.ndarray) -> None:
        """Move and widen the range of each accumulator so that those of all rows X (n, features) lie in it.

        Batches show few of the extreme rows, and one accumulator out of its range costs all of its layer a bit.
        """
        values, unit, step, k = self._values(), self.unit, self.input_step, np.arange(-self.half, self.half)
        parts = np.array_split(X, 1 + X.size // 2_000_000)  # features in the memory of all members
        for _ in range(2):  # the second time sees what rounding the weights anew has moved
            scale = np.exp(values["scale"])
            bias = np.rint(values["bias"] / (step * scale))
            weights = np.clip(np.rint(values["kernel"] / scale), -self.top, self.top).astype(self.dtype)
            product = np.concatenate([self.inputs(part).numpy() @ weights for part in parts], axis=1)
            highest, lowest = ((end(product, 1, keepdims=True) + bias) / unit for end in (np.max, np.min))
            shift = np.rint((highest + lowest) / 2)
            reach = np.maximum(np.maximum(highest - shift, shift - lowest) / (self.half - ROOM), 1)
            values["bias"] = (bias - shift * unit) * step * scale
            values["scale"] += np.log(reach)
            for m, n in zip(*np.nonzero((reach[:, 0] > 1) | (shift[:, 0] != 0))):
                values["table"][m, n] = np.interp(k * reach[m, 0, n] + shift[m, 0, n], k, values["table"][m, n])
        for name in ("scale", "bias", "table"):
            self.parts[name].assign(values[name])

    def remove(self, keep: int, rows: np.ndarray) -> None:
        """Keep in each member the neurons that networks.replace_neurons chooses over `rows` (n, features).

        A row counts by the curvature of the cross-entropy there, so most where the decision is open.
        """
        values = self._values()
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

    def networks(self, X: np.ndarray) -> list[QuantizedNetwork]:
        """Return the members as integers; X: training rows (n, features), which fix the ranges of accumulators."""
        values, found = self._values(), []
        for m, (bits, input_bits) in enumerate(zip(self.bits.ravel().tolist(), self.input_bits.ravel().tolist())):
            part = {name: value[m] for name, value in values.items()}
            step, scale = float(self.input_step[m, 0, 0]), float(np.exp(part["linear_scale"][0, 0]))
            linear = integers(part["linear"][:, 0] / scale, bits)
            if self.neurons:
                tables = self._integer_tables(part, m, X)
            else:
                none, entries = np.zeros((len(linear), 0), np.int32), 2 * self.half
                tables = {"weights": none, "bias": none[0], "tables": np.zeros((0, entries), np.int32)}
                tables |= {"table_step": 1.0, "rounding_bits": self.form.rounding_bits, "accumulator_bits": 0}
            form = {"bits": bits, "p_error": self.form.p_error, "input_bits": input_bits, "input_step": step}
            sums = {"linear": linear, "linear_scale": scale, "offset": float(part["offset"][0, 0])}
            sums |= {"tables_bits": 0, "linear_bits": 0}  # which `fitted` finds
            found.append(QuantizedNetwork(**form, **tables, **sums).fitted(X))
        return found

    def _integer_tables(self, part: dict[str, np.ndarray], m: int, X: np.ndarray) -> dict[str, Any]:
        """Return weights, biases and tables of member m, with the width and the step that they have.

        Each accumulator is moved, by whole rounding units, to the middle of its range, and its table with it: one that
        rounds up out of its power-of-two range comes back at the other end when encrypted, and a range that lies to one
        side costs a bit. The step is the finest, of at least SUM_STEP, at which the sums of all rows keep to SUM_BITS.
        """
        step, scale, unit = self.input_step[m, 0, 0], np.exp(part["scale"]), int(self.unit[m, 0, 0])
        weights = integers(part["kernel"] / scale, self.bits[m, 0, 0])
        bias = np.rint(part["bias"][0] / (float(step) * scale[0])).astype(np.int32)
        x = quantize(X, int(self.input_bits[m, 0, 0]), float(step)).astype(np.float64)
        accumulator = x @ weights + bias
        for _ in range(2):  # the second time with the unit that the bits turned out to have
            middle = (accumulator.max(axis=0) + accumulator.min(axis=0)) / 2 + unit / 4  # the upper end rounds up
            shift = (np.round(middle / unit) * unit).astype(np.int32)
            bits = signed_bits(accumulator - shift)
            unit = 2 ** max(0, bits - self.form.rounding_bits)
        half = min(self.half, 2 ** (bits - 1))  # accumulators that need no rounding can have fewer entries
        k, trained = np.arange(-half, half), np.arange(-self.half, self.half)
        places = ((k[:, None] * unit + shift) / self.unit[m]).T  # (neurons, entries), in units of training
        logits = np.clip([np.interp(p, trained, table) for p, table in zip(places, part["table"])], -MOST, MOST)
        index = np.clip(np.floor((accumulator - shift) / unit + 0.5).astype(int), -half, half - 1) + half
        table_step, tables = SUM_STEP, np.rint(logits / SUM_STEP)
        while np.abs(tables[np.arange(len(bias)), index].sum(axis=1)).max() > MOST_STEPS:
            table_step *= COARSER
            tables = np.rint(logits / table_step)
        numbers = {"rounding_bits": half.bit_length(), "accumulator_bits": bits, "table_step": table_step}
        return {**numbers, "weights": weights, "bias": bias - shift, "tables": tables.astype(np.int32)}


def integers(weights: np.ndarray, bits: int) -> np.ndarray:
    """Return weights in steps of their scale as int32 of `bits`."""
    top = largest_integer(bits)
    return np.clip(np.rint(weights), -top, top).astype(np.int32)


def best_scale(kernel: np.ndarray, top: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the weight scale (members, 1, neurons or 1) of least squared error, of 30 from 0.3 to 1 of the largest.

    kernel: (members, inputs, neurons); top: the largest integer; axes: those that share a scale.
    """
    largest = np.maximum(np.abs(kernel).max(axes, keepdims=True), 1e-3) / top
    candidates = np.multiply.outer(np.linspace(0.3, 1, 30), largest)
    rounded = np.clip(np.round(kernel / candidates), -top, top) * candidates
    best = ((rounded - kernel) ** 2).sum(tuple(axis + 1 for axis in axes), keepdims=True).argmin(0)
    return np.take_along_axis(candidates, best[None], axis=0)[0]
