"""The integer network, exactly as it is encrypted: what it computes, what it costs, and its .h5 and .onnx files.

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

import functools
import io
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fhe_mlp.cli import InputError, first_line
from fhe_mlp.dataset import Part
from fhe_mlp.ecg import balanced_accuracy
from fhe_mlp.networks import claimed_bytes, open_h5, read_graph
from fhe_mlp.scaling import logits_of_sums, quantize

if TYPE_CHECKING:
    import onnx

BITS = (2, 3, 4, 5, 6, 7)  # of weights, as published
ROUNDING_BITS = range(1, 9)  # that a network can have
TOLERATED_LOSS = 0.01  # of validation accuracy, given up for lower cost: below the baseline (step 3) or the best (5)
SAME_COST = 0.01  # relative difference of complexity that nobody would notice
NOISE_DRAWS = 5  # of the noise of p_error, over which an accuracy is averaged
MOST_SUM_BITS = 40  # of accumulators and sums; more in a file are a damaged number
MOST_TABLE_BITS = 16  # of a table's entries; more in a file are a damaged number
COSTS = Path(__file__).with_name("pbs_complexity.csv")  # written by: python benchmarks/measure_pbs.py
OPSET = 14  # of the .onnx files


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
        if self.bits not in BITS or self.input_bits not in BITS or self.rounding_bits not in ROUNDING_BITS:
            raise ValueError("a number of bits that no network has")
        if not 2.0**-60 <= self.p_error < 1:
            raise ValueError("a p_error that no network has")
        steps = (self.input_step, self.table_step, self.linear_scale)
        if not (np.isfinite([*steps, self.offset]).all() and min(steps) > 0):
            raise ValueError("values that are not finite, or a step that is not positive")
        features, neurons = len(self.linear), len(self.bias)
        shapes = [array.shape for array in (self.weights, self.bias, self.tables, self.linear)]
        if shapes != [(features, neurons), (neurons,), (neurons, 2**self.rounding_bits), (features,)] or not features:
            raise ValueError("arrays whose shapes do not fit")
        if any(array.dtype != np.int32 for array in (self.weights, self.bias, self.tables, self.linear)):
            raise ValueError("arrays of other types than int32")
        widths = (self.accumulator_bits or 1 - bool(neurons), self.tables_bits, self.linear_bits)
        if not all(0 < bits <= MOST_SUM_BITS for bits in widths):
            raise ValueError("sums of no known width")
        if neurons and not (self.rounding_bits <= widths[0] and signed_bits(self.tables) <= MOST_TABLE_BITS):
            raise ValueError("tables of no known width")
        if max(signed_bits(np.abs(w)) for w in (self.weights, self.linear) if w.size) > self.bits:
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
        return self._accumulators(quantize(X, self.input_bits, self.input_step)).astype(np.int64)

    def _accumulators(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ self.weights + self.bias  # exact, and faster than a product of integers

    def sums(self, X: np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of the tables (n,) and of the linear path (n,), int64, of rows X (n, features) float32.

        rng: draws the noise that encryption adds to accumulators; without it there is none.
        """
        tables, linear, _ = self._sums(X, rng)
        return decoded(tables, self.tables_bits), decoded(linear, self.linear_bits)

    def _sums(self, X: np.ndarray, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return both sums (n,) before they are decrypted, and the places (n, neurons) in the tables."""
        x, entries = quantize(X, self.input_bits, self.input_step), 2**self.rounding_bits
        steps = self._accumulators(x) / self.rounding_unit
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
        """Return the balanced accuracy on a part of the data."""
        return balanced_accuracy(self.logits(part.X) > 0, part.y)

    def noisy_balanced_accuracy(self, part: Part) -> float:
        """Return the same with the noise of p_error, the mean of NOISE_DRAWS draws that are the same at every call."""
        rng = np.random.default_rng(0)
        draws = NOISE_DRAWS if self.neurons else 1  # without bootstraps there is no such noise
        return float(np.mean([balanced_accuracy(self.logits(part.X, rng) > 0, part.y) for _ in range(draws)]))

    @property
    def predicted_complexity(self) -> float:
        """Complexity of a beat without compiling, from that of one PBS of the same widths."""
        return self.neurons * pbs_complexity(self.p_error, self.rounding_bits, self.tables_bits)


@functools.cache
def measured_complexities() -> dict[float, dict[int, dict[int, float]]]:
    """Return the complexity of one PBS by p_error, rounding bits and bits of the sum of tables, from COSTS."""
    measured: dict[float, dict[int, dict[int, float]]] = {}
    for row in pd.read_csv(COSTS, comment="#").itertuples():
        measured.setdefault(row.p_error, {}).setdefault(row.rounding_bits, {})[row.output_bits] = row.complexity
    return measured


def pbs_complexity(p_error: float, rounding_bits: int, output_bits: int) -> float:
    """Return the complexity of one PBS at the nearest widths and the nearest p_error that is no larger, as measured."""
    measured = measured_complexities()
    widths = measured[max((p for p in measured if p <= p_error), default=min(measured))]
    outputs = widths[min(widths, key=lambda bits: abs(bits - rounding_bits))]
    return outputs[min(outputs, key=lambda bits: abs(bits - output_bits))]


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
    return int(max(values.max(), -1 - values.min(), 0)).bit_length() + 1


# ------------------------------------------------------------------------------------------------------------ .h5 files
def add_networks(content: bytes, networks: Iterable[QuantizedNetwork]) -> bytes:
    """Return the .h5 file `content` of a float network with the networks quantized from it in its group "quantized"."""
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        for network in networks:
            group = file.create_group(f"quantized/{network.bits}")
            for field in fields(network):
                store = group if field.type == "np.ndarray" else group.attrs
                store[field.name] = getattr(network, field.name)
    return buffer.getvalue()


def read_networks(path: Path, made_by: str) -> list[QuantizedNetwork]:
    """Return the quantized networks in an .h5 file of step 3, of another's none.

    made_by: the command that makes the file. Raises InputError for a damaged group.
    """
    types = {"int": operator.index, "float": float}
    try:
        networks, claimed = [], 0
        with open_h5(path) as file:
            for group in file.get("quantized", {}).values():
                values: dict[str, Any] = {}
                for field in fields(QuantizedNetwork):
                    if field.type in types:
                        values[field.name] = types[field.type](group.attrs[field.name])
                        continue
                    claimed += claimed_bytes(group[field.name], path)
                    if claimed > path.stat().st_size:  # also where many names stand for the same values
                        raise ValueError("its arrays claim to be larger than the file")
                    values[field.name] = group[field.name][()]
                networks.append(QuantizedNetwork(**values))
        return networks
    except Exception as error:  # HDF5 and NumPy raise a dozen unrelated types
        reason = first_line(error)
        raise InputError(f"{path}: its quantized networks are damaged ({reason}); make it with: {made_by}") from None


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
    numbers = {f.name: repr(getattr(network, f.name)) for f in fields(network) if f.type in ("int", "float")}
    helper.set_model_props(model, numbers)
    onnx.checker.check_model(model, full_check=True)
    return model


def from_onnx(model: onnx.ModelProto) -> QuantizedNetwork:
    """Return the network that `to_onnx` wrote. Raises ValueError, KeyError or others for another graph."""
    from onnx import numpy_helper

    facts = {entry.key: entry.value for entry in model.metadata_props}
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    types = {"int": int, "float": float}
    numbers = {f.name: types[f.type](facts[f.name]) for f in fields(QuantizedNetwork) if f.type in types}
    if max(numbers["accumulator_bits"], numbers["rounding_bits"]) > MOST_SUM_BITS:  # before they are powers of 2
        raise ValueError("a number of bits that no network has")
    linear, entries = values["linear_weights"][:, 0], 2 ** numbers["rounding_bits"]
    unit = 2 ** max(0, numbers["accumulator_bits"] - numbers["rounding_bits"])
    start = entries // 2 * unit + unit // 2
    arrays = {
        "weights": values.get("weights", np.zeros((len(linear), 0))),
        "bias": values.get("bias", np.zeros(0) + start) - start,
        "tables": values.get("entries", np.zeros((entries, 0)))[:entries].T,
        "linear": linear,
    }
    network = QuantizedNetwork(**numbers, **{name: value.astype(np.int32) for name, value in arrays.items()})
    if to_onnx(network) != model:
        raise ValueError("is another graph than step 4 writes")
    return network


def load_onnx(path: Path, features: int) -> QuantizedNetwork:
    """Return the network in an .onnx file of step 4. Raises InputError for anything else."""
    remedy = "make it with: python h5_onnx_converter.py"
    try:
        network = from_onnx(read_graph(path))
        if network.features != features:
            raise ValueError(f"{network.features} features; the arrays have {features}")
        return network
    except Exception as error:
        raise InputError(f"{path}: is not a valid quantized network ({first_line(error)}); {remedy}") from None
