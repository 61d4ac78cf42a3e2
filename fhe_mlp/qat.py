"""Training of quantized networks as the encrypted graph will compute them, rounding and its noise included (step 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.arrays import CLIP_SD
from fhe_mlp.networks import balanced_weights, epoch_rows
from fhe_mlp.quantized import QuantizedLayer, QuantizedNetwork, signed_bits

if TYPE_CHECKING:
    import tensorflow as tf

INPUT_BITS = 5  # of the features at least; Concrete ML's own least width of a network's input
LAST_WEIGHT_BITS = (
    3  # of the last layer at most: its accumulator is decrypted to the last bit, and wide ones are expensive
)
LAST_INPUT_BITS = 4  # of the activations that go into it, for the same reason
BATCH_SIZE = 128  # beats a gradient step
LEARNING_RATE = 5e-3  # of Adam at the start, falls to 0 along a cosine (2e-3, 5e-3 and 1e-2 tried on validation rows)
# What encryption adds before rounding, in steps of the rounded accumulator: a Gaussian of this standard deviation
# leaves half a step once in 2^11 draws.
ROUNDING_NOISE = 0.14
RANGE_ROWS = 2000  # training rows that give the accumulators' widths after each epoch; in the end all do
ROOM = 0.6  # steps that the range penalty keeps free at both ends of the accumulator's range


def straight_through(x: tf.Tensor, rounded: tf.Tensor) -> tf.Tensor:
    """`rounded` whose gradient is that of `x` (Bengio, Leonard & Courville, arXiv:1308.3432)."""
    import tensorflow as tf

    return x + tf.stop_gradient(rounded - x)


class Ensemble:
    """Quantization-aware candidates from one float network, one for each (bits, rounding bits) in `members`.

    They are trained as one batch, which is fast: all are one tensor with a leading axis (members,). Scales and steps
    are learned with the weights (LSQ, Esser et al., ICLR 2020), as logarithms. layers: float kernels and biases; X:
    training rows.
    """

    def __init__(self, layers: list, members: Sequence[tuple[int, int]], X: np.ndarray, dtype: str = "float32") -> None:
        self.members, self.dtype = list(members), dtype
        bits, rounding_bits = np.array(members).reshape(-1, 2, 1, 1).swapaxes(0, 1)
        hidden = len(layers) - 1
        self.weight_bits = [bits] * hidden + [np.minimum(bits, LAST_WEIGHT_BITS)]
        self.output_bits = [bits] * (hidden - 1) + [np.minimum(bits, LAST_INPUT_BITS)]
        self.input_bits, self.rounding_bits = np.maximum(bits, INPUT_BITS), rounding_bits
        self.input_step = (CLIP_SD / (2.0 ** (self.input_bits - 1) - 1)).astype(np.float32).astype(dtype)
        self.variables: dict[str, list[tf.Variable]] = {n: [] for n in ("kernel", "bias", "offset", "scale", "step")}
        self.range_bits = []  # accumulator bits that training aims at
        x, step = np.broadcast_to(X, (len(bits), *X.shape)), self.input_step
        for index, (kernel, bias) in enumerate(layers):
            last = index == hidden
            kernel = np.broadcast_to(kernel, (len(bits), *kernel.shape))
            scale = self._best_scale(kernel, 2.0 ** (self.weight_bits[index] - 1) - 1, 2 if last else 1)
            real = x @ kernel
            middle = -bias if last else (real.max(1, keepdims=True) + real.min(1, keepdims=True)) / 2
            if not last:
                reach = np.abs(real - middle).max(1, keepdims=True) / (1 - ROOM / 2.0 ** (rounding_bits - 1))
                aim = np.round(np.log2(reach / (step * scale)).mean(2, keepdims=True) + 0.25)
                scale = np.maximum(scale, reach / (step * 2.0**aim))  # narrower than the range: widened to fill it
                self.range_bits.append(aim + 1)
                x = np.maximum(real + bias, 0)
                highest = np.quantile(x, 0.999, axis=(1, 2), keepdims=True)
                step = np.maximum(highest, 1e-3) / (2.0 ** self.output_bits[index] - 1)
                self._add("step", np.log(step))
                self._add("bias", -middle)  # added to the accumulator, it centres its range
            self._add("offset", np.broadcast_to(bias + middle if not last else bias, (len(bits), 1, len(bias))))
            self._add("kernel", kernel)
            self._add("scale", np.log(scale))

    def _add(self, name: str, value: np.ndarray) -> None:
        import tensorflow as tf

        self.variables[name].append(tf.Variable(value, dtype=self.dtype))

    @staticmethod
    def _best_scale(kernel: np.ndarray, top: np.ndarray, axes: int) -> np.ndarray:
        """Weight scale (members, 1, neurons or 1) of least squared error, of 30 from 0.3 to 1 of the largest one."""
        along = (1,) if axes == 1 else (1, 2)
        largest = np.maximum(np.abs(kernel).max(along, keepdims=True), 1e-3) / top
        candidates = [largest * share for share in np.linspace(0.3, 1, 30)]
        errors = [
            ((np.clip(np.round(kernel / c), -top, top) * c - kernel) ** 2).sum(along, keepdims=True) for c in candidates
        ]
        return np.take_along_axis(np.array(candidates), np.argmin(errors, axis=0)[None], axis=0)[0]

    def forward(self, X: Any, range_bits: list | None = None, noise: float = 0.0) -> tuple[Any, Any, list]:
        """Logits (members, n) and range penalty (members,) of rows X (n, features), and hidden accumulators' bits.

        The bits (members, 1, 1) are those given. Without any they are what the rows need when nothing is rounded, which
        is how Concrete ML finds the bits that rounding removes, and each neuron's range lies in the middle (`centred`);
        the logits are then those of the unrounded network.
        """
        import tensorflow as tf

        step, v = self.input_step, self.variables
        top = 2.0 ** (self.input_bits - 1) - 1
        x = tf.clip_by_value(tf.round(tf.cast(X, self.dtype)[None] / step), -top, top)
        penalty, used = 0.0, []
        for index, kernel in enumerate(v["kernel"]):
            scale, top = tf.exp(v["scale"][index]), 2.0 ** (self.weight_bits[index] - 1) - 1
            weights = tf.clip_by_value(kernel / scale, -top, top)
            accumulator = x @ straight_through(weights, tf.round(weights))
            if index == len(v["step"]):
                return (accumulator * step * scale + v["offset"][index])[..., 0], penalty, used
            bias = v["bias"][index] / (step * scale)
            accumulator += straight_through(bias, tf.round(bias))
            if range_bits is None:
                highest, lowest = (r(accumulator, axis=1, keepdims=True) for r in (tf.reduce_max, tf.reduce_min))
                largest = tf.reduce_max((highest - lowest) / 2, axis=2, keepdims=True)
                powers = 2.0 ** np.arange(24)
                used.append(1 + tf.reduce_sum(tf.cast(largest >= powers, self.dtype), axis=2, keepdims=True))
            else:
                used.append(tf.cast(range_bits[index], self.dtype))
            unit = 2.0 ** tf.maximum(used[index] - self.rounding_bits, 0)
            reach = tf.reduce_max(tf.abs(accumulator), axis=1, keepdims=True) / (unit * 2.0 ** (self.rounding_bits - 1))
            penalty += tf.reduce_mean(tf.nn.relu(reach - (1 - ROOM / 2.0 ** (self.rounding_bits - 1))), axis=(1, 2))
            steps = accumulator / unit
            if noise:
                steps += noise * tf.random.normal(tf.shape(steps), dtype=self.dtype)
            if range_bits is not None:
                steps = straight_through(steps, tf.floor(steps + 0.5))
            real = steps * unit * step * scale + v["offset"][index]
            step = tf.exp(v["step"][index])
            x = tf.clip_by_value(real / step, 0, 2.0 ** self.output_bits[index] - 1)
            x = straight_through(x, tf.round(x))
        raise ValueError("a network has at least one layer")

    def state(self) -> list[np.ndarray]:
        """Values of all variables, each with the leading axis (members,)."""
        return [variable.numpy() for group in self.variables.values() for variable in group]

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
        variables = [variable for group in self.variables.values() for variable in group]
        optimizer = tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.CosineDecay(LEARNING_RATE, epochs * steps))
        optimizer.build(variables)
        rows, wanted = tf.constant(X, self.dtype), tf.constant(targets, self.dtype)

        rng = np.random.default_rng(seed)
        few = X[rng.choice(len(X), RANGE_ROWS, p=probability)]

        @tf.function
        def epoch(order: tf.Tensor) -> None:
            for number in tf.range(steps):
                chosen = order[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
                batch = tf.gather(rows, chosen)
                batch += noise * tf.random.normal(tf.shape(batch), dtype=self.dtype)
                with tf.GradientTape() as tape:
                    logits, penalty, _ = self.forward(batch, self.range_bits, ROUNDING_NOISE)
                    labels = tf.broadcast_to(tf.gather(wanted, chosen), tf.shape(logits))
                    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
                    loss = tf.reduce_sum(tf.reduce_mean(losses, axis=1) + penalty)
                optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

        @tf.function
        def validation_logits() -> tf.Tensor:
            return self.forward(X_val, self.forward(few)[2])[0]

        weights, sign = balanced_weights(y_val), 1 - 2 * y_val
        best, weights_kept = np.full(len(self.members), np.inf), self.state()
        for _ in range(epochs):
            epoch(tf.constant(rng.choice(len(X), drawn, p=probability)))
            logits = validation_logits().numpy()
            loss = np.mean(np.logaddexp(0, sign * logits) * weights, axis=1)
            for old, new in zip(weights_kept, self.state()):
                old[loss < best] = new[loss < best]
            best = np.minimum(best, loss)
            if progress is not None:
                progress.update()
        for variable, value in zip(variables, weights_kept):
            variable.assign(value)

    def networks(self, X: np.ndarray) -> list[QuantizedNetwork]:
        """The members as integers; X: training rows (n, features), which fix the accumulators' ranges and widths."""
        v = {name: [variable.numpy() for variable in group] for name, group in self.variables.items()}
        networks = []
        for m, (bits, rounding_bits) in enumerate(self.members):
            layers, step = [], np.float64(self.input_step[m, 0, 0])
            for index, kernel in enumerate(v["kernel"]):
                hidden = index < len(v["step"])
                scale = np.broadcast_to(np.exp(v["scale"][index][m, 0]), kernel.shape[2:]).astype(np.float32)
                top = 2 ** (self.weight_bits[index][m, 0, 0] - 1) - 1
                weights = np.clip(np.round(kernel[m] / np.exp(v["scale"][index][m])), -top, top)
                bias = (
                    np.round(v["bias"][index][m, 0] / (step * np.exp(v["scale"][index][m, 0]))) if hidden else 0 * scale
                )
                step = np.float64(np.float32(np.exp(v["step"][index][m, 0, 0]))) if hidden else 0.0
                layers.append(
                    QuantizedLayer(
                        weights.astype(np.int32),
                        bias.astype(np.int32),
                        scale,
                        v["offset"][index][m, 0].astype(np.float32),
                        int(self.weight_bits[index][m, 0, 0]),
                        int(self.output_bits[index][m, 0, 0]) if hidden else 0,
                        float(step),
                        int(self.range_bits[index][m, 0, 0]) if hidden else 0,
                    )
                )
            input_step = float(np.float32(self.input_step[m, 0, 0]))
            network = QuantizedNetwork(bits, rounding_bits, int(self.input_bits[m, 0, 0]), input_step, tuple(layers))
            networks.append(centred(network, X))
        return networks


def centred(network: QuantizedNetwork, X: np.ndarray) -> QuantizedNetwork:
    """The same function with each hidden accumulator moved, by whole rounding units, to the middle of its range.

    An accumulator that rounds up out of its power-of-two range comes back at the other end when encrypted, and a range
    that lies to one side costs a bit. What the bias loses, the offset after the rounding gains. X: training rows
    (n, features); accumulator_bits are what training aimed at, and of the result what these rows need.
    """
    for index, layer in enumerate(network.layers[:-1]):
        step = network.layers[index - 1].output_step if index else network.input_step
        ends = np.concatenate([network.run(X, rounding)[1][index] for rounding in (True, False)])
        unit = network.rounding_unit(layer)
        middle = (ends.max(axis=0) + ends.min(axis=0)) / 2 + unit / 4  # the upper end rounds up, the lower one cannot
        shift = (np.round(middle / unit) * unit).astype(np.int32)
        bits = signed_bits(network.run(X, rounding=False)[1][index] - shift)
        offset = (layer.offset + shift * step * layer.scale).astype(np.float32)
        moved = replace(layer, bias=layer.bias - shift, offset=offset, accumulator_bits=bits)
        network = replace(network, layers=(*network.layers[:index], moved, *network.layers[index + 1 :]))
    return network
