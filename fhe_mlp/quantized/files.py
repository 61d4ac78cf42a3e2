"""Files of integer networks: a group in the .h5 of their float network, and .onnx files."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from fhe_mlp.networks import STEP_4, refusing
from fhe_mlp.quantized.network import QuantizedNetwork

if TYPE_CHECKING:
    import onnx

OPSET = 14  # of the .onnx files
NUMBERS = {f.name: {"int": int, "float": float}[f.type] for f in fields(QuantizedNetwork) if f.type != "np.ndarray"}


# ------------------------------------------------------------------------------------------------------------ .h5 files
def add_networks(content: bytes, networks: Iterable[QuantizedNetwork]) -> bytes:
    """Return the .h5 file `content` of a float network with the networks quantized from it in its group "quantized"."""
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        for network in networks:
            group = file.create_group(f"quantized/{network.bits}")
            for field in fields(network):
                store = group.attrs if field.name in NUMBERS else group
                store[field.name] = getattr(network, field.name)
    return buffer.getvalue()


def read_networks(path: Path, made_by: str) -> list[QuantizedNetwork]:
    """Return the quantized networks in an .h5 file of step 3, of another's none.

    made_by: the command that makes the file. Raises InputError for a damaged group.
    """
    found = []
    with refusing(path, "file of quantized networks", made_by), h5py.File(path) as file:
        for group in file.get("quantized", {}).values():
            values = {name: kind(group.attrs[name]) for name, kind in NUMBERS.items()}
            found.append(QuantizedNetwork(**values, **{name: array[()] for name, array in group.items()}))
    return found


# ---------------------------------------------------------------------------------------------------------- .onnx files
def to_onnx(network: QuantizedNetwork) -> onnx.ModelProto:
    """Return the network as integer arithmetic in ONNX's standard operators.

    Input: features (n, features) float32, prepared. Outputs: probability (n, 1) float32, and the integer sums `linear`
    and, with neurons, `tables`, (n, 1) int64.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(name: str, value: Any, dtype: type) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(operator_name: str, *inputs: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator_name, list(inputs), [output], **attributes))
        return output

    def logit_of(total: str, bits: int, step: float) -> str:
        """Decode the sum `total` of `bits` from total_wide and weight it: its part of the logit."""
        whole, period = (constant(f"{total}_{2**k}", 2 ** (bits + k), np.int64) for k in (0, 1))
        value = add("Mod", f"{total}_wide", period, output=f"{total}_positive")
        for end, name in ((2 ** (bits - 1), f"{total}_half"), (2**bits, total)):  # see `decoded`
            below = add("Less", f"{total}_positive", constant(f"{name}_end", end, np.int64), output=f"{name}_below")
            less = add("Sub", value, whole, output=f"{name}_less")
            value = add("Where", below, value, less, output=name)
        real = add("Cast", value, output=f"{total}_double", to=TensorProto.DOUBLE)
        return add("Mul", real, constant(f"{total}_step", step, np.float64), output=f"{total}_logit")

    top = 2 ** (network.input_bits - 1) - 1
    real = add("Cast", "features", output="features_double", to=TensorProto.DOUBLE)
    steps = add("Div", real, constant("input_step", network.input_step, np.float64), output="steps")
    ends = [constant(name, end, np.float64) for name, end in (("lowest", -top), ("highest", top))]
    clipped = add("Clip", add("Round", steps, output="rounded"), *ends, output="clipped")
    x = add("Cast", clipped, output="integers", to=TensorProto.INT64)
    add("MatMul", x, constant("linear_weights", network.linear[:, None], np.int64), output="linear_wide")
    sums, logit = ["linear"], logit_of("linear", network.linear_bits, network.numbers["linear_step"])
    if network.neurons:
        sums.append("tables")
        unit, entries = network.rounding_unit, 2**network.rounding_bits
        product = add("MatMul", x, constant("weights", network.weights, np.int64), output="product")
        # The lowest accumulator becomes 0, half a unit rounds, and a division of what is not negative truncates.
        start = network.bias.astype(np.int64) + entries // 2 * unit + unit // 2
        moved = add("Add", product, constant("bias", start, np.int64), output="moved")
        inside = add("Mod", moved, constant("period", 2 * entries * unit, np.int64), output="inside")
        index = add("Div", inside, constant("unit", unit, np.int64), output="index")
        stored = constant("entries", np.hstack([network.tables, -network.tables]).T, np.int64)
        outputs = add("GatherElements", stored, index, output="outputs", axis=0)
        add("ReduceSum", outputs, constant("neurons", [1], np.int64), output="tables_wide")
        tables = logit_of("tables", network.tables_bits, network.table_step)
        logit = add("Add", tables, logit, output="sum_of_logits")
    logit = add("Add", logit, constant("offset", network.offset, np.float64), output="logit")
    add("Sigmoid", add("Cast", logit, output="logit_float", to=TensorProto.FLOAT), output="probability")
    outputs = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [None, 1])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.INT64, [None, 1]) for name in sums]
    inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, network.features])]
    graph = helper.make_graph(nodes, "quantized_network", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    helper.set_model_props(model, {name: repr(getattr(network, name)) for name in NUMBERS})
    onnx.checker.check_model(model, full_check=True)
    return model


def load_onnx(path: Path, features: int) -> QuantizedNetwork:
    """Return the network in an .onnx file that to_onnx has made. Raises InputError for anything else."""
    import onnx
    from onnx import numpy_helper

    with refusing(path, "quantized network", STEP_4):
        model = onnx.load_model(path)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        numbers = {name: kind(facts[name]) for name, kind in NUMBERS.items()}
        values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
        entries, unit = 2 ** numbers["rounding_bits"], values.get("unit", 1)
        arrays = {
            "weights": values.get("weights", np.zeros((features, 0))),
            "bias": values.get("bias", np.zeros(0)) - (entries // 2 * unit + unit // 2),
            "tables": values.get("entries", np.zeros((entries, 0)))[:entries].T,
            "linear": values["linear_weights"][:, 0],
        }
        network = QuantizedNetwork(**numbers, **{name: value.astype(np.int32) for name, value in arrays.items()})
        if network.features != features:
            raise ValueError(f"{network.features} features; the arrays have {features}")
        if to_onnx(network) != model:
            raise ValueError("another graph than step 4 writes")
    return network
