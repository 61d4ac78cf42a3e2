"""One configuration of step 5, a network at one bit width: its price, its accuracy in clear, its encrypted runs.

A Job holds all that is needed, so that it runs in this process or is sent to a machine that has no file of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fhe_mlp.circuit import (
    CIRCUIT_ERRORS,
    PLAIN,
    Setting,
    calibration_rows,
    compile_network,
    key_bytes,
    load_network,
    load_quantized,
    make_keys,
    outputs,
    quantized_path,
    run_encrypted,
    without_sigmoid,
)
from fhe_mlp.common import digest, first_line, machine_facts
from fhe_mlp.quantized import from_onnx

if TYPE_CHECKING:
    from concrete.ml.quantization import QuantizedModule

MEMORY_PER_KEY_BYTE = 2.2  # bytes; making and unpacking keys of 0.4 to 4.7 GB took up to 2.1 times their size

MACHINE = ("host", "processor", "cores")  # on which a row was measured; times of unlike ones are kept apart
# Of the modules that give a result, as this process has loaded them: a worker may have been started before an edit.
CODE_SHA256 = digest(
    b"".join((Path(__file__).parent / f"{m}.py").read_bytes() for m in ("circuit", "experiment", "quantized"))
)

Data = dict[str, tuple[np.ndarray, np.ndarray]]  # as preprocess_mitbih.load_arrays gives


@dataclass(frozen=True, eq=False)
class Job:
    """One configuration and all that it needs."""

    model_name: str
    bits: int
    graph: bytes  # ONNX, as it is compiled
    kept_bits: int | None  # of a network that step 3 quantized, None where Concrete ML quantizes
    setting: Setting
    calibration: np.ndarray  # training rows (n, 32)
    identity: dict[str, Any]  # what results must share to stand for each other, a column each; "identity": its digest

    @property
    def key(self) -> str:
        """Short name of the identity."""
        return self.identity["identity"]

    @property
    def label(self) -> str:
        """What progress bars call it."""
        return f"{self.model_name} at {self.bits} bits"


@dataclass(frozen=True, eq=False)
class Task:
    """A configuration that is to run: what its compilation told, and where."""

    job: Job
    facts: dict[str, Any]  # of price and judge_time
    drawn: dict[int, np.ndarray]  # test rows by batch
    seconds: float  # predicted, for all of it

    @property
    def samples(self) -> int:
        """Rows that will run encrypted."""
        return sum(map(len, self.drawn.values())) if self.facts["status"] == "ok" else 0


@dataclass(frozen=True, eq=False)
class Result:
    """What one configuration gave on one batch: a row of the workbook and, where it ran encrypted, its predictions."""

    batch: int
    row: dict[str, Any]
    predictions: pd.DataFrame | None


def versions() -> dict[str, str]:
    """Of the libraries that give a result."""
    return {name: version(name) for name in ("concrete-ml", "concrete-python", "onnx", "numpy")}


def make_job(
    path: Path, bits: int, setting: Setting, data: Data, calibration: np.ndarray, basis: dict[str, Any]
) -> Job:
    """The configuration of the float network in `path` at `bits`, quantized in step 3 where there is such a file.

    basis: what identifies results besides the network, its bits and its setting. Raises InputError for a bad file.
    """
    trained = quantized_path(path, bits)
    kept_bits, way = None, "plain" if setting == PLAIN else "quantized after training"
    if setting.trained and trained.exists():
        model, network = load_quantized(trained)
        kept_bits, way = network.kept_bits, "quantized in training"
        calibration = calibration_rows(network, data["train"][0], len(calibration))
    else:
        model = load_network(path)
    graph = (model if setting.rounding_bits is None else without_sigmoid(model)).SerializeToString()
    identity = {
        "way": way,
        "rounding_bits": kept_bits or setting.rounding_bits,
        "p_error": setting.p_error,
        "network_sha256": digest(graph),
        **basis,
    }
    identity["identity"] = digest(repr((path.stem, bits, identity)))
    return Job(path.stem, bits, graph, kept_bits, setting, calibration, identity)


def compile_job(job: Job) -> QuantizedModule:
    """The configuration's circuit. Raises one of CIRCUIT_ERRORS where Concrete cannot make it."""
    import onnx

    return compile_network(onnx.load_from_string(job.graph), job.bits, job.calibration, job.setting, job.kept_bits)


def price(job: Job) -> tuple[dict[str, Any], QuantizedModule | None]:
    """What compiling tells, as the facts of the plan with "status" and "reason", and the circuit if there is one."""
    started = time.perf_counter()
    try:
        module = compile_job(job)
    except CIRCUIT_ERRORS as error:
        return {"status": "cannot compile", "reason": first_line(error)}, None
    circuit = module.fhe_circuit
    pbs = circuit.programmable_bootstrap_count
    facts = {
        "compile_time": time.perf_counter() - started,
        "pbs": pbs,
        "p_any_pbs_off": 1 - (1 - job.setting.p_error) ** pbs,
        "complexity": circuit.complexity,
        "widest_integer_bits": circuit.graph.maximum_integer_bit_width(),
        "evaluation_keys_MB": key_bytes(circuit) / 1e6,
        "secret_keys_kB": circuit.size_of_secret_keys / 1e3,
        "predicted_memory_MB": key_bytes(circuit) * MEMORY_PER_KEY_BYTE / 1e6,
        "status": "ok",
        "reason": "",
    }
    return facts, module


def judge_time(facts: dict[str, Any], seconds_per_unit: float, limit: float) -> None:
    """Add the predicted seconds a sample to the facts of a compiled configuration, and refuse what exceeds `limit`."""
    if facts["status"] == "ok":
        seconds = facts["predicted_seconds"] = facts["complexity"] * seconds_per_unit
        if seconds > limit:
            facts |= {
                "status": "too slow",
                "reason": f"predicted {seconds:.0f} s a sample, over --max-seconds {limit:g}",
            }


def judge_memory(facts: dict[str, Any]) -> None:
    """Refuse a compiled configuration whose keys would not fit into this machine's free memory."""
    import psutil

    memory, free = facts.get("predicted_memory_MB", 0) / 1e3, psutil.virtual_memory().available / 1e9
    if facts["status"] == "ok" and memory > free:
        reason = f"needs about {memory:.1f} GB of memory, {free:.1f} GB are free"
        facts |= {"status": "too large", "reason": reason}


def accuracies(module: QuantizedModule, job: Job, data: Data, simulated: np.ndarray) -> dict[str, Any]:
    """What is measured without keys; simulated: indices of the test rows for the simulated accuracy.

    Raises ValueError when the circuit of a network that step 3 quantized does not decide as that network does.
    """
    import onnx

    (X_val, y_val), (X, y) = data["val"], data["test"]
    threshold = job.setting.threshold
    decisions = outputs(module, X, "disable") > threshold
    if job.kept_bits and not np.array_equal(decisions, from_onnx(onnx.load_from_string(job.graph)).run(X)[0] > 0):
        raise ValueError("the circuit does not decide as the network of step 3 does; rerun python h5_onnx_converter.py")
    facts = {
        "accuracy_clear_validation": float(np.mean((outputs(module, X_val, "disable") > threshold) == y_val)),
        "accuracy_clear_test_set": float(np.mean(decisions == y)),
        "test_set_rows": len(y),
    }
    if len(simulated):
        encrypted = outputs(module, X[simulated], "simulate") > threshold
        facts["accuracy_simulated"] = float(np.mean(encrypted == y[simulated]))
        facts["accuracy_clear_same_rows"] = float(np.mean(decisions[simulated] == y[simulated]))
        facts["simulated_rows"] = len(simulated)
    return facts


def run_task(
    task: Task,
    data: Data,
    simulated: np.ndarray,
    limit: float,
    tick: Callable[[str, int], None] = lambda text, samples: None,
) -> Iterator[Result]:
    """Yield the result of each batch as soon as it is there.

    Keys are made once; one run before the timed ones unpacks them, and stops a configuration that takes more than
    `limit` seconds a sample after all. What fails becomes the row's status. simulated: indices of test rows; `tick`
    hears what is being done and how many samples have just been finished.
    """
    job = task.job
    X, y = data["test"]
    machine = machine_facts()
    row = {**job.identity, **{name: machine[name] for name in MACHINE}, **task.facts}
    if row["status"] != "cannot compile":
        try:
            tick(f"{job.label}: in clear", 0)
            module = compile_job(job)
            row |= accuracies(module, job, data, simulated)
            judge_memory(row)
            if row["status"] == "ok":
                tick(f"{job.label}: making keys", 0)
                row["keygen_time"] = make_keys(module)
                tick(job.label, 0)
                seconds = run_encrypted(module, job.calibration[0])["run_seconds"]
                if seconds > limit:
                    reason = f"measured {seconds:.0f} s a sample, over --max-seconds {limit:g}"
                    row |= {"status": "too slow", "reason": reason}
        except CIRCUIT_ERRORS as error:
            row |= {"status": "failed", "reason": first_line(error)}
    for batch, index in task.drawn.items():
        mine = {"model_name": job.model_name, "num_items": len(index), "batch": batch, "q_bits": job.bits, **row}
        mine |= {"perc_ones_gt": 100 * np.mean(y[index]), "perc_zeros_gt": 100 * np.mean(1 - y[index])}
        predictions = None
        if "accuracy_clear_test_set" in row:
            started = time.perf_counter()
            clear = outputs(module, X[index], "disable")
            mine |= {
                "clear_time": time.perf_counter() - started,
                **clear_columns(clear > job.setting.threshold, y[index]),
            }
        if mine["status"] == "ok":
            try:
                runs = []
                for test_row in index:
                    runs.append(run_encrypted(module, X[test_row]))
                    tick(job.label, 1)
                predictions = prediction_table(job, batch, index, y[index], clear, pd.DataFrame(runs))
                mine |= encrypted_columns(predictions)
            except CIRCUIT_ERRORS as error:
                row |= {"status": "failed", "reason": first_line(error)}
                mine |= {"status": "failed", "reason": first_line(error)}
        yield Result(batch, mine, predictions)


def failed_results(task: Task, reason: str) -> list[Result]:
    """Rows of a configuration of which nothing came back."""
    row = {"model_name": task.job.model_name, "q_bits": task.job.bits, **task.job.identity, **task.facts}
    row |= {"status": "failed", "reason": reason}
    return [Result(batch, {**row, "batch": batch, "num_items": len(i)}, None) for batch, i in task.drawn.items()]


def drawn_rows(batch: int, batch_size: int, samples: int, rows: int, seed: int) -> np.ndarray:
    """Rising indices of the test rows drawn from batch number `batch`; they do not depend on which batches are run."""
    members = np.arange(batch * batch_size, min((batch + 1) * batch_size, rows))
    return np.sort(np.random.default_rng([seed, batch]).choice(members, min(samples, len(members)), replace=False))


def clear_columns(decisions: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The part of a results row that is known in clear; decisions and labels y (n,) of the drawn rows."""
    return {
        "accuracy_clear": np.mean(decisions == y),
        "perc_ones_pred_clear": 100 * np.mean(decisions),
        "perc_zeros_pred_clear": 100 * np.mean(~decisions),
    }


def prediction_table(
    job: Job, batch: int, index: np.ndarray, y: np.ndarray, clear: np.ndarray, runs: pd.DataFrame
) -> pd.DataFrame:
    """One row a prediction; test rows `index`, labels y and clear outputs (n,); runs: what run_encrypted gave."""
    threshold = job.setting.threshold
    return pd.DataFrame(
        {
            "model_name": job.model_name,
            "q_bits": job.bits,
            "batch": batch,
            "identity": job.key,
            "test_row": index,
            "label": y,
            "decision_clear": (clear > threshold).astype(int),
            "decision_fhe": (runs["output_fhe"] > threshold).astype(int),
            "output_clear": clear,
            **runs,
        }
    )


def encrypted_columns(runs: pd.DataFrame) -> dict[str, Any]:
    """The part of a results row that the encrypted run gives; runs: one row a prediction (sheet "predictions").

    Times a sample are medians with their interquartile range; the interval is Wilson's, JASA 22:209-212, 1927.
    """
    from scipy.stats import binomtest

    right = int((runs["decision_fhe"] == runs["label"]).sum())
    interval = binomtest(right, len(runs)).proportion_ci(0.95, method="wilson")
    quartiles = runs[["encrypt_seconds", "run_seconds", "decrypt_seconds"]].quantile([0.25, 0.5, 0.75])
    return {
        "fhe_time": float(runs[list(quartiles)].to_numpy().sum()),
        "accuracy_fhe": right / len(runs),
        "perc_ones_pred_fhe": 100 * runs["decision_fhe"].mean(),
        "perc_zeros_pred_fhe": 100 * (1 - runs["decision_fhe"].mean()),
        "accuracy_fhe_low95": float(interval.low),
        "accuracy_fhe_high95": float(interval.high),
        "decisions_equal_clear": int((runs["decision_fhe"] == runs["decision_clear"]).sum()),
        "outputs_equal_clear": int(np.isclose(runs["output_fhe"], runs["output_clear"]).sum()),
        "encrypt_seconds": quartiles.loc[0.5, "encrypt_seconds"],
        "run_seconds": quartiles.loc[0.5, "run_seconds"],
        "run_seconds_iqr": quartiles.loc[0.75, "run_seconds"] - quartiles.loc[0.25, "run_seconds"],
        "decrypt_seconds": quartiles.loc[0.5, "decrypt_seconds"],
        "input_ciphertext_kB": runs["input_bytes"].median() / 1e3,
        "output_ciphertext_kB": runs["output_bytes"].median() / 1e3,
    }
