"""What this pipeline gives against what else a user could pick, measured in one run on the same arrays.

Measured are the configurations on the front of the last run of step 5, default PTQ (the best float network of step 3
with n_bits only), Concrete ML's own models and an MLP with square activation under CKKS (TenSEAL). Accuracy is that of
the quantized model on the whole test set; seconds are encrypted, one beat at a time.

Reads   what steps 1 to 5 wrote to --workdir, and the arrays in --data-dir
Writes  its rows to fhe_results.sqlite in --workdir, and fhe_summary.xlsx (sheet "comparison") and fhe_frontier.png anew
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
from fhe_mlp import circuit, cli, ec57, networks, report  # noqa: E402
from fhe_mlp.configuration import DEFAULT_PTQ, Configuration, load_configuration  # noqa: E402
from fhe_mlp.store import Store  # noqa: E402

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


def run_circuit(compiled: Any, quantize: Callable, decide: Callable, speed: Row, data: Row, threshold: float) -> Row:
    """Cost of a circuit, and its times where it fits the budget; `decide` maps decrypted integers to one number."""
    row = {"complexity": compiled.complexity, "pbs": compiled.programmable_bootstrap_count}
    predicted = compiled.complexity * speed["seconds_per_unit"]
    memory = circuit.key_bytes(compiled) * circuit.MEMORY_PER_KEY_BYTE
    if predicted > BUDGET_SECONDS or memory > speed["memory"]:
        return {**row, "note": f"not run: {predicted:.0f} s a beat predicted, keys need {memory / 1e9:.1f} GB"}
    started = time.perf_counter()
    compiled.keygen(force=True)
    row["keygen_time"] = time.perf_counter() - started
    return row | timed(
        lambda x: decide(compiled.encrypt_run_decrypt(quantize(x[None].astype(np.float64)))), *data["drawn"], threshold
    )


def measured(configuration: Configuration, name: dict[str, str], data: Row, speed: Row, simulated: np.ndarray) -> Row:
    """Accuracies, cost and times of one configuration of step 5; simulated: indices of test rows."""
    facts, module = circuit.cost(configuration)
    if module is None:
        return {**name, "note": f"does not compile: {facts['reason']}"}
    found = circuit.accuracies(module, configuration, data, simulated)
    row = {
        **name,
        "balanced_accuracy": found["balanced_accuracy_test_set"],
        "accuracy_simulated": found.get("accuracy_simulated"),
    }
    row["balanced_accuracy_validation"] = found["balanced_accuracy_validation"]

    def decide(quantized: np.ndarray) -> float:
        return module.dequantize_output(quantized).ravel()[0]

    threshold = configuration.setting.threshold
    return row | run_circuit(module.fhe_circuit, module.quantize_input, decide, speed, data, threshold)


def pipeline(
    workdir: Path, summary: pd.DataFrame, experiment: step5.Experiment, data: Row, speed: Row
) -> Iterator[Row]:
    """The front of the last run of step 5, compiled and run anew, simulated on the whole test set."""
    everything = np.arange(len(data["test"][1]))
    for _, chosen in summary[summary["on_front"]].drop_duplicates(["model_name", "q_bits"]).iterrows():
        path, bits = workdir / f"{chosen['model_name']}.onnx", int(chosen["q_bits"])
        one = load_configuration(path, bits, experiment.setting, data, experiment.calibration, experiment.basis)
        name = f"{path.stem.split('_acc')[0].removeprefix('pruned_model_')}, {bits} bits"
        yield measured(one, {"name": name, "kind": report.OURS}, data, speed, everything)


def default_ptq(path: Path, compared: int, experiment: step5.Experiment, data: Row, speed: Row) -> Iterator[Row]:
    """The float network in `path` with n_bits only, at every bit width; compared: the one that step 5 compares with."""
    few = experiment.calibration[: step5.DEFAULT_PTQ_ROWS]
    for bits in step5.DEFAULT_PTQ_BITS:
        one = load_configuration(path, bits, DEFAULT_PTQ, data, few, experiment.basis)
        name = {"name": f"default PTQ, {bits} bits", "kind": "default PTQ", "model_name": path.stem, "q_bits": bits}
        yield {**measured(one, name, data, speed, np.array([], dtype=int)), "compared": bits == compared}


def concrete_ml_models(data: Row, speed: Row, seed: int) -> Iterator[Row]:
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
        row = {"name": name, "kind": "Concrete ML models"}
        row["balanced_accuracy"] = ec57.balanced_accuracy(model.predict(X_test), y_test)
        row["balanced_accuracy_validation"] = ec57.balanced_accuracy(model.predict(data["val"][0]), data["val"][1])

        def decide(q: np.ndarray, model: Any = model) -> float:
            score = np.asarray(model.post_processing(model.dequantize_output(q))).ravel()
            return float(score[-1])

        yield row | run_circuit(model.fhe_circuit, model.quantize_input, decide, speed, data, 0.5)


def ckks(data: Row, seed: int) -> Iterator[Row]:
    """An MLP of 64 hidden neurons with square activations under CKKS, ring 8192, one beat at a time."""
    import tenseal
    import tensorflow as tf

    tf_keras = networks.start_tensorflow(seed)
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Input((data["test"][0].shape[1],)),
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

    row = {"name": "TenSEAL CKKS, square 64", "kind": "CKKS"}
    row["balanced_accuracy"] = networks.balanced_accuracy(model, *data["test"])
    row["balanced_accuracy_validation"] = networks.balanced_accuracy(model, *data["val"])
    yield row | timed(run, *data["drawn"], 0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, one after the other, write it to the database and print one table."""
    import psutil

    args = step5.parse_arguments(argv)
    cli.check_writable(args.workdir)
    experiment, paths = step5.describe(args), step5.chosen_networks(args)
    data: Row = dict(experiment.data)
    X, y = data["test"]
    drawn = np.sort(experiment.order[:SAMPLES])
    data["drawn"] = (X[drawn], y[drawn])
    with Store(args.workdir / step5.DATABASE) as store, warnings.catch_warnings(), tqdm(desc="models") as bar:
        warnings.simplefilter("ignore")  # scikit-learn's and skorch's own deprecations
        shown = step5.report_for(args, experiment, paths, store)
        rows, known = store.results(shown.known), store.comparison(shown.basis)
        if not len(rows) or "compared" not in known:
            raise cli.InputError(f"{store.path}: holds no finished run; make one with: python fhe_experiments.py")
        compared = known.loc[known["compared"].eq(True), "q_bits"].max()
        summary = report.summarize(rows, store.predictions(shown.known), float("nan"))
        speed = {"seconds_per_unit": circuit.measure_speed(experiment.setting, args.seed).unit}
        speed["memory"] = psutil.virtual_memory().available
        reference = step5.reference_network(args.workdir, paths)
        for source in (
            pipeline(args.workdir, summary, experiment, data, speed),
            default_ptq(reference, compared, experiment, data, speed),
            concrete_ml_models(data, speed, args.seed),
            ckks(data, args.seed),
        ):
            for row in source:
                store.compare(shown.basis, row)
                bar.set_postfix_str(row["name"])
                bar.update()
        shown.write([])
        table = store.comparison(shown.basis).reindex(columns=report.COMPARISON_COLUMNS)
    table = table.drop(columns=["kind", "model_name", "q_bits", "compared"])
    print(f"\n{table.to_string(index=False, float_format='{:.4g}'.format, na_rep='')}")


if __name__ == "__main__":
    cli.run_in_child(main, "what is measured is saved; rerun the command for the rest", lambda: None)
