"""Quantized networks as ONNX graphs that Concrete ML imports and ONNX Runtime computes alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.quantized import ROUNDING_BITS, HiddenLayer, LastLayer, QuantizedNetwork, check, signed_bits

if TYPE_CHECKING:
    import onnx

DOMAIN = "onnx.brevitas"  # of the Quant node that Concrete ML imports


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


def bends(table: np.ndarray) -> np.ndarray:
    """Change of the slope (entries, neurons) at each entry of a table (entries, neurons) that is flat outside."""
    flat = np.zeros((1, table.shape[1]), table.dtype)
    return np.diff(np.concatenate([flat, np.diff(table, axis=0), flat]), axis=0)


def to_onnx(network: QuantizedNetwork, opset: int) -> onnx.ModelProto:
    """The network as a graph of standard operators and Quant, for compile_onnx_model(import_qat=True).

    A table is a piecewise linear function of the rounded accumulator k, flat outside of its range: its first entry, and
    at each entry a ReLU that bends it. All are integers, or integers times one step that a Quant rounds to, so that
    ONNX Runtime, which computes in float32, gives the same integers. Concrete ML keeps but the leading bits of
    accumulators when it is told to; to the graph that is nothing new, it rounds to the same k itself.
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

    def quant(name: str, step: float, bits: int, signed: bool = True, narrow: bool = True) -> str:
        parameters = [constant(f"{name}.{kind}", v) for kind, v in (("step", step), ("zero", 0.0), ("bits", bits))]
        attributes = {"domain": DOMAIN, "signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return add("Quant", [name, *parameters], f"{name}.quantized", **attributes)

    def product(x: str, name: str, weights: np.ndarray, scale: float, offset: np.ndarray | str) -> str:
        stored = constant(f"{name}.weights", weights * np.float32(scale))
        quantized = quant(stored, scale, max(2, signed_bits(np.abs(weights))))
        offset = offset if isinstance(offset, str) else constant(f"{name}.offset", offset)
        return add("Gemm", [x, quantized, offset], f"{name}.sum")

    step = network.input_step
    features = x = quant("features", step, network.input_bits)
    for index, layer in enumerate(network.hidden):
        name, unit = f"layer_{index}", network.rounding_unit(layer)
        stored = constant(f"{name}.bias", layer.bias * np.float32(step))
        bias = quant(stored, step, signed_bits(layer.bias) + 1, narrow=False)
        total = product(x, name, layer.weights, 1.0, bias)
        # A quarter of the distance between accumulators keeps float32 away from the edge.
        k = add("Mul", [total, constant(f"{name}.unit", 1 / (unit * step))], f"{name}.units")
        k = add("Floor", [add("Add", [k, constant(f"{name}.half", 0.5 + 0.25 / unit)], f"{name}.up")], f"{name}.k")
        value = constant(f"{name}.start", layer.table[0] * layer.step)
        for place, bend in enumerate(bends(layer.table), -(len(layer.table) // 2)):
            if bend.any():
                moved = add("Sub", [k, constant(f"{name}.place_{place}", place)], f"{name}.moved_{place}")
                hinge = add("Relu", [moved], f"{name}.hinge_{place}")
                more = add("Mul", [hinge, constant(f"{name}.bend_{place}", bend * layer.step)], f"{name}.more_{place}")
                value = add("Add", [value, more], f"{name}.bent_{place}")
        signed = bool(layer.table.min() < 0)
        value = add("Identity", [value], f"{name}.output")
        x = quant(value, layer.step, max(2, signed_bits(layer.table) - (not signed)), signed, narrow=False)
        step = layer.step
    last, logits = network.last, []
    if network.hidden:
        zero = np.zeros(1) if last.linear.any() else [last.offset]
        logits.append(product(x, "outputs", last.weights[:, None], last.scale, np.asarray(zero)))
    if last.linear.any() or not network.hidden:
        logits.append(product(features, "linear", last.linear[:, None], last.linear_scale, np.array([last.offset])))
    logit = add("Add", logits, "logit") if len(logits) > 1 else logits[0]
    add("Sigmoid", [logit], "probability")
    graph = helper.make_graph(
        nodes,
        "quantized_mlp",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, network.features])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [None, 1])],
        values,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[quant_function()], ir_version=8)
    facts = {"bits": network.bits, "rounding_bits": network.rounding_bits, "p_error": network.p_error}
    facts["accumulator_bits"] = " ".join(str(layer.accumulator_bits) for layer in network.hidden)
    helper.set_model_props(model, {name: str(value) for name, value in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


@np.errstate(divide="raise", over="raise", invalid="raise")
def from_onnx(model: onnx.ModelProto) -> QuantizedNetwork:
    """The network that `to_onnx` wrote. Raises ValueError, KeyError, FloatingPointError or others for another graph."""
    from onnx import numpy_helper

    facts = {entry.key: entry.value for entry in model.metadata_props}
    values = {value.name: numpy_helper.to_array(value).astype(np.float64) for value in model.graph.initializer}
    rounding_bits = int(facts["rounding_bits"])
    if rounding_bits not in ROUNDING_BITS:
        raise ValueError(f"{rounding_bits} rounding bits")
    k = np.arange(-(2 ** (rounding_bits - 1)), 2 ** (rounding_bits - 1))[:, None]

    def integers(name: str, step: float) -> np.ndarray:
        return np.rint(values[name] / step).astype(np.int32)

    def product(name: str) -> tuple[np.ndarray, float]:
        step = float(values[f"{name}.weights.step"])
        return integers(f"{name}.weights", step), step

    step = input_step = float(values["features.step"])
    hidden = []
    for index, bits in enumerate(map(int, facts["accumulator_bits"].split())):
        name = f"layer_{index}"
        weights, _ = product(name)
        bias = integers(f"{name}.bias", step)
        step = float(values[f"{name}.output.step"])
        table = integers(f"{name}.start", step) + np.zeros_like(k)
        for place in k[:, 0]:
            if f"{name}.bend_{place}" in values:
                table += integers(f"{name}.bend_{place}", step) * np.maximum(k - place, 0)
        hidden.append(HiddenLayer(weights, bias, table.astype(np.int32), step, bits))
    weights, scale = product("outputs") if hidden else (np.zeros((0, 1), np.int32), 1.0)
    linear = "linear.weights" in values
    features = values["layer_0.weights"].shape[0] if hidden else len(values["linear.weights"])
    path, linear_scale = product("linear") if linear else (np.zeros((features, 1), np.int32), 1.0)
    offset = float(values["linear.offset" if linear else "outputs.offset"][0])
    last = LastLayer(weights[:, 0], scale, path[:, 0], linear_scale, offset)
    bits, p_error, input_bits = int(facts["bits"]), float(facts["p_error"]), int(values["features.bits"])
    return check(QuantizedNetwork(bits, rounding_bits, p_error, input_bits, input_step, tuple(hidden), last))
