"""Training of quantized networks as the encrypted graph will compute them, rounding and its noise included (step 3).

Candidates are trained side by side as one batch, which is fast: each variable of all is one tensor with a leading axis
(members,). ReluEnsemble quantizes a float network; tables.TableEnsemble learns what each neuron computes as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.arrays import CLIP_SD
from fhe_mlp.networks import Layers, balanced_weights, epoch_rows
from fhe_mlp.quantized import HiddenLayer, LastLayer, QuantizedNetwork, noise_steps, signed_bits

if TYPE_CHECKING:
    import tensorflow as tf

INPUT_BITS = 5  # of the features at least; Concrete ML's own least width of a network's input
LAST_WEIGHT_BITS = 3  # of the last layer after ReLUs at most: its accumulator is decrypted to the last bit, and wide
LAST_INPUT_BITS = 4  # ones are expensive; and of the activations that go into it
BATCH_SIZE = 128  # beats a gradient step
LOSS_POWER = 0.4  # of generalized_cross_entropy; docs/METHOD.md has what was tried
ROOM = 0.6  # steps that the range penalty keeps free at both ends of the accumulator's range
Noise = Callable[[Any], Any] | None  # what draws the noise of accumulators for a shape; None: no noise


def straight_through(x: tf.Tensor, rounded: tf.Tensor) -> tf.Tensor:
    """`rounded` whose gradient is that of `x` (Bengio, Leonard & Courville, arXiv:1308.3432)."""
    import tensorflow as tf

    return x + tf.stop_gradient(rounded - x)


def generalized_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Loss (1 - p^q) / q of each logit, where p is the probability of its label, which may lie between 0 and 1.

    Zhang & Sabuncu, NeurIPS 2018 (arXiv:1805.07836), with q = LOSS_POWER; cross-entropy is its limit for q = 0. A beat
    that a small network cannot get right costs at most 1 / q, so that it does not pull the others over the threshold.
    """
    import tensorflow as tf

    loss = (-tf.math.expm1(LOSS_POWER * tf.math.log_sigmoid(sign * logits)) / LOSS_POWER for sign in (1, -1))
    return labels * next(loss) + (1 - labels) * next(loss)


def largest_integer(bits: Any) -> Any:
    """Of a signed type of `bits` whose range is symmetric."""
    return 2.0 ** (bits - 1) - 1


class Ensemble:
    """Quantization-aware candidates, one for each of `bits`; what they compute is left to the subclasses.

    Scales are learned with the weights (LSQ, Esser et al., ICLR 2020), as logarithms. rounding_bits: leading bits of
    each accumulator that its bootstrap sees; p_error: chance that this is off by a step, which training adds as noise.
    layers: the float network's kernels and biases, as which they start; X: training rows (n, features).
    """

    learning_rate = 5e-3  # of Adam at the start, falls to 0 along a cosine

    def __init__(
        self,
        layers: Layers,
        bits: Sequence[int],
        rounding_bits: int,
        p_error: float,
        X: np.ndarray,
        dtype: str = "float32",
    ) -> None:
        self.bits = np.array(bits).reshape(-1, 1, 1)
        self.rounding_bits, self.p_error, self.dtype = rounding_bits, p_error, dtype
        self.half = 2 ** (rounding_bits - 1)  # rounded accumulators reach from -half to half - 1 units
        self.input_bits = np.maximum(self.bits, INPUT_BITS)
        self.input_step = (CLIP_SD / largest_integer(self.input_bits)).astype(np.float32).astype(dtype)
        self.start(layers, X)

    def start(self, layers: Layers, X: np.ndarray) -> None:
        """Make what is trained."""
        raise NotImplementedError

    def variables(self) -> list[tf.Variable]:
        """All that is trained, each with the leading axis (members,)."""
        raise NotImplementedError

    def forward(self, X: Any, noise: Noise = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Logits (members, n) of rows X (n, features), and what is added to the loss (members,).

        noise: draws, for a shape, what is added to each accumulator, in rounding steps; None: nothing.
        """
        raise NotImplementedError

    def networks(self, X: np.ndarray) -> list[QuantizedNetwork]:
        """The members as integers; X: training rows (n, features), which fix the accumulators' ranges and widths."""
        raise NotImplementedError

    def fit_ranges(self, X: np.ndarray) -> None:
        """What is to be mended in accumulators' ranges after each epoch; X: training rows (n, features)."""

    def inputs(self, X: Any) -> tf.Tensor:
        """Features (members, n, features) in steps of the input, of rows X (n, features)."""
        import tensorflow as tf

        top = largest_integer(self.input_bits)
        return tf.clip_by_value(tf.round(tf.cast(X, self.dtype)[None] / self.input_step), -top, top)

    def rounded(self, accumulator: tf.Tensor, range_bits: np.ndarray, noise: Noise) -> tuple[tf.Tensor, tf.Tensor]:
        """The accumulators (members, n, neurons) in rounding units, with noise but not yet rounded, and a penalty
        (members,) on those that reach the minimum or maximum of their range of `range_bits` (members, 1, 1)."""
        import tensorflow as tf

        steps = accumulator / self.unit(range_bits)
        reach = tf.reduce_max(tf.abs(steps), axis=1, keepdims=True) / self.half
        penalty = tf.reduce_mean(tf.nn.relu(reach - (1 - ROOM / self.half)), axis=(1, 2))
        if noise:
            steps += noise(tf.shape(steps))
        return steps, penalty

    def unit(self, range_bits: np.ndarray) -> np.ndarray:
        """Rounding unit of accumulators of `range_bits`."""
        return (2.0 ** np.maximum(range_bits - self.rounding_bits, 0)).astype(self.dtype)

    def range_of(self, real: np.ndarray, step: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, ...]:
        """How the accumulators that stand for `real` (members, n, neurons) fill a power-of-two range.

        step, scale: what 1 of the input and of a weight stands for. Returns the middle (members, 1, neurons) of each
        neuron's range, the scale of its weights, no finer than fits, and the bits (members, 1, 1) of the range.
        """
        middle = (real.max(1, keepdims=True) + real.min(1, keepdims=True)) / 2
        reach = np.abs(real - middle).max(1, keepdims=True) / (1 - ROOM / self.half)
        reach = np.maximum(reach, step * scale)  # of a neuron whose accumulator never changes
        aim = np.round(np.log2(reach / (step * scale)).mean(2, keepdims=True) + 0.25)
        return middle, np.maximum(scale, reach / (step * 2.0**aim)), aim + 1

    def train(
        self,
        data: dict[str, Any],
        targets: np.ndarray,
        probability: np.ndarray,
        noise: float,
        epochs: int,
        seed: int,
        progress: Any = None,
    ) -> None:
        """Train and leave in each member the weights of its epoch of least validation loss.

        data: as load_arrays gives; targets: probabilities (n,) for the training rows, a teacher's (Hinton, Vinyals &
        Dean, arXiv:1503.02531) or the labels; probability: chance (n,) of each row in a draw; noise: standard
        deviation that is added to the features.
        """
        import tensorflow as tf
        import tf_keras

        (X, y), (X_val, y_val) = data["train"], data["val"]
        drawn = epoch_rows(y)
        steps = -(-drawn // BATCH_SIZE)
        variables = self.variables()
        rate = tf_keras.optimizers.schedules.CosineDecay(self.learning_rate, epochs * steps)
        optimizer = tf_keras.optimizers.Adam(rate)
        optimizer.build(variables)
        rows, wanted = tf.constant(X, self.dtype), tf.constant(targets, self.dtype)
        rng, generator = np.random.default_rng(seed), tf.random.Generator.from_seed(seed, alg="philox")

        def rounding_noise(shape: tf.Tensor) -> tf.Tensor:
            return noise_steps(self.p_error) * generator.normal(shape, dtype=self.dtype)

        @tf.function
        def epoch(order: tf.Tensor) -> None:
            for number in tf.range(steps):
                chosen = order[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
                batch = tf.gather(rows, chosen)
                batch += noise * generator.normal(tf.shape(batch), dtype=self.dtype)
                with tf.GradientTape() as tape:
                    logits, penalty = self.forward(batch, rounding_noise)
                    labels = tf.broadcast_to(tf.gather(wanted, chosen), tf.shape(logits))
                    losses = generalized_cross_entropy(labels, logits)
                    loss = tf.reduce_sum(tf.reduce_mean(losses, axis=1) + penalty)
                gradients = map(tf.convert_to_tensor, tape.gradient(loss, variables))  # of tables: sparse ones
                optimizer.apply_gradients(zip(gradients, variables))

        weights, labels_val = (tf.constant(part, self.dtype) for part in (balanced_weights(y_val), y_val))

        @tf.function
        def validation_loss() -> tf.Tensor:
            losses = generalized_cross_entropy(labels_val, self.forward(X_val, rounding_noise)[0])
            return tf.reduce_mean(weights * losses, axis=1)

        best, kept = np.full(len(self.bits), np.inf), [variable.numpy() for variable in variables]
        for _ in range(epochs):
            epoch(tf.constant(rng.choice(len(X), drawn, p=probability)))
            self.fit_ranges(X)
            loss = validation_loss().numpy()
            for old, new in zip(kept, variables):
                old[loss < best] = new.numpy()[loss < best]
            best = np.minimum(best, loss)
            if progress is not None:
                progress.update()
        for variable, value in zip(variables, kept):
            variable.assign(value)


class ReluEnsemble(Ensemble):
    """A float network quantized to each of `bits`."""

    def start(self, layers: Layers, X: np.ndarray) -> None:
        """As Ensemble's."""
        hidden = len(layers) - 1
        self.weight_bits = [self.bits] * hidden + [np.minimum(self.bits, LAST_WEIGHT_BITS)]
        self.output_bits = [self.bits] * (hidden - 1) + [np.minimum(self.bits, LAST_INPUT_BITS)]
        self.parts: dict[str, list[tf.Variable]] = {n: [] for n in ("kernel", "bias", "offset", "scale", "step")}
        self.range_bits = []  # accumulator bits that training aims at
        members = len(self.bits)
        x, step = np.broadcast_to(X, (members, *X.shape)), self.input_step
        for index, (kernel, bias) in enumerate(layers):
            last = index == hidden
            kernel = np.broadcast_to(kernel, (members, *kernel.shape))
            scale = best_scale(kernel, largest_integer(self.weight_bits[index]), 2 if last else 1)
            if last:
                self._add("offset", np.broadcast_to(bias, (members, 1, len(bias))))
            else:
                real = x @ kernel
                middle, scale, range_bits = self.range_of(real, step, scale)
                self.range_bits.append(range_bits)
                x = np.maximum(real + bias, 0)
                highest = np.quantile(x, 0.999, axis=(1, 2), keepdims=True)
                step = np.maximum(highest, 1e-3) / (2.0 ** self.output_bits[index] - 1)
                self._add("step", np.log(step))
                self._add("bias", -middle)  # added to the accumulator, it centres its range
                self._add("offset", bias + middle)
            self._add("kernel", kernel)
            self._add("scale", np.log(scale))

    def _add(self, name: str, value: np.ndarray) -> None:
        import tensorflow as tf

        self.parts[name].append(tf.Variable(value, dtype=self.dtype))

    def variables(self) -> list[tf.Variable]:
        """As Ensemble's."""
        return [variable for group in self.parts.values() for variable in group]

    def forward(self, X: Any, noise: Noise = None) -> tuple[tf.Tensor, tf.Tensor]:
        """As Ensemble's."""
        import tensorflow as tf

        step, parts, penalty = self.input_step, self.parts, 0.0
        x = self.inputs(X)
        for index, kernel in enumerate(parts["kernel"]):
            scale, top = tf.exp(parts["scale"][index]), largest_integer(self.weight_bits[index])
            weights = tf.clip_by_value(kernel / scale, -top, top)
            accumulator = x @ straight_through(weights, tf.round(weights))
            if index == len(parts["step"]):
                break
            bias = parts["bias"][index] / (step * scale)
            accumulator += straight_through(bias, tf.round(bias))
            steps, more = self.rounded(accumulator, self.range_bits[index], noise)
            steps, penalty = straight_through(steps, tf.floor(steps + 0.5)), penalty + more
            real = steps * self.unit(self.range_bits[index]) * step * scale + parts["offset"][index]
            step = tf.exp(parts["step"][index])
            x = tf.clip_by_value(real / step, 0, 2.0 ** self.output_bits[index] - 1)
            x = straight_through(x, tf.round(x))
        return (accumulator * step * scale + parts["offset"][-1])[..., 0], penalty

    def networks(self, X: np.ndarray) -> list[QuantizedNetwork]:
        """As Ensemble's."""
        parts = {name: [variable.numpy() for variable in group] for name, group in self.parts.items()}
        found = []
        for m in range(len(self.bits)):
            input_step, top = float(self.input_step[m, 0, 0]), largest_integer(self.input_bits[m])
            x, step, hidden = np.clip(np.rint(X / input_step), -top, top), input_step, []
            for index, kernel in enumerate(parts["kernel"]):
                scale = np.exp(parts["scale"][index][m].astype(np.float64))
                weights = integers(kernel[m] / scale, self.weight_bits[index][m, 0, 0])
                offset = parts["offset"][index][m]
                if index == len(parts["step"]):
                    break
                bias = np.rint(parts["bias"][index][m, 0] / (step * scale[0])).astype(np.int32)
                output, bits = float(np.exp(parts["step"][index][m, 0, 0])), int(self.output_bits[index][m, 0, 0])
                relu = functools.partial(quantized_relu, scale=step * scale, offset=offset, step=output, bits=bits)
                aim = int(self.range_bits[index][m, 0, 0])
                x, layer = hidden_layer(x, weights, bias, relu, output, aim, self.rounding_bits)
                hidden.append(layer)
                step = output
            no_path = np.zeros(X.shape[1], np.int32)
            last = LastLayer(weights[:, 0], float(scale.item()), no_path, 1.0, float(offset.item()))
            bits, input_bits = int(self.bits[m, 0, 0]), int(self.input_bits[m, 0, 0])
            found.append(
                QuantizedNetwork(bits, self.rounding_bits, self.p_error, input_bits, input_step, tuple(hidden), last)
            )
        return found


def integers(weights: np.ndarray, bits: int) -> np.ndarray:
    """Weights in steps of their scale as int32 of `bits`."""
    top = largest_integer(bits)
    return np.clip(np.rint(weights), -top, top).astype(np.int32)


def quantized_relu(
    accumulator: np.ndarray, scale: np.ndarray, offset: np.ndarray, step: float, bits: int
) -> np.ndarray:
    """ReLU of accumulators (n, neurons) times scale plus offset, in steps and as unsigned integers of `bits`."""
    return np.clip(np.rint((accumulator * scale + offset) / step), 0, 2**bits - 1)


def best_scale(kernel: np.ndarray, top: np.ndarray, axes: int) -> np.ndarray:
    """Weight scale (members, 1, neurons or 1) of least squared error, of 30 from 0.3 to 1 of the largest one.

    kernel: (members, inputs, neurons); top: the largest integer; axes: 1 for a scale a neuron, 2 for one for all.
    """
    along = (1,) if axes == 1 else (1, 2)
    largest = np.maximum(np.abs(kernel).max(along, keepdims=True), 1e-3) / top
    candidates = [largest * share for share in np.linspace(0.3, 1, 30)]
    errors = [
        ((np.clip(np.round(kernel / c), -top, top) * c - kernel) ** 2).sum(along, keepdims=True) for c in candidates
    ]
    return np.take_along_axis(np.array(candidates), np.argmin(errors, axis=0)[None], axis=0)[0]


def hidden_layer(
    x: np.ndarray,
    weights: np.ndarray,
    bias: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    step: float,
    aim: int,
    rounding_bits: int,
) -> tuple[np.ndarray, HiddenLayer]:
    """The layer whose neurons compute `function` (n, neurons) of their accumulators, and its outputs (n, neurons).

    x: its integer inputs (n, inputs) for the training rows; aim: accumulator bits in training. Each accumulator is
    moved, by whole rounding units, to the middle of its range, and its table with it: one that rounds up out of its
    power-of-two range comes back at the other end when encrypted, and a range that lies to one side costs a bit.
    """
    accumulator, bits, ends = x @ weights + bias, aim, 2 ** (rounding_bits - 1)
    for _ in range(2):  # the second time with the unit that the bits turned out to have
        unit = 2 ** max(0, bits - rounding_bits)
        middle = (accumulator.max(axis=0) + accumulator.min(axis=0)) / 2 + unit / 4  # the upper end rounds up
        shift = (np.round(middle / unit) * unit).astype(np.int32)
        bits = signed_bits(accumulator - shift)
    unit = 2 ** max(0, bits - rounding_bits)
    table = function(np.arange(-ends, ends)[:, None] * unit + shift).astype(np.int32)
    layer = HiddenLayer(weights, bias - shift, table, step, bits)
    return layer.outputs((accumulator - shift) / unit), layer
