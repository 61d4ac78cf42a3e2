"""Step 5: quantize the best networks to 2-7 bits and classify beats in clear and encrypted (TFHE, Concrete ML).

Every configuration (network, bits) is compiled first; then the plan with the predicted times is printed, and what is
affordable runs encrypted on a seeded draw of test rows. The last sigmoid stays with the client: the encrypted graph
ends in the logit, whose sign is the decision.

Reads   pruned_model_top_*.onnx in --workdir (python h5_onnx_converter.py makes them) and the arrays in --data-dir
Writes  to --workdir: results_batch_{number}.xlsx after every configuration, fhe_accuracy_vs_seconds.png
Run     python fhe_experiments.py
        python fhe_experiments.py --reference --top 1 --bits 2 3     (the plain way: n_bits only, sigmoid encrypted)
"""

from __future__ import annotations

import argparse
import time
import warnings
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

if TYPE_CHECKING:
    import onnx
    from concrete.ml.quantization import QuantizedModule

BITS = (2, 3, 4, 5, 6, 7)  # of weights and activations, as published
TOP = 3  # best networks of step 3
BATCH_SIZE = 50  # consecutive test rows a batch, as published
SAMPLES = 10  # rows drawn from each batch, as published
CALIBRATION_ROWS = 1000  # training rows that fix the quantization ranges
CALIBRATION_NEURONS = 32  # of the layer that measures the machine; enough to keep its cores busy
SIMULATED_ROWS = 500  # test rows for the simulated accuracy; simulation takes milliseconds a row
ROUNDING_BITS = 6  # leading bits of each accumulator that the encrypted ReLU looks at; their number is the price
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

    rounding_bits: int | None
    p_error: float
    threshold: float  # output above which a beat is abnormal: 0 for a logit, 0.5 for a probability


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


def without_sigmoid(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of a network that ends in the logit: one table look-up less to encrypt, the same decisions."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    sigmoid = copy.graph.node.pop()
    copy.graph.output[0].name = sigmoid.input[0]
    return copy


def compile_network(model: onnx.ModelProto, bits: int, calibration: np.ndarray, setting: Setting) -> QuantizedModule:
    """Quantize to `bits` and compile to TFHE; calibration: training rows (n, 32)."""
    from concrete.ml.torch.compile import compile_onnx_model

    rounding = setting.rounding_bits and {"n_bits": setting.rounding_bits, "method": "APPROXIMATE"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Concrete ML's own use of deprecated NumPy and ONNX calls
        return compile_onnx_model(
            model, calibration, n_bits=bits, rounding_threshold_bits=rounding, p_error=setting.p_error
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
    network = load_network(path)
    X, y = data["test"]
    facts = {"rounding_bits": setting.rounding_bits, "p_error": setting.p_error}
    started = time.perf_counter()
    try:
        module = compile_network(
            network if setting.rounding_bits is None else without_sigmoid(network), bits, calibration, setting
        )
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
    facts["accuracy_clear_test_set"] = float(np.mean((outputs(module, X, "disable") > setting.threshold) == y))
    facts["test_set_rows"] = len(y)
    decisions = outputs(module, X[simulated], "simulate") > setting.threshold
    facts["accuracy_simulated"] = float(np.mean(decisions == y[simulated]))
    facts["simulated_rows"] = len(simulated)
    return Configuration(path, bits, facts, module)


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


def plot_results(results: pd.DataFrame, path: Path) -> None:
    """Accuracy in clear on the test set against encrypted seconds a sample, one series a network, points with bits.

    The accuracy axis is a logit scale, so that 98 % and 99 % lie as far apart as 50 % and 67 %.
    """
    import matplotlib.pyplot as plt

    done = results[results["status"] == "ok"]
    figure, axis = plt.subplots(figsize=(9, 6))
    for name, group in done.groupby("model_name", sort=False):
        group = group.groupby("q_bits").median(numeric_only=True).reset_index()
        nearly = 0.5 / group["test_set_rows"].max()  # none and all have no place on the scale
        accuracy = group["accuracy_clear_test_set"].clip(nearly, 1 - nearly)
        axis.plot(group["run_seconds"], accuracy, marker="o", label=name)
        for x, y, bits in zip(group["run_seconds"], accuracy, group["q_bits"]):
            axis.annotate(f"{bits}", (x, y), xytext=(5, 4), textcoords="offset points", fontsize=9)
    axis.set_xscale("log")
    axis.set_yscale("logit")
    axis.set_yticks([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99], minor=False)
    axis.set(
        ylim=(max(0.02, min(0.45, 0.9 * done["accuracy_clear_test_set"].min())), 0.995),
        xlabel="encrypted inference, median seconds a sample",
        ylabel="accuracy of the quantized network, whole test set",
        title="Price of encrypted inference (labels: bits of weights and activations)",
    )
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.yaxis.set_minor_formatter("")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.legend(loc="lower right")
    save_figure(figure, path)


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
    option("--rounding-bits", type=int, choices=range(2, 9), default=ROUNDING_BITS, help="accumulator bits kept")
    option("--p-error", type=float, default=P_ERROR, help="chance that one bootstrap is off by one step")
    option("--reference", action="store_true", help="no rounding, p_error 2^-40, sigmoid encrypted")
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
    for path in paths:  # all are looked at before the first takes its minutes
        load_network(path)
    if args.reference:
        setting = Setting(rounding_bits=None, p_error=2.0**-40, threshold=0.5)
    else:
        setting = Setting(args.rounding_bits, args.p_error, threshold=0.0)
    rng = np.random.default_rng(args.seed)
    calibration = data["train"][0][rng.permutation(len(data["train"][0]))[:CALIBRATION_ROWS]]
    simulated = np.sort(rng.permutation(rows_in_test)[:SIMULATED_ROWS])
    drawn = {b: drawn_rows(b, args.batch_size, args.samples, rows_in_test, args.seed) for b in batches}
    samples = sum(map(len, drawn.values()))

    print("measuring this machine ...", flush=True)
    seconds_per_unit, seconds_per_byte = calibrate_machine(setting, args.seed)
    configurations = []
    for path, bits in (bar := tqdm([(p, b) for p in paths for b in args.bits], desc="compiling", unit="circuit")):
        bar.set_postfix_str(f"{path.stem} at {bits} bits")
        c = prepare(path, bits, data, calibration, setting, simulated)
        if c.status == "ok":
            judge_affordable(c, seconds_per_unit, args.max_seconds)
        configurations.append(c)
    print_plan(configurations, samples, seconds_per_byte)

    settings = {
        **machine_facts(),
        "way": "plain reference: sigmoid encrypted" if args.reference else "logit encrypted, approximate rounding",
        "rounding_bits": setting.rounding_bits or "none",
        "p_error": setting.p_error,
        "p_error in words": f"one encrypted ReLU in {1 / setting.p_error:,.0f} may see its input off by one step",
        "security": "128 bits (Concrete's default); p_error does not change it",
        "calibration": f"{len(calibration)} training rows",
        **{f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()},
        "times": "seconds; *_seconds: median of one sample, after one run that warms up; fhe_time: sum over num_items",
    }
    rows: list[dict[str, Any]] = []
    predictions: list[pd.DataFrame] = []
    with tqdm(total=sum(c.status == "ok" for c in configurations) * samples, desc="encrypted", unit="sample") as bar:
        for c in configurations:
            new_rows, new_predictions = run_configuration(c, drawn, data, setting, args.max_seconds, bar)
            rows += new_rows
            predictions += new_predictions
            for b in batches:
                tables = [table for table in predictions if table["batch"].iloc[0] == b]
                mine = [row for row in rows if row["batch"] == b]
                write_results(args.workdir / f"results_batch_{b}.xlsx", mine, tables, settings)
    results = pd.DataFrame(rows)
    picture = args.workdir / "fhe_accuracy_vs_seconds.png"
    if predictions:
        plot_results(results, picture)
    else:
        picture.unlink(missing_ok=True)  # an earlier run's would belie this one
    columns = ["model_name", "q_bits", "status", "accuracy_clear_test_set", "accuracy_simulated"]
    columns += [name for name in ("accuracy_fhe", "run_seconds") if name in results]
    print(f"\n{results.reindex(columns=columns).to_string(index=False, float_format='{:.4g}'.format)}\n")
    written = [f"results_batch_{b}.xlsx" for b in batches] + [picture.name] * bool(predictions)
    print(f"wrote {', '.join(written)} to {args.workdir}")


if __name__ == "__main__":
    run(main)
