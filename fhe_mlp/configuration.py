"""What is compiled: one network at one bit width, read from the files of step 4 and told apart from every other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.arrays import Arrays
from fhe_mlp.cli import InputError, digest, first_line
from fhe_mlp.graphs import from_onnx, quant_function
from fhe_mlp.quantized import QuantizedNetwork

if TYPE_CHECKING:
    import onnx

RESULT_VERSION = 5  # raised by hand when the program gives other results, which makes all of them be computed anew
REMEDY = "make it with: python h5_onnx_converter.py"


@dataclass(frozen=True)
class Setting:
    """How a network is compiled; default PTQ has no rounding and evaluates the sigmoid under FHE."""

    rounding_bits: int | None  # of networks that Concrete ML quantizes; those of step 3 have their own,
    p_error: float  # and so they have of this
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
    p_error: float
    trained: bool  # by step 3, as integers; else Concrete ML quantizes
    setting: Setting
    calibration: np.ndarray  # training rows (n, features)
    identity: dict[str, Any]  # what results must share to stand for each other; "identity": its digest

    @property
    def key(self) -> str:
        """Short name of the identity."""
        return self.identity["identity"]

    @functools.cached_property
    def network(self) -> QuantizedNetwork | None:
        """What step 3 quantized; None where Concrete ML quantizes."""
        import onnx

        return from_onnx(onnx.load_from_string(self.graph)) if self.trained else None

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


def calibration_rows(network: QuantizedNetwork, X: np.ndarray) -> np.ndarray:
    """Of the training rows X (n, features), those of each integer's minimum and maximum.

    So the circuit has room for all that training data can cause, and Concrete ML finds the widths that step 3 found. It
    evaluates the graph row by row, so that more rows would take much longer and show no more.
    """
    sums = network.run(X)[1]
    outputs = [layer.outputs(s / network.rounding_unit(layer)) for layer, s in zip(network.hidden, sums)]
    found = [[X.argmin() // X.shape[1], X.argmax() // X.shape[1]]]
    found += [end for values in (*sums, *outputs) for end in (values.argmin(axis=0), values.argmax(axis=0))]
    return X[np.unique(np.concatenate(found))]


def encrypted_part(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of a network without what the client does after decryption, which costs nothing there: the sigmoid, and the
    sum where the logit is that of two parts, which then are two outputs."""
    import onnx
    from onnx import helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    logit = copy.graph.node.pop().input
    constants = {value.name for value in copy.graph.initializer}
    if copy.graph.node[-1].op_type == "Add" and not constants & set(copy.graph.node[-1].input):
        logit = copy.graph.node.pop().input
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 1]) for name in logit)
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
        "asked_p_error": None if trained else setting.p_error,
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
    features, trained = calibration.shape[1], quantized_path(path, bits)
    rounding_bits, p_error = setting.rounding_bits, setting.p_error
    aware = setting.trained and trained.exists()
    if aware:
        model, network = load_quantized(trained, features)
        rounding_bits, p_error = network.rounding_bits, network.p_error
        calibration = calibration_rows(network, data["train"][0])
    else:
        model = load_network(path, features)
    graph = (model if setting == DEFAULT_PTQ else encrypted_part(model)).SerializeToString()
    identity = identify(path, bits, setting, basis)
    return Configuration(path.stem, bits, graph, rounding_bits, p_error, aware, setting, calibration, identity)
