"""One network as a TFHE circuit: compilation with Concrete ML, cost, simulation, keys, encrypted runs.

A quantized network without neurons is no circuit but one packed product (packed.py); the functions here take both.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fhe_mlp import ec57
from fhe_mlp.arrays import Arrays
from fhe_mlp.cli import first_line, machine_facts
from fhe_mlp.configuration import REMEDY, Configuration, Setting
from fhe_mlp.packed import PackedNetwork

if TYPE_CHECKING:
    from concrete.ml.quantization import QuantizedModule

MEASURED_NEURONS = 32  # of the layer that measures the machine; enough to keep its cores busy
MEASURED_ROUNDING_BITS = 5  # of it at most; step 3's networks keep no more
MEASURED_FEATURES = 32  # of it
MEMORY_PER_KEY_BYTE = 2.2  # bytes; making and unpacking keys of 0.4 to 4.7 GB took up to 2.1 times their size
MACHINE = ("host", "processor", "cores")  # on which a row was measured; times of unlike ones are kept apart
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
# What Concrete and Concrete ML raise on a network they cannot handle, besides running out of memory.
CIRCUIT_ERRORS = (RuntimeError, ValueError, AssertionError, NotImplementedError, MemoryError)
Result = tuple[int, dict[str, Any], "pd.DataFrame | None"]  # batch, a row of its workbook, predictions if it ran
_PLANNED: dict[str, Any] = {}  # circuits of this process by configuration, compiled for the plan and not yet run


@dataclass(frozen=True)
class Speed:
    """Seconds that a machine takes."""

    unit: float  # of complexity, encrypted
    key_byte: float  # of evaluation keys, made
    simulated_pbs: float


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
def quantize(configuration: Configuration) -> QuantizedModule:
    """The quantized network as Concrete ML has it, not yet compiled: enough for outputs(..., "disable").

    Raises one of CIRCUIT_ERRORS where Concrete ML cannot quantize it.
    """
    rounding_bits = configuration.rounding_bits
    # Concrete ML writes whole arrays into the messages of its checks, also of those that hold: most of its time.
    with warnings.catch_warnings(), np.printoptions(threshold=0, edgeitems=1):
        import onnx
        from concrete.ml.torch.compile import build_quantized_module

        warnings.simplefilter("ignore")  # Concrete ML's own use of deprecated NumPy and ONNX calls
        return build_quantized_module(
            onnx.load_from_string(configuration.graph),
            configuration.calibration,
            import_qat=configuration.trained,
            n_bits=configuration.bits,
            rounding_threshold_bits=rounding_bits and {"n_bits": rounding_bits, "method": "APPROXIMATE"},
        )


@same_signal_handlers()
def compile_circuit(configuration: Configuration) -> QuantizedModule | PackedNetwork:
    """The configuration quantized and compiled to TFHE. Raises one of CIRCUIT_ERRORS where Concrete cannot do it."""
    if configuration.network and not configuration.network.hidden:
        return PackedNetwork(configuration.network)
    module = quantize(configuration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.compile(configuration.calibration, p_error=configuration.p_error)
    return module


def cost(configuration: Configuration) -> tuple[dict[str, Any], QuantizedModule | PackedNetwork | None]:
    """What compiling shows, with "status" and "reason", and the circuit if there is one."""
    started = time.perf_counter()
    try:
        module = compile_circuit(configuration)
    except CIRCUIT_ERRORS as error:
        return {"status": "cannot compile", "reason": first_line(error)}, None
    facts = {"compile_time": time.perf_counter() - started}
    if isinstance(module, PackedNetwork):
        facts |= module.facts()
    else:
        circuit = module.fhe_circuit
        facts |= {
            "rounding_bits": configuration.rounding_bits,
            "p_error": configuration.p_error,
            "p_any_pbs_off": 1 - (1 - configuration.p_error) ** circuit.programmable_bootstrap_count,
            "pbs": circuit.programmable_bootstrap_count,
            "complexity": circuit.complexity,
            "widest_integer_bits": circuit.graph.maximum_integer_bit_width(),
            "evaluation_keys_MB": key_bytes(circuit) / 1e6,
            "security_bits": int(circuit.configuration.security_level),
            "secret_keys_kB": circuit.size_of_secret_keys / 1e3,
        }
    facts |= {
        "predicted_memory_MB": facts["evaluation_keys_MB"] * MEMORY_PER_KEY_BYTE,
        "status": "ok",
        "reason": "",
    }
    return facts, module


def plan_circuit(configuration: Configuration) -> dict[str, Any]:
    """The facts of `cost`; this process keeps the circuit until take_circuit, so that it is compiled once a run."""
    facts, module = cost(configuration)
    if module is not None:
        _PLANNED[configuration.key] = module
    return facts


def take_circuit(configuration: Configuration) -> QuantizedModule | PackedNetwork:
    """The circuit that plan_circuit kept; compiled now where another process, or none, did."""
    return _PLANNED.pop(configuration.key, None) or compile_circuit(configuration)


def key_bytes(circuit: Any) -> int:
    """Size of the evaluation keys that the server needs, uncompressed."""
    return circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys


@same_signal_handlers()
def outputs(module: QuantizedModule | PackedNetwork, X: np.ndarray, mode: str) -> np.ndarray:
    """Outputs (n,) for rows X (n, features): mode "disable" is cleartext, "simulate" has the noise of p_error."""
    if isinstance(module, PackedNetwork):
        return module.outputs(X)
    if mode == "disable" or module.fhe_circuit.packing_key_switch_count:  # wide tables, simulated by Concrete ML only
        return total(module.forward(X.astype(np.float64), fhe=mode))
    # Concrete ML would ask for the circuit's statistics before every row, which takes longer than the row.
    quantized = module.quantize_input(X.astype(np.float64))
    simulated = [module.fhe_circuit.simulate(row[None]) for row in quantized]
    return total(module.dequantize_output(*map(np.concatenate, zip(*map(parts_of, simulated)))))


def parts_of(value: Any) -> tuple[Any, ...]:
    """What Concrete returns for a circuit, as a tuple also where it has one output."""
    return value if isinstance(value, tuple) else (value,)


def total(outputs: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """The output (n,): the sum of the one or two outputs (n, 1) of a circuit."""
    return sum(part[:, 0] for part in parts_of(outputs))


def accuracies(
    module: QuantizedModule | PackedNetwork,
    configuration: Configuration,
    data: Arrays,
    simulated: np.ndarray,
    beats: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """What is measured without keys; simulated: indices of the test rows for the simulated accuracy.

    beats: record and AAMI class of the test rows, where they are known.

    Raises ValueError when the circuit of a network that step 3 quantized does not decide as that network does.
    """
    (X_val, y_val), (X, y) = data["val"], data["test"]
    threshold = configuration.setting.threshold
    decisions, noisy = outputs(module, X, "disable") > threshold, {}
    network = configuration.network
    if network and network.hidden:  # of what is packed, cleartext is that network, and it has no noise of p_error
        if not np.array_equal(decisions, network.run(X)[0] > 0):
            raise ValueError(f"the circuit does not decide as the network of step 3 does; {REMEDY}")
        for part, rows in (("validation", (X_val, y_val)), ("test_set", (X, y))):
            noisy[f"noisy_balanced_accuracy_{part}"] = network.noisy_balanced_accuracy(*rows)
    facts = {
        "balanced_accuracy_validation": ec57.balanced_accuracy(outputs(module, X_val, "disable") > threshold, y_val),
        **{f"{name}_test_set": value for name, value in ec57.columns(ec57.figures(y, decisions, beats)).items()},
        "test_set_rows": len(y),
        **noisy,
    }
    if len(simulated) and not isinstance(module, PackedNetwork):
        encrypted = outputs(module, X[simulated], "simulate") > threshold
        facts["accuracy_simulated"] = float(np.mean(encrypted == y[simulated]))
        facts["accuracy_clear_same_rows"] = float(np.mean(decisions[simulated] == y[simulated]))
        facts["simulated_rows"] = len(simulated)
    return facts


@same_signal_handlers()
def make_keys(module: QuantizedModule | PackedNetwork) -> float:
    """Make new keys; returns the seconds it took."""
    started = time.perf_counter()
    if isinstance(module, PackedNetwork):
        module.make_keys()
    else:
        module.fhe_circuit.keygen(force=True)
    return time.perf_counter() - started


@same_signal_handlers()
def run_encrypted(module: QuantizedModule | PackedNetwork, row: np.ndarray) -> dict[str, float]:
    """One row (features,) encrypted, run and decrypted with the module's keys: output, seconds of each part, bytes."""
    if isinstance(module, PackedNetwork):
        return module.run_encrypted(row)
    circuit = module.fhe_circuit
    started = time.perf_counter()
    encrypted = circuit.encrypt(module.quantize_input(row[None].astype(np.float64)))
    sent = time.perf_counter()
    result = circuit.run(encrypted)
    received = time.perf_counter()
    parts = parts_of(result)
    output = total(module.dequantize_output(*parts_of(circuit.decrypt(*parts))))
    return {
        "output_fhe": float(output[0]),
        "encrypt_seconds": sent - started,
        "run_seconds": received - sent,
        "decrypt_seconds": time.perf_counter() - received,
        "input_bytes": len(encrypted.serialize()),
        "output_bytes": sum(len(part.serialize()) for part in parts),
    }


def judge_memory(facts: dict[str, Any]) -> None:
    """Refuse a compiled configuration whose keys would not fit into this machine's free memory."""
    import psutil

    memory, free = facts.get("predicted_memory_MB", 0) / 1e3, psutil.virtual_memory().available / 1e9
    if facts["status"] == "ok" and memory > free:
        reason = f"needs about {memory:.1f} GB of memory, {free:.1f} GB are free"
        facts |= {"status": "too large", "reason": reason}


def prepare(
    configuration: Configuration,
    facts: dict[str, Any],
    data: Arrays,
    simulated: np.ndarray,
    beats: pd.DataFrame | None,
    limit: float,
    tick: Callable,
) -> tuple[dict[str, Any], QuantizedModule | PackedNetwork | None]:
    """What holds for all batches of a configuration (cleartext and simulated accuracy, keys), and its circuit.

    One encrypted run unpacks the keys, and stops a configuration that takes more than `limit` seconds after all.
    """
    machine, module = machine_facts(), None
    row = {"model_name": configuration.model_name, "q_bits": configuration.bits, **configuration.identity}
    row |= {**{name: machine[name] for name in MACHINE}, **facts}
    if row["status"] not in ("cannot compile", "failed"):
        try:
            tick(f"{configuration.label}: cleartext", 0)
            module = take_circuit(configuration)
            row |= accuracies(module, configuration, data, simulated, beats)
            judge_memory(row)
            if row["status"] == "ok":
                tick(f"{configuration.label}: making keys", 0)
                row["keygen_time"] = make_keys(module)
                tick(configuration.label, 0)
                seconds = run_encrypted(module, configuration.calibration[0])["run_seconds"]
                if seconds > limit:
                    reason = f"measured {seconds:.0f} s a sample, over --max-seconds {limit:g}"
                    row |= {"status": "too slow", "reason": reason}
        except CIRCUIT_ERRORS as error:
            row |= {"status": "failed", "reason": first_line(error)}
    return row, module


def run_batches(
    configuration: Configuration,
    facts: dict[str, Any],
    drawn: dict[int, np.ndarray],
    data: Arrays,
    simulated: np.ndarray,
    beats: pd.DataFrame | None,
    limit: float,
    tick: Callable[[str, int], None] = lambda text, samples: None,
) -> Iterator[Result]:
    """Yield the result of each batch as soon as it is there; what fails becomes the row's status.

    facts: of plan_circuit; drawn: test rows by batch; simulated: test rows for the simulated accuracy; beats: record
    and AAMI class of the test rows, where known; limit: seconds a sample; tick: hears what is done and how many samples
    are finished.
    """
    (X, y), threshold = data["test"], configuration.setting.threshold
    row, module = prepare(configuration, facts, data, simulated, beats, limit, tick)
    for batch, index in drawn.items():
        ones = 100 * float(np.mean(y[index]))
        mine = {**row, "batch": batch, "num_items": len(index), "perc_ones_gt": ones, "perc_zeros_gt": 100 - ones}
        predictions = None
        if "balanced_accuracy_test_set" in row:
            started = time.perf_counter()
            clear = outputs(module, X[index], "disable")
            mine["clear_time"] = time.perf_counter() - started
            ones = 100 * float(np.mean(clear > threshold))
            mine |= {"perc_ones_pred_clear": ones, "perc_zeros_pred_clear": 100 - ones}
            mine["accuracy_clear"] = float(np.mean((clear > threshold) == y[index]))
        if row["status"] == "ok":
            try:
                runs = []
                for test_row in index:
                    runs.append(run_encrypted(module, X[test_row]))
                    tick(configuration.label, 1)
                predictions = pd.DataFrame({"test_row": index, "label": y[index], "output_clear": clear})
                predictions = predictions.join(pd.DataFrame(runs))
                known = (
                    beats.iloc[index] if beats is not None else pd.DataFrame({"record": "", "aami": ""}, index=index)
                )
                predictions[["record", "aami"]] = known[["record", "aami"]].to_numpy()
                for kind in ("clear", "fhe"):
                    predictions[f"decision_{kind}"] = (predictions[f"output_{kind}"] > threshold).astype(int)
            except CIRCUIT_ERRORS as error:
                row |= {"status": "failed", "reason": first_line(error)}
                mine |= {"status": "failed", "reason": first_line(error)}
        yield batch, mine, predictions


def all_batches(*arguments: Any) -> list[Result]:
    """What a worker of a cluster does with one configuration: run_batches to its end."""
    return list(run_batches(*arguments))


def measure_speed(setting: Setting, seed: int) -> Speed:
    """Measure this machine on one small layer."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "w0": rng.normal(size=(MEASURED_FEATURES, MEASURED_NEURONS)),
        "w1": rng.normal(size=(MEASURED_NEURONS, 1)),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "w1"], ["y"]),
        ],
        "calibration",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, MEASURED_FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    rows = rng.normal(size=(100, MEASURED_FEATURES)).astype(np.float32)
    bits = setting.rounding_bits and min(setting.rounding_bits, MEASURED_ROUNDING_BITS)
    setting = replace(setting, rounding_bits=bits)
    graph, p_error = model.SerializeToString(), setting.p_error
    layer = Configuration("layer", 4 if bits else 2, graph, bits, p_error, False, setting, rows, {})
    module = compile_circuit(layer)
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
