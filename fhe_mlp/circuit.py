"""One network as a TFHE circuit: checked loading, compilation with Concrete ML, price, encrypted runs."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.common import InputError, first_line
from fhe_mlp.quantized import QuantizedNetwork, from_onnx
from preprocess_mitbih import FEATURES

if TYPE_CHECKING:
    import onnx
    from concrete.ml.quantization import QuantizedModule

CALIBRATION_NEURONS = 32  # of the layer that measures the machine; enough to keep its cores busy
CALIBRATION_ROUNDING_BITS = 5  # of it at most; step 3's networks keep no more
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
# What Concrete and Concrete ML raise on a network they cannot handle, besides running out of memory.
CIRCUIT_ERRORS = (RuntimeError, ValueError, AssertionError, NotImplementedError, MemoryError)


@dataclass(frozen=True)
class Setting:
    """How a network is compiled; the plain way has no rounding and keeps the sigmoid."""

    rounding_bits: int | None  # of networks that Concrete ML quantizes
    p_error: float
    threshold: float  # output above which a beat is abnormal: 0 for a logit, 0.5 for a probability
    trained: bool = True  # take step 3's quantized networks where there are any


PLAIN = Setting(rounding_bits=None, p_error=2.0**-40, threshold=0.5, trained=False)


@dataclass(frozen=True)
class Speed:
    """Seconds that this machine takes."""

    unit: float  # of complexity, encrypted
    key_byte: float  # of evaluation keys, made
    simulated_pbs: float


def load_network(path: Path) -> onnx.ModelProto:
    """A checked ONNX file of step 4: MatMul/Gemm, Add and Relu layers from 32 features to one sigmoid.

    Raises InputError for anything else; data outside the file is not followed.
    """
    import onnx
    from onnx import numpy_helper

    remedy = "make it with: python h5_onnx_converter.py"
    if not path.exists():
        raise InputError(f"{path}: not found; {remedy}")
    try:
        model = onnx.load_model(path, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        shapes = [
            [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)
        ]
        finite = all(np.isfinite(numpy_helper.to_array(w)).all() for w in model.graph.initializer)
    except Exception as error:  # the parsers of protobuf and ONNX raise a dozen unrelated types
        raise InputError(f"{path}: is no whole ONNX network ({first_line(error)}); {remedy}") from None
    nodes = [node.op_type for node in model.graph.node]
    if [s[1:] for s in shapes] != [[len(FEATURES)], [1]] or set(nodes[:-1]) - {"MatMul", "Gemm", "Add", "Relu"}:
        raise InputError(f"{path}: is no MLP from {len(FEATURES)} features to one output; {remedy}")
    if nodes[-1] != "Sigmoid":
        raise InputError(f"{path}: does not end in a sigmoid; {remedy}")
    if not finite:
        raise InputError(f"{path}: holds NaN or infinite weights; {remedy}")
    return model


def quantized_path(path: Path, bits: int) -> Path:
    """Where step 4 puts the network that step 3 trained at `bits` from the float network in `path`."""
    return path.parent / "quantized" / f"{path.stem}_{bits}bits.onnx"


def load_quantized(path: Path) -> tuple[onnx.ModelProto, QuantizedNetwork]:
    """A quantized network of step 4, as a graph and as integers. Raises InputError for anything else."""
    import onnx

    try:
        model = onnx.load_model(path, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        return model, from_onnx(model)
    except Exception as error:  # the parsers of protobuf and ONNX raise a dozen unrelated types
        reason = first_line(error)
        raise InputError(
            f"{path}: is no quantized network ({reason}); make it with: python h5_onnx_converter.py"
        ) from None


def calibration_rows(network: QuantizedNetwork, X: np.ndarray, rows: int) -> np.ndarray:
    """`rows` or more of the training rows X (n, 32), among them those that drive an accumulator to its ends.

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


@contextlib.contextmanager
def same_signal_handlers() -> Iterator[None]:
    """Put back the handlers that Concrete's runtime (HPX) replaces on first use: with its own, Ctrl-C is a crash.

    Through the C library, since Python sets handlers in a process's main thread only.
    """
    library = ctypes.CDLL(None)
    kept = {number: ctypes.create_string_buffer(256) for number in TERMINAL_SIGNALS}  # more than a struct sigaction
    for number, action in kept.items():
        library.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in kept.items():
            library.sigaction(number, action, None)


@same_signal_handlers()
def compile_network(
    model: onnx.ModelProto, bits: int, calibration: np.ndarray, setting: Setting, kept_bits: int | None = None
) -> QuantizedModule:
    """Compile to TFHE; calibration: training rows (n, 32).

    With `kept_bits` the graph is one of step 3's quantized networks, else it is quantized to `bits` here.
    """
    rounding_bits = kept_bits or setting.rounding_bits
    with warnings.catch_warnings():
        from concrete.ml.torch.compile import compile_onnx_model

        warnings.simplefilter("ignore")  # Concrete ML's own use of deprecated NumPy and ONNX calls
        return compile_onnx_model(
            model,
            calibration,
            import_qat=kept_bits is not None,
            n_bits=bits,
            rounding_threshold_bits=rounding_bits and {"n_bits": rounding_bits, "method": "APPROXIMATE"},
            p_error=setting.p_error,
        )


def key_bytes(circuit: Any) -> int:
    """Size of the evaluation keys that the server needs, uncompressed."""
    return circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys


@same_signal_handlers()
def outputs(module: QuantizedModule, X: np.ndarray, mode: str) -> np.ndarray:
    """Quantized network's outputs (n,) for rows X (n, 32): mode "disable" in clear, "simulate" with p_error's noise."""
    circuit = module.fhe_circuit
    if mode == "disable" or circuit.packing_key_switch_count:  # wide tables, which Concrete ML simulates otherwise
        return module.forward(X.astype(np.float64), fhe=mode)[:, 0]
    # Concrete ML would ask for the circuit's statistics before every row, which takes longer than the row.
    quantized = module.quantize_input(X.astype(np.float64))
    return module.dequantize_output(np.concatenate([circuit.simulate(row[None]) for row in quantized]))[:, 0]


@same_signal_handlers()
def make_keys(module: QuantizedModule) -> float:
    """Make new keys; returns the seconds it took."""
    started = time.perf_counter()
    module.fhe_circuit.keygen(force=True)
    return time.perf_counter() - started


@same_signal_handlers()
def run_encrypted(module: QuantizedModule, row: np.ndarray) -> dict[str, float]:
    """One row (32,) encrypted, run and decrypted with the module's keys: output, seconds of each part, bytes sent."""
    circuit = module.fhe_circuit
    started = time.perf_counter()
    encrypted = circuit.encrypt(module.quantize_input(row[None].astype(np.float64)))
    sent = time.perf_counter()
    result = circuit.run(encrypted)
    received = time.perf_counter()
    output = module.dequantize_output(circuit.decrypt(result))
    return {
        "output_fhe": float(output.ravel()[0]),
        "encrypt_seconds": sent - started,
        "run_seconds": received - sent,
        "decrypt_seconds": time.perf_counter() - received,
        "input_bytes": len(encrypted.serialize()),
        "output_bytes": len(result.serialize()),
    }


def calibrate_machine(setting: Setting, seed: int) -> Speed:
    """Measure this machine on one small layer."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    hidden = CALIBRATION_NEURONS
    weights = {"w0": rng.normal(size=(len(FEATURES), hidden)), "w1": rng.normal(size=(hidden, 1))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "w1"], ["y"]),
        ],
        "calibration",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, len(FEATURES)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    rows = rng.normal(size=(100, len(FEATURES))).astype(np.float32)
    if setting.rounding_bits:
        setting = replace(setting, rounding_bits=min(setting.rounding_bits, CALIBRATION_ROUNDING_BITS))
    module = compile_network(model, 4 if setting.rounding_bits else 2, rows, setting)
    circuit = module.fhe_circuit
    outputs(module, rows[:1], "simulate")  # the first one compiles the simulation
    started = time.perf_counter()
    outputs(module, rows, "simulate")
    simulated = time.perf_counter()
    keygen = make_keys(module)
    seconds = [run_encrypted(module, row)["run_seconds"] for row in rows[:4]][1:]
    return Speed(
        float(np.median(seconds)) / circuit.complexity,
        keygen / key_bytes(circuit),
        (simulated - started) / len(rows) / circuit.programmable_bootstrap_count,
    )
