"""Jobs of a worker on one configuration: its cost, its accuracies, and test rows encrypted.

Each receives the Experiment and the key of a configuration, and returns facts for its row and what else it found. A
worker compiles a configuration once, and stores the encryption keys of one at a time. After a failure, "status" and
"reason" are among the facts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fhe_mlp import ecg
from fhe_mlp.cli import first_line, machine_facts
from fhe_mlp.encrypted import CIRCUIT_ERRORS, choose
from fhe_mlp.encrypted.post_training import PostTraining
from fhe_mlp.experiments.configuration import Configuration, Experiment

MEMORY_PER_KEY_BYTE = 2.2  # bytes; making and unpacking keys of 0.4 to 4.7 GB took up to 2.1 times their size
Facts = dict[str, Any]
_keys: dict[str, tuple[bytes, float]] = {}  # secret keys by parameters, of one at most, and how long they took


@functools.lru_cache  # of 128, also where a Dask worker serves many runs
def compiled(experiment: Experiment, key: str) -> Any:
    """Return the compiled configuration. Raises one of CIRCUIT_ERRORS."""
    configuration = experiment.configurations[key]
    if configuration.network is None:
        return post_training(experiment, configuration)
    scheme = choose(configuration.network, configuration.identity["scheme"])
    return scheme(configuration.network, experiment.data.train.X, experiment.beats)


def post_training(experiment: Experiment, configuration: Configuration) -> PostTraining:
    """Return the float network as Concrete ML quantizes it. Raises one of CIRCUIT_ERRORS."""
    import onnx

    return PostTraining(onnx.load_from_string(configuration.graph), configuration.setting, experiment.calibration)


def cost(experiment: Experiment, key: str) -> tuple[Facts, None]:
    """Compile, and return the cost."""
    started = time.perf_counter()
    try:
        facts = compiled(experiment, key).cost()
    except CIRCUIT_ERRORS as error:
        return {"status": "cannot compile", "reason": first_line(error)}, None
    memory = facts["evaluation_keys_MB"] * MEMORY_PER_KEY_BYTE
    return {"compile_time": time.perf_counter() - started, **facts, "predicted_memory_MB": memory}, None


def too_large(facts: Facts) -> Facts:
    """Return the status of a configuration whose keys do not fit into the free memory of this machine, else nothing."""
    import psutil

    memory = facts["evaluation_keys_MB"] * MEMORY_PER_KEY_BYTE / 1e3
    free = psutil.virtual_memory().available / 1e9
    reason = f"needs about {memory:.1f} GB of memory, {free:.1f} GB are free"
    return {"status": "too large", "reason": reason} if memory > free else {}


def measure(experiment: Experiment, key: str) -> tuple[Facts, np.ndarray | None]:
    """Return accuracies, for which no keys are needed, and the cleartext logits (n,) of all test rows."""
    configuration, val, test = experiment.configurations[key], experiment.data.val, experiment.data.test
    network, rows = configuration.network, experiment.simulated
    try:
        scheme = compiled(experiment, key)
        model, started = network or scheme, time.perf_counter()
        clear = model.logits(test.X)
        facts: Facts = {"clear_seconds_per_row": (time.perf_counter() - started) / len(clear)}
        facts |= {f"{name}_test_set": value for name, value in ecg.columns(test.figures(clear > 0)).items()}
        facts["test_set_rows"] = len(clear)
        facts["balanced_accuracy_validation"] = ecg.balanced_accuracy(model.logits(val.X) > 0, val.y)
        simulated = scheme.simulate(test.X[rows])
        if simulated is not None:
            facts["accuracy_simulated"] = np.mean((simulated > 0) == test.y[rows])
            facts["accuracy_clear_same_rows"] = np.mean((clear[rows] > 0) == test.y[rows])
            facts["simulated_rows"] = len(rows)
        if network and simulated is not None:
            facts["noisy_balanced_accuracy_validation"] = network.noisy_balanced_accuracy(val)
            facts["noisy_balanced_accuracy_test_set"] = network.noisy_balanced_accuracy(test)
        if network:
            facts["overflowing_test_rows"] = network.overflowing(test.X)
            with contextlib.suppress(*CIRCUIT_ERRORS):  # then that cell is empty
                decided = post_training(experiment, configuration).logits(test.X) > 0
                facts["post_training_balanced_accuracy_test_set"] = ecg.balanced_accuracy(decided, test.y)
        return facts, clear
    except CIRCUIT_ERRORS as error:
        return {"status": "failed", "reason": first_line(error)}, None


def encrypt(experiment: Experiment, key: str, calls: Sequence[np.ndarray]) -> tuple[Facts, list[Facts]]:
    """Run test rows encrypted; each call is an array of those that share a payload.

    Returns facts of the keys, and a dictionary of results.RUN_COLUMNS for each row.
    """
    facts, runs = {}, []
    try:
        client, server, facts = sides(experiment, key)
        for rows in calls if "status" not in facts else []:
            runs += run_rows(client, server, experiment, rows)
        return facts, runs
    except CIRCUIT_ERRORS as error:
        return {**facts, "status": "failed", "reason": first_line(error)}, runs


@functools.lru_cache(maxsize=1)
def sides(experiment: Experiment, key: str) -> tuple[Any, Any, Facts]:
    """Return client and server with keys, made for the first job of a configuration, and how long keys and a beat took.

    Of the two beats that run first, one unpacks the keys, and the other shows whether they are too slow after all.
    """
    sides.cache_clear()  # the keys of one configuration leave the memory before others are made
    scheme = compiled(experiment, key)
    if refused := too_large(scheme.cost()):
        return None, None, refused
    client, server = scheme.client(), scheme.server()
    started, made = time.perf_counter(), _keys.get(scheme.key_parameters)
    if made:  # for another network of equal parameters
        client.load_secret_keys(made[0])
    else:
        client.make_keys()
    facts: Facts = {"keygen_time": made[1] if made else time.perf_counter() - started}
    if scheme.key_parameters and not made:
        _keys.clear()
        _keys[scheme.key_parameters] = client.secret_keys(), facts["keygen_time"]
    server.load_keys(client.evaluation_keys())
    for _ in range(2):
        seconds = facts["warm_up_seconds"] = timed_call(client, server, experiment.data.train.X[:1])["run_seconds"]
    if seconds > experiment.max_seconds:
        reason = f"measured {seconds:.0f} s per beat, over --max-seconds {experiment.max_seconds:g}"
        facts |= {"status": "too slow", "reason": reason}
    return client, server, facts


def timed_call(client: Any, server: Any, X: np.ndarray) -> Facts:
    """Encrypt, run and decrypt rows X (n, features) in one payload; return logits (n,), seconds and bytes."""
    times = [time.perf_counter()]
    payload = client.encrypt(X)
    times.append(time.perf_counter())
    answer = server.run(payload)
    times.append(time.perf_counter())
    logits = client.decrypt(answer, len(X))
    times.append(time.perf_counter())
    seconds = dict(zip(("encrypt_seconds", "run_seconds", "decrypt_seconds"), np.diff(times).tolist()))
    return {"logits": logits, **seconds, "input_bytes": len(payload), "output_bytes": len(answer)}


def run_rows(client: Any, server: Any, experiment: Experiment, rows: np.ndarray) -> list[Facts]:
    """Return the runs of test rows in one payload, which is filled up with repetitions unless it is of one row."""
    filled = rows if len(rows) == 1 else np.resize(rows, experiment.beats)
    measured = timed_call(client, server, experiment.data.test.X[filled])
    logits, machine = measured.pop("logits"), machine_facts()
    shared = {name: value / len(filled) for name, value in measured.items()}
    shared |= {"beats": len(filled), "host": machine["host"], "processor": machine["processor"]}
    shared["cores"] = int(os.environ.get("OMP_NUM_THREADS", machine["cores"]))
    return [{"test_row": int(row), "output_fhe": float(logit), **shared} for row, logit in zip(rows, logits)]
