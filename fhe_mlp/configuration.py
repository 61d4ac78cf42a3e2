"""What is compiled: one network at one bit width, read from the files of step 4 and told apart from every other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.arrays import Arrays
from fhe_mlp.cli import InputError, digest, first_line
from fhe_mlp.quantized import QuantizedNetwork, from_onnx, quant_function

if TYPE_CHECKING:
    import onnx

RESULT_VERSION = 2  # raised by hand when the program gives other results, which makes all of them be computed anew
REMEDY = "make it with: python h5_onnx_converter.py"


@dataclass(frozen=True)
class Setting:
    """How a network is compiled; default PTQ has no rounding and evaluates the sigmoid under FHE."""

    rounding_bits: int | None  # of networks that Concrete ML quantizes
    p_error: float
    threshold: float  # output above which a beat is abnormal: 0 for a logit, 0.5 for a probability
    trained: bool = True  # take step 3's quantized networks where there are any


DEFAULT_PTQ = Setting(rounding_bits=None, p_error=2.0**-40, threshold=0.5, trained=False)


@dataclass(frozen=True, eq=False)
class Configuration:
    """One network at one bit width and all that its circuit needs, so that another machine needs no file of ours."""

    model_name: str
    bits: int
    graph: bytes  # ONNX, as it is compiled
    rounding_bits: int | None
    trained: bool  # by step 3, as integers; else Concrete ML quantizes
    setting: Setting
    calibration: np.ndarray  # training rows (n, features)
    identity: dict[str, Any]  # what results must share to stand for each other; "identity": its digest

    @property
    def key(self) -> str:
        """Short name of the identity."""
        return self.identity["identity"]

    @property
    def label(self) -> str:
        """What progress bars call it."""
        return f"{self.model_name} at {self.bits} bits"


def versions() -> dict[str, Any]:
    """Of the program and of the libraries that give a result."""
    libraries = {name: version(name) for name in ("concrete-ml", "concrete-python", "onnx", "numpy")}
    return {"result_version": RESULT_VERSION, **libraries}


def read_graph(path: Path, functions: Sequence[onnx.FunctionProto]) -> onnx.ModelProto:
    """A checked ONNX file with no other functions; data outside the file is not followed.

    Raises ValueError and what the parsers of protobuf and ONNX raise, a dozen unrelated types.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    model = onnx.load_model(path, load_external_data=False)
    if list(model.functions) != list(functions):  # on one that calls itself ONNX's checker ends the process
        raise ValueError("it holds other functions")
    if any(map(uses_external_data, model.graph.initializer)):  # which numpy_helper would look for in this folder
        raise ValueError("its weights are in another file")
    onnx.checker.check_model(model, full_check=True)
    return model


def load_network(path: Path, features: int) -> onnx.ModelProto:
    """A checked ONNX file of step 4: MatMul/Gemm, Add and Relu layers from `features` inputs to one sigmoid.

    Raises InputError for anything else.
    """
    from onnx import numpy_helper

    if not path.exists():
        raise InputError(f"{path}: not found; {REMEDY}")
    try:
        model = read_graph(path, [])
        inputs, outputs = (
            [[d.dim_value for d in value.type.tensor_type.shape.dim][1:] for value in values]
            for values in (model.graph.input, model.graph.output)
        )
        finite = all(np.isfinite(numpy_helper.to_array(w)).all() for w in model.graph.initializer)
    except Exception as error:
        raise InputError(f"{path}: is truncated or not a valid ONNX network ({first_line(error)}); {REMEDY}") from None
    nodes = [node.op_type for node in model.graph.node]
    if (inputs, outputs) != ([[features]], [[1]]) or set(nodes[:-1]) - {"MatMul", "Gemm", "Add", "Relu"}:
        raise InputError(f"{path}: is not an MLP from the arrays' {features} features to one output; {REMEDY}")
    if nodes[-1:] != ["Sigmoid"]:
        raise InputError(f"{path}: does not end in a sigmoid; {REMEDY}")
    if not finite:
        raise InputError(f"{path}: holds NaN or infinite weights; {REMEDY}")
    return model


def quantized_path(path: Path, bits: int) -> Path:
    """Where step 4 puts the network that step 3 trained at `bits` from the float network in `path`."""
    return path.parent / "quantized" / f"{path.stem}_{bits}bits.onnx"


def load_quantized(path: Path, features: int) -> tuple[onnx.ModelProto, QuantizedNetwork]:
    """A quantized network of step 4, as a graph and as integers. Raises InputError for anything else."""
    try:
        model = read_graph(path, [quant_function()])
        if [node.op_type for node in model.graph.node][-1:] != ["Sigmoid"] or len(model.graph.output) != 1:
            raise ValueError("does not end in one sigmoid")
        network = from_onnx(model)
        if network.features != features:
            raise ValueError(f"{network.features} features; the arrays have {features}")
        return model, network
    except Exception as error:
        raise InputError(f"{path}: is not a valid quantized network ({first_line(error)}); {REMEDY}") from None


def calibration_rows(network: QuantizedNetwork, X: np.ndarray, rows: int) -> np.ndarray:
    """`rows` or more of the training rows X (n, features), among them those of each accumulator's minimum and maximum.

    So the circuit has room for all that training data can cause, and Concrete ML finds the widths that step 3 found.
    """
    accumulators = [*network.run(X)[1], *network.run(X, rounding=False)[1]]
    ends = np.concatenate([np.concatenate([a.argmin(axis=0), a.argmax(axis=0)]) for a in accumulators])
    return X[np.unique(np.concatenate([ends, np.arange(min(rows, len(X)))]))]


def without_sigmoid(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of a network that ends in the logit: one table look-up less to encrypt, the same decisions."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    sigmoid = copy.graph.node.pop()
    copy.graph.output[0].name = sigmoid.input[0]
    return copy


def identify(path: Path, bits: int, setting: Setting, basis: dict[str, Any]) -> dict[str, Any]:
    """What results of the network in `path` at `bits` must share to stand for each other, from its file's bytes alone.

    basis: what identifies results besides the network, its bits and its setting. Raises InputError for a missing file.
    """
    trained = setting.trained and quantized_path(path, bits).exists()
    source = quantized_path(path, bits) if trained else path
    if not source.exists():
        raise InputError(f"{source}: not found; {REMEDY}")
    identity = {
        "quantization": "quantization-aware"
        if trained
        else "default PTQ"
        if setting == DEFAULT_PTQ
        else "post-training",
        "asked_rounding_bits": None if trained else setting.rounding_bits,
        "p_error": setting.p_error,
        "network_sha256": digest(source.read_bytes()),
        **basis,
    }
    return {**identity, "identity": digest(repr((path.stem, bits, identity)))}


def load_configuration(
    path: Path, bits: int, setting: Setting, data: Arrays, calibration: np.ndarray, basis: dict[str, Any]
) -> Configuration:
    """The configuration of the float network in `path` at `bits`, quantized in step 3 where there is such a file.

    calibration: training rows (n, features). Raises InputError for a bad file.
    """
    features, trained, rounding_bits = calibration.shape[1], quantized_path(path, bits), setting.rounding_bits
    aware = setting.trained and trained.exists()
    if aware:
        model, network = load_quantized(trained, features)
        rounding_bits = network.rounding_bits
        calibration = calibration_rows(network, data["train"][0], len(calibration))
    else:
        model = load_network(path, features)
    graph = (model if setting == DEFAULT_PTQ else without_sigmoid(model)).SerializeToString()
    identity = identify(path, bits, setting, basis)
    return Configuration(path.stem, bits, graph, rounding_bits, aware, setting, calibration, identity)
