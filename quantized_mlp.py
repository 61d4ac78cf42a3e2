"""Quantized networks, exactly as the encrypted graph computes them: their training, their ONNX graph and their price.

Step 3 trains them, step 4 writes them as ONNX, step 5 encrypts them; all three must agree to the last bit, so what they
share stands here. This is no step and has no command.

A hidden layer computes, on the integers x of the layer before it,

    accumulator = x @ weights + bias                               integers; additions only, cheap under encryption
    rounded     = the accumulator's leading `kept_bits` bits       what the programmable bootstrap (PBS) looks at
    output      = ReLU(rounded * input step * scale + offset) / output step, rounded and clipped to `output_bits` bits

and everything after the accumulator is one table look-up, the PBS, whose price follows kept_bits. So scale and offset
may differ by neuron for nothing: every neuron can fill the power-of-two range of which the leading bits are kept. The
last layer has no PBS; its accumulator times input step and scale, plus offset, is the logit.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess_mitbih import CLIP_SD, FEATURES, InputError, balanced_weights, first_line

if TYPE_CHECKING:
    import onnx
    import tensorflow as tf

BITS = (2, 3, 4, 5, 6, 7)  # of weights and activations, as published
INPUT_BITS = 5  # of the features at least; Concrete ML's own least width of a network's input
LAST_WEIGHT_BITS = 3  # of the last layer at most: its accumulator is decrypted to the last bit, and wide ones are dear
LAST_INPUT_BITS = 4  # of the activations that go into it, for the same reason
BATCH_SIZE = 128  # beats a gradient step
LEARNING_RATE = 5e-3  # of Adam at the start, falls to 0 along a cosine (2e-3, 5e-3 and 1e-2 tried on validation rows)
ROUNDING_NOISE = (
    0.14  # standard deviation, in steps of the rounded accumulator, of what encryption adds before rounding;
)
# a Gaussian of this width leaves half a step once in 2^11 draws
RANGE_ROWS = 2000  # training rows that give the accumulators' widths after each epoch; in the end all do
ROOM = 0.6  # steps that the range penalty keeps free at the ends of the accumulator's range
COMPLEXITY_OF_PBS = {
    2: 5.0e7,
    3: 5.5e7,
    4: 7.0e7,
    5: 1.1e8,
    6: 3.3e8,
    7: 7.7e8,
}  # by kept bits, p_error 2^-13, measured
DOMAIN = "onnx.brevitas"  # of the Quant node that Concrete ML imports


@dataclass(frozen=True)
class QuantizedLayer:
    """weights (inputs, neurons) and bias (neurons,) int32; scale and offset (neurons,) float32; see the module's text.

    Of the last layer, bias is 0, scale is the same for all neurons, and output_bits and output_step are 0.
    """

    weights: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    weight_bits: int
    output_bits: int
    output_step: float
    accumulator_bits: int  # of the signed accumulator over all training rows


@dataclass(frozen=True)
class QuantizedNetwork:
    """`bits` names the configuration: no weight and no activation is wider."""

    bits: int
    kept_bits: int
    input_bits: int
    input_step: float
    layers: tuple[QuantizedLayer, ...]

    def run(self, X: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (n,) of rows X (n, 32) float32, and the accumulators (n, neurons) of each hidden layer."""
        top = 2 ** (self.input_bits - 1) - 1
        x = np.clip(np.rint(X.astype(np.float64) / self.input_step), -top, top)
        step, accumulators = self.input_step, []
        for layer in self.layers:
            accumulator = x @ layer.weights + layer.bias
            if layer is self.layers[-1]:
                return (accumulator * step * layer.scale.astype(np.float64) + layer.offset)[:, 0], accumulators
            accumulators.append(accumulator)
            unit = 2.0 ** max(0, layer.accumulator_bits - self.kept_bits)
            rounded = np.floor(accumulator / unit + 0.5) * unit if unit > 1 else accumulator
            real = rounded * step * layer.scale.astype(np.float64) + layer.offset
            x = np.clip(np.rint(np.maximum(real, 0) / layer.output_step), 0, 2**layer.output_bits - 1)
            step = layer.output_step
        raise ValueError("a network has at least one layer")

    def accuracy(self, X: np.ndarray, y: np.ndarray) -> float:
        """Share of the rows of X (n, 32) whose logit lies on the right side of 0."""
        return float(np.mean((self.run(X)[0] > 0) == y))

    def pbs(self) -> int:
        """Programmable bootstraps of one beat: one a hidden neuron."""
        return sum(layer.weights.shape[1] for layer in self.layers[:-1])

    def predicted_complexity(self) -> float:
        """Price before anything is compiled: neurons times the cost of their kept bits."""
        return self.pbs() * COMPLEXITY_OF_PBS[self.kept_bits]


def signed_bits(values: np.ndarray) -> int:
    """Bits of the least two's complement type that holds all integers in `values`."""
    return int(max(values.max(), -values.min() - 1, 0)).bit_length() + 1


# ------------------------------------------------------------------------------------------------------------- training
def straight_through(x: tf.Tensor, rounded: tf.Tensor) -> tf.Tensor:
    """`rounded` whose gradient is that of `x` (Bengio, Leonard & Courville, arXiv:1308.3432)."""
    import tensorflow as tf

    return x + tf.stop_gradient(rounded - x)


class Population:
    """Fake-quantized copies of one float network, one for each (bits, kept bits) in `members`, trained side by side.

    Side by side is fast: all copies are one tensor with a leading axis (members,). Scales and steps are learned with
    the weights (LSQ, Esser et al., ICLR 2020), as logarithms. layers: float kernels and biases; X: training rows.
    """

    def __init__(self, layers: list, members: Sequence[tuple[int, int]], X: np.ndarray, dtype: str = "float32") -> None:
        self.members, self.dtype = list(members), dtype
        bits, kept = np.array(members).reshape(-1, 2, 1, 1).swapaxes(0, 1)
        hidden = len(layers) - 1
        self.weight_bits = [bits] * hidden + [np.minimum(bits, LAST_WEIGHT_BITS)]
        self.output_bits = [bits] * (hidden - 1) + [np.minimum(bits, LAST_INPUT_BITS)]
        self.input_bits, self.kept = np.maximum(bits, INPUT_BITS), kept
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
                reach = np.abs(real - middle).max(1, keepdims=True) / (1 - ROOM / 2.0 ** (kept - 1))
                aim = np.round(np.log2(reach / (step * scale)).mean(2, keepdims=True) + 0.25)
                scale = np.maximum(scale, reach / (step * 2.0**aim))  # narrower than the range: widened to fill it
                self.range_bits.append(aim + 1)
                x = np.maximum(real + bias, 0)
                highest = np.quantile(x, 0.999, axis=(1, 2), keepdims=True)
                step = np.maximum(highest, 1e-3) / (2.0 ** self.output_bits[index] - 1)
                self._add("step", np.log(step))
                self._add("bias", -middle)  # goes into the accumulator and centres its range
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
        """Logits (members, n) and range penalty (members,) of rows X (n, 32), and each hidden layer's accumulator bits.

        The bits (members, 1, 1) are those given or, without any, what the rows need.
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
                largest = tf.reduce_max(tf.maximum(accumulator, -accumulator - 1), axis=(1, 2), keepdims=True)
                powers = 2.0 ** np.arange(24)
                used.append(1 + tf.reduce_sum(tf.cast(largest >= powers, self.dtype), axis=2, keepdims=True))
            else:
                used.append(tf.cast(range_bits[index], self.dtype))
            unit = 2.0 ** tf.maximum(used[index] - self.kept, 0)
            reach = tf.reduce_max(tf.abs(accumulator), axis=1, keepdims=True) / (unit * 2.0 ** (self.kept - 1))
            penalty += tf.reduce_mean(tf.nn.relu(reach - (1 - ROOM / 2.0 ** (self.kept - 1))), axis=(1, 2))
            steps = accumulator / unit
            if noise:
                steps += noise * tf.random.normal(tf.shape(steps), dtype=self.dtype)
            real = straight_through(steps, tf.floor(steps + 0.5)) * unit * step * scale + v["offset"][index]
            step = tf.exp(v["step"][index])
            x = tf.clip_by_value(real / step, 0, 2.0 ** self.output_bits[index] - 1)
            x = straight_through(x, tf.round(x))
        raise ValueError("a network has at least one layer")

    def state(self) -> list[np.ndarray]:
        """Values of all variables, each with the leading axis (members,)."""
        return [variable.numpy() for group in self.variables.values() for variable in group]

    def train(self, data: dict[str, Any], targets: np.ndarray, epochs: int, seed: int, progress: Any = None) -> None:
        """Train and leave in each member the weights of its epoch of least validation loss.

        data: as load_arrays gives; targets: probabilities (n,) for the training rows, a teacher's (Hinton, Vinyals &
        Dean, arXiv:1503.02531) or the labels.
        """
        import tensorflow as tf
        import tf_keras

        X, (X_val, y_val) = data["train"][0], data["val"]
        steps = -(-len(X) // BATCH_SIZE)
        variables = [variable for group in self.variables.values() for variable in group]
        optimizer = tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.CosineDecay(LEARNING_RATE, epochs * steps))
        optimizer.build(variables)
        rows, wanted = tf.constant(X, self.dtype), tf.constant(targets, self.dtype)

        rng = np.random.default_rng(seed)
        few = X[rng.permutation(len(X))[:RANGE_ROWS]]

        @tf.function
        def epoch(order: tf.Tensor) -> None:
            for number in tf.range(steps):
                chosen = order[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
                with tf.GradientTape() as tape:
                    logits, penalty, _ = self.forward(tf.gather(rows, chosen), self.range_bits, ROUNDING_NOISE)
                    labels = tf.broadcast_to(tf.gather(wanted, chosen), tf.shape(logits))
                    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
                    loss = tf.reduce_sum(tf.reduce_mean(losses, axis=1) + penalty)
                optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

        @tf.function
        def validation_logits() -> tf.Tensor:
            return self.forward(X_val, self.forward(few)[2])[0]

        weights, sign = balanced_weights(y_val), 1 - 2 * y_val
        best, kept = np.full(len(self.members), np.inf), self.state()
        for _ in range(epochs):
            epoch(tf.constant(rng.permutation(len(X))))
            logits = validation_logits().numpy()
            loss = np.mean(np.logaddexp(0, sign * logits) * weights, axis=1)
            for old, new in zip(kept, self.state()):
                old[loss < best] = new[loss < best]
            best = np.minimum(best, loss)
            if progress is not None:
                progress.update()
        for variable, value in zip(variables, kept):
            variable.assign(value)

    def networks(self, X: np.ndarray) -> list[QuantizedNetwork]:
        """The members as integers; X: training rows (n, 32), which fix the accumulators' widths."""
        v = {name: [variable.numpy() for variable in group] for name, group in self.variables.items()}
        range_bits = [bits.numpy() for bits in self.forward(X)[2]]
        networks = []
        for m, (bits, kept_bits) in enumerate(self.members):
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
                        int(range_bits[index][m, 0, 0]) if hidden else 0,
                    )
                )
            input_step = float(np.float32(self.input_step[m, 0, 0]))
            networks.append(QuantizedNetwork(bits, kept_bits, int(self.input_bits[m, 0, 0]), input_step, tuple(layers)))
        return networks


# ---------------------------------------------------------------------------------------------------------------- files
def add_to_h5(content: bytes, networks: Sequence[QuantizedNetwork]) -> bytes:
    """The .h5 file `content` of a float network with the networks quantized from it in its group "quantized"."""
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        for network in networks:
            group = file.create_group(f"quantized/{network.bits}")
            for field in fields(network)[:-1]:
                group.attrs[field.name] = getattr(network, field.name)
            for number, layer in enumerate(network.layers):
                for field in fields(layer):
                    group[f"{number}/{field.name}"] = getattr(layer, field.name)
    return buffer.getvalue()


def read_h5(path: Path, made_by: str) -> list[QuantizedNetwork]:
    """The quantized networks in an .h5 file of step 3, none in another's; `made_by` is the command that makes the file.

    Raises InputError for a damaged group.
    """
    import h5py

    networks = []
    try:
        with h5py.File(path) as file:
            for group in file.get("quantized", {}).values():
                layers = tuple(
                    QuantizedLayer(**{field.name: group[number][field.name][()] for field in fields(QuantizedLayer)})
                    for number in sorted(group, key=int)
                )
                networks.append(check(QuantizedNetwork(**group.attrs, layers=layers)))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path}: its quantized networks are damaged ({first_line(error)}); make it with: {made_by}"
        ) from None
    return networks


def check(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network itself. Raises ValueError when its parts do not fit together or hold what no training leaves."""
    widths = [len(FEATURES), *(layer.weights.shape[1] for layer in network.layers)]
    if not network.layers or widths[-1] != 1 or network.bits not in BITS or network.kept_bits not in COMPLEXITY_OF_PBS:
        raise ValueError(f"no quantized network from {len(FEATURES)} features to one logit")
    for index, layer in enumerate(network.layers):
        vectors = (layer.bias, layer.scale, layer.offset)
        if layer.weights.shape != (widths[index], widths[index + 1]) or {v.shape for v in vectors} != {
            (widths[index + 1],)
        }:
            raise ValueError(f"layer {index}: shapes that do not fit")
        hidden = index < len(network.layers) - 1
        if not all(np.isfinite(v).all() for v in vectors) or (hidden and not layer.output_step > 0):
            raise ValueError(f"layer {index}: values that are not finite, or a step that is not positive")
        if not 2 <= layer.weight_bits <= max(BITS) or np.abs(layer.weights).max() >= 2 ** (layer.weight_bits - 1):
            raise ValueError(f"layer {index}: weights of more than {layer.weight_bits} bits")
    return network


def quant_function() -> onnx.FunctionProto:
    """Concrete ML's Quant node in standard operators (zero point 0), so that ONNX Runtime can run the graph as well."""
    from onnx import parser

    return parser.parse_function(
        f"""
        <domain: "{DOMAIN}", opset_import: ["" : 14]>
        Quant <signed, narrow, rounding_mode> (x, scale, zero_point, bit_width) => (y)
        {{
            one = Constant <value_float = 1.0> ()
            two = Constant <value_float = 2.0> ()
            is_signed = Constant <value_int: int = @signed> ()
            is_narrow = Constant <value_int: int = @narrow> ()
            s = Cast <to = 1> (is_signed)
            n = Cast <to = 1> (is_narrow)
            exponent = Sub (bit_width, s)
            size = Pow (two, exponent)
            high = Sub (size, one)
            room = Sub (size, n)
            size_down = Mul (room, s)
            low = Neg (size_down)
            steps = Div (x, scale)
            whole = Round (steps)
            capped = Min (whole, high)
            clipped = Max (capped, low)
            y = Mul (clipped, scale)
        }}
        """
    )


def to_onnx(network: QuantizedNetwork, opset: int) -> onnx.ModelProto:
    """The network as a graph of Quant, Gemm, Mul, Add, Relu and one Sigmoid, for compile_onnx_model(import_qat=True).

    The hidden layers' bias is quantized with the accumulator's own step, so that it is added before the rounding; scale
    and offset come after it. The rounding is no ONNX operator: `kept_bits` stands in the graph's metadata.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, values = [], []

    def constant(name: str, value: Any) -> str:
        values.append(numpy_helper.from_array(np.asarray(value, dtype=np.float32), name))
        return name

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def quant(name: str, step: float, bits: int, signed: bool, narrow: bool) -> str:
        parameters = [constant(f"{name}.{kind}", v) for kind, v in (("step", step), ("zero", 0.0), ("bits", bits))]
        attributes = {"domain": DOMAIN, "signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return add("Quant", [name, *parameters], f"{name}.quantized", **attributes)

    step = network.input_step
    x = quant("features", step, network.input_bits, signed=True, narrow=True)
    for index, layer in enumerate(network.layers):
        name = f"layer_{index}"
        hidden = index < len(network.layers) - 1
        unit = np.float32(1) if hidden else layer.scale[0]  # the last layer has one scale, the others one a neuron
        weights = constant(f"{name}.weights", layer.weights * unit)
        inputs = [x, quant(weights, unit, layer.weight_bits, signed=True, narrow=True)]
        if not hidden:
            logit = add("Gemm", [*inputs, constant(f"{name}.offset", layer.offset)], "logit")
            add("Sigmoid", [logit], "probability")
            break
        bias = constant(f"{name}.bias", layer.bias * np.float32(step))
        bias_bits = signed_bits(layer.bias) + 1
        real = add("Gemm", [*inputs, quant(bias, step, bias_bits, signed=True, narrow=False)], f"{name}.accumulator")
        real = add("Mul", [real, constant(f"{name}.scale", layer.scale)], f"{name}.scaled")
        real = add("Add", [real, constant(f"{name}.offset", layer.offset)], f"{name}.shifted")
        x = quant(
            add("Relu", [real], f"{name}.output"), layer.output_step, layer.output_bits, signed=False, narrow=False
        )
        step = layer.output_step
    graph = helper.make_graph(
        nodes,
        "quantized_mlp",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, len(FEATURES)])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [None, 1])],
        values,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[quant_function()], ir_version=8)
    widths = " ".join(str(layer.accumulator_bits) for layer in network.layers[:-1])
    helper.set_model_props(
        model, {"bits": str(network.bits), "kept_bits": str(network.kept_bits), "accumulator_bits": widths}
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def from_onnx(model: onnx.ModelProto) -> QuantizedNetwork:
    """The network that `to_onnx` wrote. Raises ValueError or KeyError for another graph."""
    from onnx import numpy_helper

    facts = {entry.key: entry.value for entry in model.metadata_props}
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    widths = [*map(int, facts["accumulator_bits"].split()), 0]
    step = input_step = float(values["features.step"])
    layers = []
    for index, width in enumerate(widths):
        name = f"layer_{index}"
        weights, offset = values[f"{name}.weights"], values[f"{name}.offset"]
        unit = float(values[f"{name}.weights.step"])
        bias = values.get(f"{name}.bias", 0 * offset) / step
        scale = values.get(f"{name}.scale", np.full_like(offset, unit))
        output_step = float(values.get(f"{name}.output.step", 0))
        layers.append(
            QuantizedLayer(
                np.rint(weights / unit).astype(np.int32),
                np.rint(bias).astype(np.int32),
                scale,
                offset,
                int(values[f"{name}.weights.bits"]),
                int(values.get(f"{name}.output.bits", 0)),
                output_step,
                width,
            )
        )
        step = output_step
    network = QuantizedNetwork(
        int(facts["bits"]), int(facts["kept_bits"]), int(values["features.bits"]), input_step, tuple(layers)
    )
    return check(network)
