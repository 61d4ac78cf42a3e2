"""Step 5: compile the best networks at 2-7 bits and classify beats in clear and encrypted (TFHE, Concrete ML).

Every configuration (network, bits) is compiled first; then the plan with the predicted times is printed, and what is
affordable runs encrypted on a seeded draw of test rows. Where step 3 trained a network for a bit width, that one is
taken (quantized/{name}_{bits}bits.onnx), else Concrete ML quantizes the float network. The last sigmoid stays with the
client: the encrypted graph ends in the logit, whose sign is the decision. What each configuration saves is told against
the plain way: n_bits only, ten rows of calibration, no rounding, sigmoid encrypted; of it only the price is computed.

Reads   pruned_model_top_*.onnx and quantized/ in --workdir (python h5_onnx_converter.py makes them), the arrays in
        --data-dir and, for the pictures, benchmark.xlsx in --workdir when it is there (make bench)
Writes  to --workdir: results_batch_{number}.xlsx after every configuration, fhe_summary.xlsx, fhe_frontier.png
Run     python fhe_experiments.py
        python fhe_experiments.py --reference --top 1 --bits 2 3     (the plain way, encrypted where it is affordable)
"""

from __future__ import annotations

import argparse
import time
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from preprocess_mitbih import (
    FEATURES,
    InputError,
    by_rank,
    check_writable,
    first_line,
    load_arrays,
    machine_facts,
    make_parser,
    natural_int,
    positive_float,
    positive_int,
    run,
    save_figure,
    write_workbook,
)
from quantized_mlp import BITS, QuantizedNetwork, from_onnx

if TYPE_CHECKING:
    import onnx
    from concrete.ml.quantization import QuantizedModule

TOP = 6  # best networks of step 3
BATCH_SIZE = 50  # consecutive test rows a batch, as published
SAMPLES = 10  # rows drawn from each batch, as published
CALIBRATION_ROWS = 1000  # training rows that fix the quantization ranges
CALIBRATION_NEURONS = 32  # of the layer that measures the machine; enough to keep its cores busy
PLAIN_CALIBRATION_ROWS = 10  # of the plain way
MAX_LOSS = (
    0.01  # of accuracy below the best of the plain way that its cheapest bit width may have, for comparing prices
)
SIMULATED_ROWS = 500  # test rows for the simulated accuracy; simulation takes milliseconds a row
ROUNDING_BITS = (
    6  # leading accumulator bits that are kept where Concrete ML quantizes; step 3's networks have their own
)
P_ERROR = 2.0**-13  # chance that one bootstrap is off by one step; Concrete ML's default is 2^-40
MEMORY_PER_KEY_BYTE = 2.2  # bytes; making and unpacking keys of 0.4 to 4.7 GB took up to 2.1 times their size
MAX_SECONDS = 60.0  # seconds a sample above which a configuration is not run

PUBLISHED_COLUMNS = (
    "model_name num_items batch q_bits compile_time clear_time accuracy_clear perc_ones_gt perc_zeros_gt "
    "perc_ones_pred_clear perc_zeros_pred_clear fhe_time accuracy_fhe perc_ones_pred_fhe perc_zeros_pred_fhe"
).split()


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


@dataclass
class Configuration:
    """One network at one bit width, compiled unless `status` says otherwise."""

    path: Path
    bits: int
    facts: dict[str, Any]
    module: QuantizedModule | None = None
    status: str = "ok"
    reason: str = ""


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
    accumulators = network.run(X)[1]
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


def compile_network(
    model: onnx.ModelProto, bits: int, calibration: np.ndarray, setting: Setting, kept_bits: int | None = None
) -> QuantizedModule:
    """Compile to TFHE; calibration: training rows (n, 32).

    With `kept_bits` the graph is one of step 3's quantized networks, else it is quantized to `bits` here.
    """
    from concrete.ml.torch.compile import compile_onnx_model

    rounding_bits = kept_bits or setting.rounding_bits
    with warnings.catch_warnings():
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


def outputs(module: QuantizedModule, X: np.ndarray, mode: str) -> np.ndarray:
    """Quantized network's outputs (n,) for rows X (n, 32): mode "disable" in clear, "simulate" with p_error's noise."""
    return module.forward(X.astype(np.float64), fhe=mode)[:, 0]


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


def calibrate_machine(setting: Setting, seed: int) -> tuple[float, float]:
    """Seconds a unit of complexity and seconds a byte of keys, measured on one small layer."""
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
    module = compile_network(model, 4 if setting.rounding_bits else 2, rows, setting)
    circuit = module.fhe_circuit
    started = time.perf_counter()
    circuit.keygen(force=True)
    keygen = time.perf_counter() - started
    seconds = [run_encrypted(module, row)["run_seconds"] for row in rows[:4]][1:]
    return float(np.median(seconds)) / circuit.complexity, keygen / key_bytes(circuit)


def prepare(
    path: Path, bits: int, data: dict[str, Any], calibration: np.ndarray, setting: Setting, simulated: np.ndarray
) -> Configuration:
    """Compile one configuration and measure what needs no key; a failure becomes its status.

    simulated: indices of the test rows for the simulated accuracy.
    """
    trained = setting.trained and quantized_path(path, bits).exists()
    X, y = data["test"]
    facts: dict[str, Any] = {"way": "plain" if setting == PLAIN else "quantized after training"}
    facts |= {"rounding_bits": setting.rounding_bits, "p_error": setting.p_error}
    kept_bits = None
    if trained:
        model, network = load_quantized(quantized_path(path, bits))
        kept_bits = network.kept_bits
        calibration = calibration_rows(network, data["train"][0], len(calibration))
        facts |= {"way": "quantized in training", "rounding_bits": kept_bits}
    else:
        model = load_network(path)
    started = time.perf_counter()
    try:
        graph = model if setting.rounding_bits is None else without_sigmoid(model)
        module = compile_network(graph, bits, calibration, setting, kept_bits)
    except CIRCUIT_ERRORS as error:
        return Configuration(path, bits, facts, None, "cannot compile", first_line(error))
    circuit = module.fhe_circuit
    facts["compile_time"] = time.perf_counter() - started
    facts["pbs"] = circuit.programmable_bootstrap_count
    facts["p_any_pbs_off"] = 1 - (1 - setting.p_error) ** facts["pbs"]
    facts["complexity"] = circuit.complexity
    facts["widest_integer_bits"] = circuit.graph.maximum_integer_bit_width()
    facts["evaluation_keys_MB"] = key_bytes(circuit) / 1e6
    facts["secret_keys_kB"] = circuit.size_of_secret_keys / 1e3
    decisions = outputs(module, X, "disable") > setting.threshold
    if trained and not np.array_equal(decisions, network.run(X)[0] > 0):
        reason = "the imported graph does not decide as the network that was trained; rerun python h5_onnx_converter.py"
        return Configuration(path, bits, facts, None, "failed", reason)
    X_val, y_val = data["val"]
    facts["accuracy_clear_validation"] = float(
        np.mean((outputs(module, X_val, "disable") > setting.threshold) == y_val)
    )
    facts["accuracy_clear_test_set"] = float(np.mean(decisions == y))
    facts["test_set_rows"] = len(y)
    if len(simulated):
        encrypted = outputs(module, X[simulated], "simulate") > setting.threshold
        facts["accuracy_simulated"] = float(np.mean(encrypted == y[simulated]))
        facts["accuracy_clear_same_rows"] = float(np.mean(decisions[simulated] == y[simulated]))
        facts["simulated_rows"] = len(simulated)
    return Configuration(path, bits, facts, module)


def plain_prices(path: Path, all_bits: Sequence[int], data: dict[str, Any], calibration: np.ndarray) -> pd.DataFrame:
    """What the plain way costs for the float network in `path`, a row for each bit width; nothing is encrypted.

    The row that prices are compared with is marked in column "compared": the cheapest one whose validation accuracy is
    at most MAX_LOSS below the best of them.
    """
    rows = []
    nothing = np.array([], dtype=int)
    for bits in tqdm(all_bits, desc="plain way, for comparison", unit="circuit"):
        c = prepare(path, bits, data, calibration[:PLAIN_CALIBRATION_ROWS], PLAIN, nothing)
        rows.append({"model_name": path.stem, "q_bits": bits, **c.facts, "status": c.status, "reason": c.reason})
    table = pd.DataFrame(rows)
    table["compared"] = False
    if "complexity" in table and table["complexity"].notna().any():
        good = table[table["accuracy_clear_validation"] >= table["accuracy_clear_validation"].max() - MAX_LOSS]
        table.loc[good["complexity"].idxmin(), "compared"] = True
    return table


def judge_affordable(c: Configuration, seconds_per_unit: float, limit: float) -> None:
    """Predict time and memory of a compiled configuration; what exceeds `limit` seconds or this machine is not run."""
    import psutil

    seconds = c.facts["predicted_seconds"] = c.facts["complexity"] * seconds_per_unit
    memory = c.facts["predicted_memory_MB"] = c.facts["evaluation_keys_MB"] * MEMORY_PER_KEY_BYTE
    free = psutil.virtual_memory().available / 1e6
    if seconds > limit:
        c.status, c.reason = "too slow", f"predicted {seconds:.0f} s a sample, over --max-seconds {limit:g}"
    elif memory > free:
        c.status, c.reason = "too large", f"needs about {memory / 1e3:.1f} GB of memory, {free / 1e3:.1f} GB are free"


def print_plan(configurations: list[Configuration], samples: int, seconds_per_byte: float) -> None:
    """Show what will run, what not and why, and about how long it takes."""
    columns = ("pbs", "complexity", "widest_integer_bits", "predicted_seconds", "accuracy_clear_test_set")
    plan = [
        {"model": c.path.stem, "bits": c.bits, **{k: c.facts.get(k) for k in columns}, "status": c.status}
        for c in configurations
    ]
    runnable = [c for c in configurations if c.status == "ok"]
    seconds = sum(c.facts["predicted_seconds"] * (samples + 1) for c in runnable)
    seconds += sum(key_bytes(c.module.fhe_circuit) * seconds_per_byte for c in runnable)
    print(f"\n{pd.DataFrame(plan).to_string(index=False, float_format='{:.4g}'.format)}\n")
    print(f"{samples} samples for each of {len(runnable)} configurations: the encrypted part takes about ", end="")
    print(f"{seconds / 60:.1f} min", flush=True)


def drawn_rows(batch: int, batch_size: int, samples: int, rows: int, seed: int) -> np.ndarray:
    """Rising indices of the test rows drawn from batch number `batch`; they do not depend on which batches are run."""
    members = np.arange(batch * batch_size, min((batch + 1) * batch_size, rows))
    return np.sort(np.random.default_rng([seed, batch]).choice(members, min(samples, len(members)), replace=False))


def clear_columns(c: Configuration, y: np.ndarray, clear: np.ndarray, setting: Setting) -> dict[str, Any]:
    """The part of a results row that is known in clear; y: labels (n,) and clear: outputs (n,) of the drawn rows."""
    decisions = clear > setting.threshold
    return {
        "accuracy_clear": np.mean(decisions == y),
        "perc_ones_pred_clear": 100 * np.mean(decisions),
        "perc_zeros_pred_clear": 100 * np.mean(~decisions),
    }


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


def run_configuration(
    c: Configuration, drawn: dict[int, np.ndarray], data: dict[str, Any], setting: Setting, limit: float, bar: tqdm
) -> tuple[list[dict[str, Any]], list[pd.DataFrame]]:
    """A results row for each batch in `drawn` ({number: test rows}), and tables of predictions where it ran encrypted.

    Keys are made once; one run before the timed ones unpacks them, and stops a configuration that takes more than
    `limit` seconds a sample after all. What fails on the way becomes the status.
    """
    X, y = data["test"]
    label = f"{c.path.stem} at {c.bits} bits"
    rows, predictions = [], []
    planned = sum(map(len, drawn.values())) if c.status == "ok" else 0
    if planned:
        try:
            bar.set_postfix_str(f"{label}: making keys")
            started = time.perf_counter()
            c.module.fhe_circuit.keygen(force=True)
            c.facts["keygen_time"] = time.perf_counter() - started
            bar.set_postfix_str(label)
            seconds = run_encrypted(c.module, data["train"][0][0])["run_seconds"]
            if seconds > limit:
                c.status, c.reason = "too slow", f"measured {seconds:.0f} s a sample, over --max-seconds {limit:g}"
        except CIRCUIT_ERRORS as error:
            c.status, c.reason = "failed", first_line(error)
    for batch, index in drawn.items():
        row = {"model_name": c.path.stem, "num_items": len(index), "batch": batch, "q_bits": c.bits, **c.facts}
        row |= {"perc_ones_gt": 100 * np.mean(y[index]), "perc_zeros_gt": 100 * np.mean(1 - y[index])}
        if c.module:
            started = time.perf_counter()
            clear = outputs(c.module, X[index], "disable")
            row |= {"clear_time": time.perf_counter() - started, **clear_columns(c, y[index], clear, setting)}
        if c.status == "ok":
            try:
                runs = []
                for test_row in index:
                    runs.append(run_encrypted(c.module, X[test_row]))
                    bar.update()
                table = pd.DataFrame(runs)
                where = {"model_name": c.path.stem, "q_bits": c.bits, "batch": batch, "test_row": index}
                where |= {"label": y[index], "decision_clear": (clear > setting.threshold).astype(int)}
                where |= {"decision_fhe": (table["output_fhe"] > setting.threshold).astype(int), "output_clear": clear}
                predictions.append(pd.concat([pd.DataFrame(where), table], axis=1))
                row |= encrypted_columns(predictions[-1])
            except CIRCUIT_ERRORS as error:
                c.status, c.reason = "failed", first_line(error)
        rows.append({**row, "status": c.status, "reason": c.reason})
    if planned:
        bar.total += sum(map(len, predictions)) - planned  # less what did not run after all
    c.module = None  # its keys are hundreds of megabytes
    return rows, predictions


def write_results(
    path: Path, rows: list[dict[str, Any]], predictions: list[pd.DataFrame], settings: dict[str, Any]
) -> None:
    """One batch's workbook: the published columns first, then ours; a sheet of predictions; a sheet of settings."""
    results = pd.DataFrame(rows)
    first = [*PUBLISHED_COLUMNS, "status", "reason"]
    sheets = {
        "results": results.reindex(columns=[*first, *(name for name in results if name not in first)]),
        "predictions": pd.concat(predictions) if predictions else pd.DataFrame({"model_name": []}),
        "settings": pd.DataFrame(settings.items(), columns=["setting", "value"]),
    }
    write_workbook(path, sheets)


def pareto(cost: pd.Series, accuracy: pd.Series) -> pd.Series:
    """True for each point that no cheaper or equally dear one equals or exceeds in accuracy."""
    order = pd.DataFrame({"cost": cost, "accuracy": accuracy}).sort_values(
        ["cost", "accuracy"], ascending=[True, False]
    )
    best_before = order["accuracy"].cummax().shift(fill_value=-np.inf)
    return (order["accuracy"] > best_before).reindex(cost.index)


def summarize(results: pd.DataFrame, predictions: list[pd.DataFrame], plain: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration over all its batches, the cheapest first; on_front is judged by validation accuracy."""
    keys = ["model_name", "q_bits"]
    first = ["way", "rounding_bits", "p_error", "pbs", "complexity", "accuracy_clear_validation"]
    first += ["accuracy_clear_test_set", "test_set_rows", "accuracy_simulated", "accuracy_clear_same_rows"]
    first += ["simulated_rows", "widest_integer_bits", "evaluation_keys_MB", "keygen_time", "status", "reason"]
    table = results.reindex(columns=[*keys, *first]).groupby(keys, sort=False).last().reset_index()
    if predictions:
        runs = pd.concat(predictions)
        encrypted = [{**dict(zip(keys, name)), "n": len(r), **encrypted_columns(r)} for name, r in runs.groupby(keys)]
        table = table.merge(pd.DataFrame(encrypted).drop(columns="fhe_time"), on=keys, how="left")
    if plain["compared"].any():
        dear = plain.loc[plain["compared"], "complexity"].iloc[0]
        table.insert(table.columns.get_loc("complexity") + 1, "times_cheaper_than_plain", dear / table["complexity"])
    compiled = table["complexity"].notna()
    table["on_front"] = False
    table.loc[compiled, "on_front"] = pareto(
        table["complexity"][compiled], table["accuracy_clear_validation"][compiled]
    )
    return table.sort_values("complexity", ignore_index=True)


def plot_frontier(summary: pd.DataFrame, others: pd.DataFrame, path: Path) -> None:
    """Test accuracy against complexity and against seconds a beat: every configuration, the front, and the others.

    others: columns name, kind, accuracy, complexity and seconds, missing where unknown. The accuracy axis is a logit
    scale, so that 98 % and 99 % lie as far apart as 50 % and 67 %.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 6.5), sharey=True)
    axes[0].set_ylabel("accuracy, whole test set, quantized")
    for axis, cost, other_cost, label in (
        (axes[0], "complexity", "complexity", "complexity of one encrypted beat"),
        (axes[1], "run_seconds", "seconds", "seconds a beat, median"),
    ):
        table = summary[summary[cost].notna()] if cost in summary else summary[:0].assign(**{cost: []})
        for bits, group in table.groupby("q_bits"):
            axis.scatter(group[cost], clipped(group["accuracy_clear_test_set"]), s=28, label=f"{bits} bits", zorder=3)
        front = table[table["on_front"]].sort_values(cost)
        axis.plot(front[cost], clipped(front["accuracy_clear_test_set"]), color="black", lw=1, label="front")
        for (kind, group), marker in zip(others[others[other_cost].notna()].groupby("kind"), "sDv^"):
            points = axis.scatter(
                group[other_cost], clipped(group["accuracy"]), marker=marker, s=40, label=kind, zorder=2
            )
            points.set_facecolor("lightgrey")
            points.set_edgecolor("black")
            for _, row in group.iterrows():
                at = (row[other_cost], clipped(row["accuracy"]))
                axis.annotate(row["name"], at, xytext=(5, -9), textcoords="offset points", fontsize=7)
        axis.set(xscale="log", yscale="logit", xlabel=label)
        axis.set_yticks([0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99], minor=False)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axis.yaxis.set_minor_formatter("")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.suptitle("Price of encrypted inference (front: best validation accuracy at its price)")
    save_figure(figure, path)


def clipped(accuracy: Any) -> Any:
    """Accuracies that have a place on a logit scale."""
    return np.clip(accuracy, 0.45, 0.995)


def other_points(workdir: Path, plain: pd.DataFrame) -> pd.DataFrame:
    """Points for the picture: the plain way's and those of benchmark.xlsx, if a benchmark was run in `workdir`."""
    columns = ["name", "kind", "accuracy", "complexity", "seconds"]
    plain = plain.reindex(columns=["q_bits", "accuracy_clear_test_set", "complexity"]).dropna()
    names = [f"plain {bits} bits" for bits in plain["q_bits"]]
    points = pd.DataFrame({"name": names, "kind": "plain way"})
    points["accuracy"], points["complexity"] = plain[["accuracy_clear_test_set", "complexity"]].to_numpy().T
    path = workdir / "benchmark.xlsx"
    if path.exists():
        try:
            benchmark = pd.read_excel(path).reindex(columns=columns)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: cannot be read ({first_line(error)}); delete it or run make bench") from None
        points = pd.concat([points, benchmark[benchmark["kind"] != "this pipeline"]])
    return points.reindex(columns=columns).dropna(subset="accuracy")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    option = parser.add_argument
    option("--models", type=Path, nargs="+", help=".onnx files (default: the best of step 4)")
    option("--top", type=positive_int, default=TOP, help="how many of the best networks")
    option("--bits", type=int, nargs="+", choices=BITS, default=BITS, help="of weights and activations")
    option("--batch-size", type=positive_int, default=BATCH_SIZE, help="consecutive test rows a batch")
    option("--samples", type=positive_int, default=SAMPLES, help="rows drawn from each batch")
    option("--batches", type=positive_int, default=1, help="how many batches")
    option("--start-batch", type=natural_int, default=0, help="number of the first batch, from 0")
    option("--max-seconds", type=positive_float, default=MAX_SECONDS, help="most seconds a sample; dearer is not run")
    option("--post-training", action="store_true", help="leave step 3's quantized networks aside, quantize here")
    option("--rounding-bits", type=int, choices=range(2, 9), default=ROUNDING_BITS, help="kept when quantizing here")
    option("--p-error", type=float, default=P_ERROR, help="chance that one bootstrap is off by one step")
    option("--reference", action="store_true", help="the plain way: no rounding, p_error 2^-40")
    args = parser.parse_args(argv)
    if not 2.0**-60 <= args.p_error < 1:
        parser.error("--p-error must lie between 2^-60 and 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Compile all, tell what it will take, run encrypted what is affordable."""
    args = parse_arguments(argv)
    check_writable(args.workdir)
    data = load_arrays(args.data_dir)
    rows_in_test = len(data["test"][1])
    batches = range(args.start_batch, args.start_batch + args.batches)
    if batches[-1] * args.batch_size >= rows_in_test:
        last = (rows_in_test - 1) // args.batch_size
        raise InputError(f"batch {batches[-1]} does not exist, the last is {last}; see --start-batch and --batches")
    paths = args.models or by_rank(args.workdir, ".onnx")[: args.top]
    if not paths:
        raise InputError(f"{args.workdir}: no pruned_model_top_*.onnx; make them with: python h5_onnx_converter.py")
    if len({path.stem for path in paths}) < len(paths):
        raise InputError("--models: two files have the same name; their rows could not be told apart")
    setting = PLAIN if args.reference else Setting(args.rounding_bits, args.p_error, 0.0, not args.post_training)
    for path in paths:  # all are looked at before the first takes its minutes
        load_network(path)
        for bits in args.bits:
            if setting.trained and quantized_path(path, bits).exists():
                load_quantized(quantized_path(path, bits))
    rng = np.random.default_rng(args.seed)
    calibration = data["train"][0][rng.permutation(len(data["train"][0]))[:CALIBRATION_ROWS]]
    simulated = np.sort(rng.permutation(rows_in_test)[:SIMULATED_ROWS])
    drawn = {b: drawn_rows(b, args.batch_size, args.samples, rows_in_test, args.seed) for b in batches}
    samples = sum(map(len, drawn.values()))

    print("measuring this machine ...", flush=True)
    seconds_per_unit, seconds_per_byte = calibrate_machine(setting, args.seed)
    plain = plain_prices(paths[-1], args.bits, data, calibration)
    others = other_points(args.workdir, plain)
    configurations = []
    for path, bits in (bar := tqdm([(p, b) for p in paths for b in args.bits], desc="compiling", unit="circuit")):
        bar.set_postfix_str(f"{path.stem} at {bits} bits")
        ten = setting == PLAIN
        c = prepare(path, bits, data, calibration[: PLAIN_CALIBRATION_ROWS if ten else None], setting, simulated)
        if c.status == "ok":
            judge_affordable(c, seconds_per_unit, args.max_seconds)
        configurations.append(c)
    print_plan(configurations, samples, seconds_per_byte)

    settings = {
        **machine_facts(),
        "rounding_bits": "leading bits of each accumulator that the encrypted ReLU looks at; their number is the price",
        "p_error": setting.p_error,
        "p_error in words": f"one encrypted ReLU in {1 / setting.p_error:,.0f} may see its input off by one step; "
        "accuracy_simulated has this noise, accuracy_clear_same_rows is without it on the same rows",
        "security": "128 bits (Concrete's default); p_error does not change it",
        "calibration": f"{len(calibration)} training rows and those that drive an accumulator to its ends",
        "plain way": f"{paths[-1].stem}, n_bits only, {PLAIN_CALIBRATION_ROWS} training rows as calibration",
        "times_cheaper_than_plain": "complexity of the plain way at its cheapest bit width within "
        f"{100 * MAX_LOSS:g} point of its best validation accuracy, divided by this complexity",
        "on_front": "no configuration of this run that costs as much or less has a better validation accuracy",
        **{f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()},
        "times": "seconds; *_seconds: median of one sample, after one run that warms up; fhe_time: sum over num_items",
    }
    rows: list[dict[str, Any]] = []
    predictions: list[pd.DataFrame] = []
    picture, summary_path = args.workdir / "fhe_frontier.png", args.workdir / "fhe_summary.xlsx"
    for earlier in (picture, summary_path):
        earlier.unlink(missing_ok=True)  # an earlier run's would belie this one
    with tqdm(total=sum(c.status == "ok" for c in configurations) * samples, desc="encrypted", unit="sample") as bar:
        for c in configurations:
            new_rows, new_predictions = run_configuration(c, drawn, data, setting, args.max_seconds, bar)
            rows += new_rows
            predictions += new_predictions
            for b in batches:
                tables = [table for table in predictions if table["batch"].iloc[0] == b]
                mine = [row for row in rows if row["batch"] == b]
                write_results(args.workdir / f"results_batch_{b}.xlsx", mine, tables, settings)
    summary = summarize(pd.DataFrame(rows), predictions, plain)
    sheets = {
        "summary": summary,
        "plain way": plain,
        "settings": pd.DataFrame(settings.items(), columns=["setting", "value"]),
    }
    write_workbook(summary_path, sheets)
    written = [f"results_batch_{b}.xlsx" for b in batches] + [summary_path.name]
    if summary["complexity"].notna().any():
        plot_frontier(summary, others, picture)
        written.append(picture.name)
    columns = [
        "model_name",
        "q_bits",
        "rounding_bits",
        "complexity",
        "times_cheaper_than_plain",
        "accuracy_clear_test_set",
    ]
    columns += ["accuracy_simulated", "run_seconds", "accuracy_fhe", "on_front", "status"]
    shown = summary[[name for name in columns if name in summary]]
    print(f"\n{shown.to_string(index=False, float_format='{:.4g}'.format)}\n")
    print(f"wrote {', '.join(written)} to {args.workdir}")


if __name__ == "__main__":
    run(main)
