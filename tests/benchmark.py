"""What this pipeline gives against what else a user could pick, measured in one run on the same arrays.

Measured are the configurations on the front of fhe_summary.xlsx (python fhe_experiments.py makes it), the plain way
(the best float network of step 3 with n_bits only), Concrete ML's own models and, where TenSEAL is installed, an MLP
with square activation under CKKS. Accuracy is that of the quantized model on the whole test set; seconds are encrypted,
one beat at a time.

Reads   what steps 1 to 5 left in --workdir, and the arrays in --data-dir
Writes  benchmark.xlsx to --workdir, and fhe_frontier.png again, now with these models
Run     make bench
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fhe_experiments as step5  # noqa: E402
import preprocess_mitbih as pre  # noqa: E402
from fhe_mlp import circuit, common, experiment, networks, plan, results  # noqa: E402

SAMPLES = 10  # encrypted beats of each model
BUDGET_SECONDS = 10.0  # predicted for a beat, above which a model is not run encrypted
CKKS_EPOCHS = 60

Row = dict[str, Any]


def timed(run: Callable[[np.ndarray], float], rows: np.ndarray, labels: np.ndarray, threshold: float) -> Row:
    """Median and interquartile range of seconds of `run` on each row after one that warms up, and right decisions."""
    run(rows[0])
    seconds, right = [], 0
    for row, label in zip(rows, labels):
        started = time.perf_counter()
        output = run(row)
        seconds.append(time.perf_counter() - started)
        right += int((output > threshold) == label)
    lower, median, upper = np.percentile(seconds, [25, 50, 75])
    return {"seconds": median, "seconds_iqr": upper - lower, "n": len(rows), "right": right}


def run_circuit(compiled: Any, quantize: Callable, decide: Callable, cost: Row, data: Row, threshold: float) -> Row:
    """Price of a circuit, and its times where it fits the budget; `decide` maps decrypted integers to one number."""
    row = {"complexity": compiled.complexity, "pbs": compiled.programmable_bootstrap_count}
    predicted = compiled.complexity * cost["seconds_per_unit"]
    memory = circuit.key_bytes(compiled) * experiment.MEMORY_PER_KEY_BYTE
    if predicted > BUDGET_SECONDS or memory > cost["memory"]:
        return {**row, "note": f"not run: {predicted:.0f} s a beat predicted, keys need {memory / 1e9:.1f} GB"}
    started = time.perf_counter()
    compiled.keygen(force=True)
    row["keygen_time"] = time.perf_counter() - started
    return row | timed(
        lambda x: decide(compiled.encrypt_run_decrypt(quantize(x[None].astype(np.float64)))), *data["drawn"], threshold
    )


def measured(job: experiment.Job, name: str, kind: str, data: Row, cost: Row, simulated: np.ndarray) -> Row:
    """Accuracies, price and times of one configuration of step 5; simulated: indices of test rows."""
    row = {"name": name, "kind": kind}
    facts, module = experiment.price(job)
    if module is None:
        return row | {"note": f"does not compile: {facts['reason']}"}
    found = experiment.accuracies(module, job, data, simulated)
    row |= {"accuracy": found["accuracy_clear_test_set"], "accuracy_validation": found["accuracy_clear_validation"]}
    row |= {"accuracy_simulated": found.get("accuracy_simulated")}

    def decide(quantized: np.ndarray) -> float:
        return module.dequantize_output(quantized).ravel()[0]

    return row | run_circuit(module.fhe_circuit, module.quantize_input, decide, cost, data, job.setting.threshold)


def pipeline(workdir: Path, data: Row, cost: Row, calibration: np.ndarray) -> Iterator[Row]:
    """The front of the last run of step 5, compiled and run anew, simulated on the whole test set."""
    summary = pd.read_excel(workdir / "fhe_summary.xlsx").drop_duplicates(["model_name", "q_bits"])
    setting = circuit.Setting(step5.ROUNDING_BITS, step5.P_ERROR, 0.0)
    everything = np.arange(len(data["test"][1]))
    for _, chosen in summary[summary["on_front"]].iterrows():
        path, bits = workdir / f"{chosen['model_name']}.onnx", int(chosen["q_bits"])
        job = experiment.make_job(path, bits, setting, data, calibration, {})
        name = f"{path.stem.split('_acc')[0].removeprefix('pruned_model_')}, {bits} bits"
        yield measured(job, name, "this pipeline", data, cost, everything)


def plain_way(workdir: Path, data: Row, cost: Row, calibration: np.ndarray) -> Iterator[Row]:
    """The most accurate float network of step 3 with n_bits only, ten rows of calibration, the sigmoid encrypted."""
    path = plan.most_accurate(networks.by_rank(workdir, ".onnx"), data)
    few = calibration[: step5.PLAIN_CALIBRATION_ROWS]
    for bits in step5.PLAIN_BITS:
        job = experiment.make_job(path, bits, circuit.PLAIN, data, few, {})
        yield measured(job, f"plain {bits} bits", "plain way", data, cost, np.array([], dtype=int))


def concrete_ml_models(data: Row, cost: Row, seed: int) -> Iterator[Row]:
    """The library's own models, trained on the training part, at its settings or those that did best elsewhere."""
    from concrete.ml.sklearn import DecisionTreeClassifier, LogisticRegression, NeuralNetClassifier, XGBClassifier
    from torch import manual_seed

    def neural(layers: int, bits: int) -> Any:
        manual_seed(seed)
        return NeuralNetClassifier(
            module__n_layers=layers + 1,
            module__n_w_bits=bits,
            module__n_a_bits=bits,
            module__n_hidden_neurons_multiplier=2,
            max_epochs=30,
            batch_size=64,
            lr=1e-3,
            verbose=0,
        )

    models = {
        "logistic regression, 8 bits": lambda: LogisticRegression(n_bits=8),
        "neural net, 2 hidden, w2 a2": lambda: neural(2, 2),
        "neural net, 2 hidden, w3 a3": lambda: neural(2, 3),
        "neural net, 3 hidden, w3 a3": lambda: neural(3, 3),
        "decision tree, 6 bits, depth 8": lambda: DecisionTreeClassifier(n_bits=6, max_depth=8, random_state=seed),
        "XGBoost, 4 bits, 20 trees, depth 3": lambda: XGBClassifier(
            n_bits=4, n_estimators=20, max_depth=3, random_state=seed
        ),
        "XGBoost, 6 bits, 50 trees, depth 4": lambda: XGBClassifier(
            n_bits=6, n_estimators=50, max_depth=4, random_state=seed
        ),
    }
    (X, y), (X_test, y_test) = data["train"], data["test"]
    for name, make in models.items():
        model = make()
        model.fit(X, y)
        model.compile(X[: step5.CALIBRATION_ROWS])
        row = {"name": name, "kind": "Concrete ML's models"}
        row["accuracy"] = float(np.mean(model.predict(X_test) == y_test))
        row["accuracy_validation"] = float(np.mean(model.predict(data["val"][0]) == data["val"][1]))

        def decide(q: np.ndarray, model: Any = model) -> float:
            score = np.asarray(model.post_processing(model.dequantize_output(q))).ravel()
            return float(score[-1])

        yield row | run_circuit(model.fhe_circuit, model.quantize_input, decide, cost, data, 0.5)


def ckks(data: Row, seed: int) -> Iterator[Row]:
    """32-64-1 with square activations under CKKS, ring 8192, one beat at a time; nothing where TenSEAL is missing."""
    try:
        import tenseal
    except ImportError:
        return
    import tensorflow as tf

    tf_keras = networks.start_tensorflow(seed)
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Input((len(pre.FEATURES),)),
            tf_keras.layers.Dense(64, tf.square),
            tf_keras.layers.Dense(1, "sigmoid"),
        ]
    )
    model.compile(tf_keras.optimizers.Adam(1e-3), "binary_crossentropy")
    best = tf_keras.callbacks.EarlyStopping("val_loss", patience=CKKS_EPOCHS, restore_best_weights=True)
    model.fit(
        *data["train"], batch_size=64, epochs=CKKS_EPOCHS, verbose=0, validation_data=data["val"], callbacks=[best]
    )
    (w0, b0), (w1, b1) = (layer.get_weights() for layer in model.layers)
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 30, 30, 30, 40])
    context.global_scale = 2**30
    context.generate_galois_keys()

    def run(x: np.ndarray) -> float:
        hidden = tenseal.ckks_vector(context, x.tolist()).mm(w0.tolist()).add(b0.tolist())
        return hidden.square().mm(w1.tolist()).add(b1.tolist()).decrypt()[0]

    row = {"name": "TenSEAL CKKS, square 32-64-1", "kind": "CKKS", "accuracy": networks.accuracy(model, *data["test"])}
    row["accuracy_validation"] = networks.accuracy(model, *data["val"])
    yield row | timed(run, *data["drawn"], 0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, one after the other, and print one table."""
    args = common.make_parser(__doc__).parse_args(argv)
    common.check_writable(args.workdir)
    if not (args.workdir / "fhe_summary.xlsx").exists():
        raise common.InputError(f"{args.workdir}: no fhe_summary.xlsx; make it with: python fhe_experiments.py")
    import psutil

    data: Row = pre.load_arrays(args.data_dir)
    X, y = data["test"]
    drawn = np.sort(np.random.default_rng(args.seed).choice(len(y), SAMPLES, replace=False))
    data["drawn"] = (X[drawn], y[drawn])
    order = np.random.default_rng(args.seed).permutation(len(data["train"][0]))
    calibration = data["train"][0][order[: step5.CALIBRATION_ROWS]]  # as in step 5
    print("measuring this machine ...", flush=True)
    setting = circuit.Setting(step5.ROUNDING_BITS, step5.P_ERROR, 0.0)
    cost = {"seconds_per_unit": circuit.calibrate_machine(setting, args.seed).unit}
    cost["memory"] = psutil.virtual_memory().available
    rows = []
    with warnings.catch_warnings(), tqdm(desc="models", unit="model") as bar:
        warnings.simplefilter("ignore")  # scikit-learn's and skorch's own deprecations
        for source in (
            pipeline(args.workdir, data, cost, calibration),
            plain_way(args.workdir, data, cost, calibration),
            concrete_ml_models(data, cost, args.seed),
            ckks(data, args.seed),
        ):
            for row in source:
                rows.append(row)
                bar.set_postfix_str(row["name"])
                bar.update()
    columns = (
        "name kind accuracy accuracy_validation accuracy_simulated pbs complexity keygen_time seconds seconds_iqr n "
    )
    table = pd.DataFrame(rows).reindex(columns=[*columns.split(), "right", "note"])
    settings = {**common.machine_facts(), "seconds": "median of n beats, one at a time: encryption, run and decryption"}
    settings["accuracy"] = f"quantized, in clear, {len(y)} test rows; accuracy_simulated: with the noise of p_error"
    sheets = {"benchmark": table, "settings": pd.DataFrame(settings.items(), columns=["setting", "value"])}
    common.write_workbook(args.workdir / "benchmark.xlsx", sheets)
    print(f"\n{table.drop(columns='kind').to_string(index=False, float_format='{:.4g}'.format, na_rep='')}\n")
    summary, plain = (pd.read_excel(args.workdir / "fhe_summary.xlsx", sheet_name=n) for n in ("summary", "plain way"))
    results.plot_frontier(
        summary, results.other_points(plain, results.read_benchmark(args.workdir)), args.workdir / "fhe_frontier.png"
    )
    print(f"wrote benchmark.xlsx and fhe_frontier.png to {args.workdir}")


if __name__ == "__main__":
    common.run_in_child(main, "nothing is saved, run it again")
