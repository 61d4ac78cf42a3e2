"""Quantized networks, exactly as the encrypted graph computes them: integers, .h5 and ONNX files, and cost.

Step 3 trains them, step 4 writes them as ONNX, step 5 encrypts them; all three must agree to the last bit.

A hidden layer computes, on the integers x of the layer before it,

    accumulator = x @ weights + bias                               integers; additions only, at hardly any cost
    rounded     = the accumulator's leading `rounding_bits` bits   what the programmable bootstrap (PBS) looks at
    output      = ReLU(rounded * input step * scale + offset) / output step, rounded and clipped to `output_bits` bits

and everything after the accumulator is one table look-up, the PBS, whose cost follows rounding_bits. So scale and
offset may differ by neuron at no cost: every neuron can fill the power-of-two range of which the leading bits are kept.
The last layer has no PBS; its accumulator times input step and scale, plus offset, is the logit.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp import ec57
from fhe_mlp.cli import InputError, first_line
from fhe_mlp.networks import claimed_bytes, open_h5

if TYPE_CHECKING:
    import onnx

BITS = (2, 3, 4, 5, 6, 7)  # of weights and activations, as published
TOLERATED_LOSS = 0.01  # of validation accuracy: networks at most so much below the best are ranked by their cost
# Complexity of one PBS by rounding bits, measured at p_error 2^-13
COMPLEXITY_OF_PBS = {2: 7.0e7, 3: 8.0e7, 4: 1.03e8, 5: 1.43e8, 6: 3.34e8, 7: 7.71e8}
MOST_ACCUMULATOR_BITS = 32  # what an int32 holds; more in a file are a damaged number
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
    accumulator_bits: int  # of the signed accumulator over all training rows when nothing is rounded


@dataclass(frozen=True)
class QuantizedNetwork:
    """`bits` names the configuration: no weight and no activation is wider."""

    bits: int
    rounding_bits: int
    input_bits: int
    input_step: float
    layers: tuple[QuantizedLayer, ...]

    @property
    def features(self) -> int:
        """Columns of its input."""
        return len(self.layers[0].weights)

    def run(self, X: np.ndarray, rounding: bool = True) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (n,) of rows X (n, features) float32, and the accumulators (n, neurons) of each hidden layer.

        Without rounding all accumulator bits are kept, as ONNX Runtime does and Concrete ML when it finds their number.
        """
        top = 2 ** (self.input_bits - 1) - 1
        x = np.clip(np.rint(X.astype(np.float64) / self.input_step), -top, top)
        step, accumulators = self.input_step, []
        for layer in self.layers:
            accumulator = x @ layer.weights + layer.bias
            if layer is self.layers[-1]:
                return (accumulator * step * layer.scale.astype(np.float64) + layer.offset)[:, 0], accumulators
            accumulators.append(accumulator)
            unit = self.rounding_unit(layer) if rounding else 1
            rounded = np.floor(accumulator / unit + 0.5) * unit
            real = rounded * step * layer.scale.astype(np.float64) + layer.offset
            x = np.clip(np.rint(np.maximum(real, 0) / layer.output_step), 0, 2**layer.output_bits - 1)
            step = layer.output_step
        raise ValueError("a network has at least one layer")

    def rounding_unit(self, layer: QuantizedLayer) -> int:
        """What accumulators of a hidden layer are rounded to multiples of."""
        return 2 ** max(0, layer.accumulator_bits - self.rounding_bits)

    def balanced_accuracy(self, X: np.ndarray, y: np.ndarray) -> float:
        """Balanced accuracy on the rows X (n, features) with labels y (n,); a logit over 0 is an abnormal beat."""
        return ec57.balanced_accuracy(self.run(X)[0] > 0, y)

    def pbs(self) -> int:
        """Programmable bootstraps of one beat: one a hidden neuron."""
        return sum(layer.weights.shape[1] for layer in self.layers[:-1])

    def predicted_complexity(self, X: np.ndarray) -> float:
        """Complexity estimated without compiling: the sum over neurons of one PBS of their bits; X: training rows.

        A layer whose accumulators get wider when what comes before is rounded needs so many bits more.
        """
        complexity = 0.0
        for layer, accumulator in zip(self.layers, self.run(X)[1]):
            wider = max(0, signed_bits(accumulator) - layer.accumulator_bits)
            complexity += (
                accumulator.shape[1] * COMPLEXITY_OF_PBS[min(self.rounding_bits + wider, max(COMPLEXITY_OF_PBS))]
            )
        return complexity


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
    networks, claimed = [], 0
    try:
        with open_h5(path) as file:
            for group in file.get("quantized", {}).values():
                layers = []
                for number in sorted(group, key=int):
                    stored = {field.name: group[number][field.name] for field in fields(QuantizedLayer)}
                    claimed += sum(claimed_bytes(dataset, path) for dataset in stored.values())
                    if claimed > path.stat().st_size:  # also where many names stand for the same values
                        raise ValueError("its arrays claim to be larger than the file")
                    values = {name: dataset[()] for name, dataset in stored.items()}
                    layers.append(QuantizedLayer(**converted(QuantizedLayer, values)))
                network = QuantizedNetwork(**converted(QuantizedNetwork, group.attrs), layers=tuple(layers))
                networks.append(check(network))
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
    if len(network.layers) < 2 or network.layers[0].weights.ndim != 2:
        raise ValueError("has no hidden layer")
    widths = [network.features, *(layer.weights.shape[1] for layer in network.layers)]
    if widths[-1] != 1 or network.bits not in BITS or network.rounding_bits not in COMPLEXITY_OF_PBS:
        raise ValueError("is not a quantized network with one logit")
    if network.input_bits not in BITS or not 0 < network.input_step < np.inf:
        raise ValueError("an input of no known width or step")
    for index, layer in enumerate(network.layers):
        vectors = (layer.bias, layer.scale, layer.offset)
        if layer.weights.shape != (widths[index], widths[index + 1]) or {v.shape for v in vectors} != {
            (widths[index + 1],)
        }:
            raise ValueError(f"layer {index}: shapes that do not fit")
        if [v.dtype for v in (layer.weights, *vectors)] != [np.int32, np.int32, np.float32, np.float32]:
            raise ValueError(f"layer {index}: numbers of other types")
        hidden = index < len(network.layers) - 1
        if not all(np.isfinite(v).all() for v in vectors) or (hidden and not 0 < layer.output_step < np.inf):
            raise ValueError(f"layer {index}: values that are not finite, or a step that is not positive")
        if hidden and not (layer.output_bits in BITS and 0 < layer.accumulator_bits <= MOST_ACCUMULATOR_BITS):
            raise ValueError(f"layer {index}: activations or accumulators of no known width")
        top = 2 ** (layer.weight_bits - 1) - 1 if layer.weight_bits in BITS else 0
        if not top or layer.weights.max() > top or layer.weights.min() < -top:
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
    and offset come after it. The rounding is no ONNX operator: `rounding_bits` stands in the graph's metadata.
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
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, network.features])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [None, 1])],
        values,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[quant_function()], ir_version=8)
    widths = " ".join(str(layer.accumulator_bits) for layer in network.layers[:-1])
    helper.set_model_props(
        model, {"bits": str(network.bits), "rounding_bits": str(network.rounding_bits), "accumulator_bits": widths}
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@np.errstate(divide="raise", over="raise", invalid="raise")
def from_onnx(model: onnx.ModelProto) -> QuantizedNetwork:
    """The network that `to_onnx` wrote. Raises ValueError, KeyError, FloatingPointError or others for another graph."""
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
        int(facts["bits"]), int(facts["rounding_bits"]), int(values["features.bits"]), input_step, tuple(layers)
    )
    return check(network)
