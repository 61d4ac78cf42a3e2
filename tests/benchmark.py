"""What this pipeline gives against what else a user could pick, measured in one run on the same arrays.

Measured are the configurations on the front of the last run of step 5, quantized ReLUs in place of their tables,
default PTQ (the best float network of those kept by step 3, with n_bits only), Concrete ML's own models, linear
networks on public maps of the features (no bootstrap; steps 1 to 5 make them with --expand) and an MLP with square
activation under CKKS (TenSEAL). Accuracy is that of the quantized model on the whole test set; seconds are encrypted,
one beat at a time, with all that the client does; where beats are packed, beats a second are given instead. Bytes are
those of one beat, without keys. Rivals are trained on the draws and with the noise of step 1.

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

import dynamic_pruning_eval as step3  # noqa: E402
import fhe_experiments as step5  # noqa: E402
import h5_onnx_converter as step4  # noqa: E402
import MLP_model_0 as step1  # noqa: E402
from fhe_mlp import candidates, circuit, cli, ec57, expansion, networks, report  # noqa: E402
from fhe_mlp.arrays import CLIP_SD, rows_of, training_probability  # noqa: E402
from fhe_mlp.configuration import (  # noqa: E402
    DEFAULT_PTQ,
    Configuration,
    calibration_rows,
    encrypted_part,
    load_configuration,
)
from fhe_mlp.graphs import to_onnx  # noqa: E402
from fhe_mlp.packed import PackedNetwork  # noqa: E402
from fhe_mlp.qat import ReluEnsemble  # noqa: E402
from fhe_mlp.quantized import BITS  # noqa: E402
from fhe_mlp.store import Store  # noqa: E402

SAMPLES = 1000  # encrypted beats of each model at most, which the fast ones reach
FEWEST_SAMPLES = 10  # of a model that takes longer than SAMPLING_SECONDS
SAMPLING_SECONDS = 30.0
BUDGET_SECONDS = 10.0  # predicted for a beat, above which a model is not run encrypted
MAPS = ("products", "fourier:512", "fourier:2048")  # public ones, of the linear networks
RELU_NEURONS = 20  # of the network of quantized ReLUs, or as near as step 3 has kept one; fewer lose more
RELU_FORM = {"bits": (6,) * step3.TRIALS, "rounding_bits": 5, "p_error": 2.0**-13}  # what did best with ReLUs
CKKS_EPOCHS = 60
CKKS_BATCH = 4096  # beats: the slots of a ciphertext with ring 8192
NOTHING = "nothing"  # that a client computes besides scaling, encryption, decryption and the sign of the answer

Row = dict[str, Any]


def timed(run: Callable[[np.ndarray], float], data: Row, clear: np.ndarray, threshold: float) -> Row:
    """Median and interquartile range of seconds of `run` on each drawn row after one that warms up, and decisions.

    clear: cleartext decisions (rows,) of the drawn rows. Slow models stop after SAMPLING_SECONDS.
    """
    rows, labels = data["drawn"]
    run(rows[0])
    seconds: list[float] = []
    decisions = []
    for row in rows:
        started = time.perf_counter()
        decisions.append(run(row) > threshold)
        seconds.append(time.perf_counter() - started)
        if len(seconds) >= FEWEST_SAMPLES and sum(seconds) > SAMPLING_SECONDS:
            break
    lower, median, upper = np.percentile(seconds, [25, 50, 75])
    return {"seconds": median, "seconds_iqr": upper - lower, **agreement(np.array(decisions), clear, labels)}


def agreement(decisions: np.ndarray, clear: np.ndarray, labels: np.ndarray) -> Row:
    """How many encrypted decisions (n,) there are, are right and equal the cleartext ones (n or more rows)."""
    n = len(decisions)
    return {
        "n": n,
        "right": int(np.sum(decisions == labels[:n])),
        "decisions_equal_clear": int(np.sum(decisions == clear[:n])),
    }


def traffic(sent: Any, returned: Any, beats: int = 1) -> Row:
    """Kilobytes of a beat that travel; sent, returned: ciphertexts of `beats` beats."""
    down = sum(len(part.serialize()) for part in circuit.parts_of(returned))
    return {"up_kB": len(sent.serialize()) / beats / 1e3, "down_kB": down / beats / 1e3}


def run_circuit(
    compiled: Any, quantize: Callable, decide: Callable, clear: np.ndarray, speed: Row, data: Row, threshold: float
) -> Row:
    """Cost of a circuit, and its times where it fits the budget; `decide` maps decrypted integers to one number.

    clear: cleartext decisions of the drawn rows.
    """
    row = {"complexity": compiled.complexity, "pbs": compiled.programmable_bootstrap_count}
    predicted = compiled.complexity * speed["seconds_per_unit"]
    memory = circuit.key_bytes(compiled) * circuit.MEMORY_PER_KEY_BYTE
    if predicted > BUDGET_SECONDS or memory > speed["memory"]:
        return {**row, "note": f"not run: {predicted:.0f} s a beat predicted, keys need {memory / 1e9:.1f} GB"}
    started = time.perf_counter()
    compiled.keygen(force=True)
    row["keygen_time"] = time.perf_counter() - started

    def encrypt(x: np.ndarray) -> Any:
        return compiled.encrypt(quantize(x[None].astype(np.float64)))

    sent = encrypt(data["drawn"][0][0])
    row |= traffic(sent, compiled.run(sent))

    def answer(x: np.ndarray) -> float:
        return decide(*circuit.parts_of(compiled.decrypt(*circuit.parts_of(compiled.run(encrypt(x))))))

    return row | timed(answer, data, clear, threshold)


def measured(configuration: Configuration, name: dict[str, str], data: Row, speed: Row) -> Row:
    """Accuracies, cost and times of one configuration of step 5."""
    facts, module = circuit.cost(configuration)
    if module is None:
        return {**name, "note": f"does not compile: {facts['reason']}"}
    found = circuit.accuracies(module, configuration, data, np.array([], dtype=int))
    row = {
        **name,
        "balanced_accuracy": found["balanced_accuracy_test_set"],
        "accuracy_simulated": found.get("noisy_balanced_accuracy_test_set"),
    }
    row["balanced_accuracy_validation"] = found["balanced_accuracy_validation"]
    row["client_computes"] = NOTHING

    def decide(*quantized: np.ndarray) -> float:
        return circuit.total(module.dequantize_output(*quantized))[0]

    threshold = configuration.setting.threshold
    clear = circuit.outputs(module, data["drawn"][0], "disable") > threshold
    return row | run_circuit(module.fhe_circuit, module.quantize_input, decide, clear, speed, data, threshold)


def pipeline(
    workdir: Path, summary: pd.DataFrame, experiment: step5.Experiment, data: Row, speed: Row
) -> Iterator[Row]:
    """The front of the last run of step 5, compiled and run anew."""
    for _, chosen in summary[summary["on_front"]].drop_duplicates(["model_name", "q_bits"]).iterrows():
        path, bits = workdir / f"{chosen['model_name']}.onnx", int(chosen["q_bits"])
        one = experiment.configuration(path, bits)
        name = f"{path.stem.split('_acc')[0].removeprefix('pruned_model_')}, {bits} bits"
        yield measured(one, {"name": name, "kind": report.OURS}, data, speed)


def quantized_relus(workdir: Path, experiment: step5.Experiment, data: Row, speed: Row, seed: int) -> Iterator[Row]:
    """A float network of step 3 as `dynamic_pruning_eval.py --activation relu` quantizes it."""
    networks.start_tensorflow(seed)
    kept = [networks.load_mlp(p, "python dynamic_pruning_eval.py") for p in networks.by_rank(workdir, ".h5")]
    if not kept:
        raise cli.InputError(f"{workdir}: no pruned_model_top_*.h5; make them with: python dynamic_pruning_eval.py")
    widths = [sum(len(bias) for _, bias in networks.dense_layers(model)[:-1]) for model in kept]
    nearest = min(range(len(kept)), key=lambda number: abs(widths[number] - RELU_NEURONS))
    X, name = data["train"][0], f"{widths[nearest]} ReLU neurons, {RELU_FORM['bits'][0]} bits"
    form = (data["teacher"], data["probability"], data["noise"], step3.QUANTIZATION_EPOCHS, seed)
    found = candidates.Lesson(experiment.data, *form).train(
        ReluEnsemble(networks.dense_layers(kept[nearest]), **RELU_FORM, X=X), 0, name
    )
    network = found.loc[found["chosen"], "network"].item()
    graph = encrypted_part(to_onnx(network, step4.OPSET)).SerializeToString()
    rounding_bits, p_error, rows = network.rounding_bits, network.p_error, calibration_rows(network, X)
    one = Configuration(name, network.bits, graph, rounding_bits, p_error, True, experiment.setting, rows, {})
    yield measured(one, {"name": name, "kind": "quantized ReLUs"}, data, speed)


def default_ptq(path: Path, compared: int, experiment: step5.Experiment, data: Row, speed: Row) -> Iterator[Row]:
    """The float network in `path` with n_bits only, at every bit width; compared: the one that step 5 compares with."""
    few = experiment.calibration[: step5.DEFAULT_PTQ_ROWS]
    for bits in step5.DEFAULT_PTQ_BITS:
        one = load_configuration(path, bits, DEFAULT_PTQ, data, few, experiment.basis)
        name = {"name": f"default PTQ, {bits} bits", "kind": "default PTQ", "model_name": path.stem, "q_bits": bits}
        yield {**measured(one, name, data, speed), "compared": bits == compared}


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
    (X, y), (X_test, y_test), probability = noisy(data, seed), data["test"], data["probability"]
    drawn = np.random.default_rng(seed).choice(len(X), len(X), p=probability)
    for name, make in models.items():
        model = make()
        if isinstance(model, NeuralNetClassifier):  # takes no weights
            model.fit(X[drawn], y[drawn])
        else:
            model.fit(X, y, sample_weight=probability * len(X))
        model.compile(X[drawn[: step5.CALIBRATION_ROWS]])
        row = {"name": name, "kind": "Concrete ML models"}
        row["balanced_accuracy"] = ec57.balanced_accuracy(model.predict(X_test), y_test)
        row["balanced_accuracy_validation"] = ec57.balanced_accuracy(model.predict(data["val"][0]), data["val"][1])
        row["client_computes"] = "the sum of the trees" if hasattr(model, "n_estimators") else NOTHING

        def decide(q: np.ndarray, model: Any = model) -> float:
            score = np.asarray(model.post_processing(model.dequantize_output(q))).ravel()
            return float(score[-1])

        clear = model.predict(data["drawn"][0])
        yield row | run_circuit(model.fhe_circuit, model.quantize_input, decide, clear, speed, data, 0.5)


def noisy(data: Row, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training part, its features with the noise that Concrete ML's models are trained with."""
    X, y = data["train"]
    return X + data["noise"] * np.random.default_rng(seed).standard_normal(X.shape, dtype=np.float32), y


def packed_linear(data: Row, seed: int) -> Iterator[Row]:
    """What steps 3 to 5 make of no neurons on each public map, with the baseline's decisions as teacher."""
    for spec in MAPS:
        mapped: Row = {
            split: (expansion.expand_scaled(data[split][0], spec, CLIP_SD), data[split][1])
            for split in ("train", "val", "test")
        }
        layers = candidates.fit_linear(mapped, data["probability"], data["noise"], seed, data["penalties"])
        form = {"bits": BITS[-1:], "rounding_bits": step3.ROUNDING_BITS, "p_error": step3.P_ERROR}
        epochs = step3.QUANTIZATION_EPOCHS
        lesson = candidates.Lesson(mapped, data["teacher"], data["probability"], data["noise"], epochs, seed)
        found = candidates.quantize_linear(layers, {**form, "X": mapped["train"][0]}, lesson, 100, spec)
        best = found[found["chosen"]].iloc[0]
        module = PackedNetwork(best["network"])
        keygen_time = circuit.make_keys(module)

        def run(x: np.ndarray, spec: str = spec, module: PackedNetwork = module) -> float:
            return circuit.run_encrypted(module, expansion.expand_scaled(x[None], spec, CLIP_SD)[0])["output_fhe"]

        drawn = expansion.expand_scaled(data["drawn"][0], spec, CLIP_SD)
        sizes = circuit.run_encrypted(module, drawn[0])
        yield {
            "name": f"linear on {spec}, packed",
            "kind": "linear on a public map",
            "balanced_accuracy": best["test_balanced_accuracy"],
            "balanced_accuracy_validation": best["val_balanced_accuracy"],
            "pbs": 0,
            "keygen_time": keygen_time,
            "client_computes": f"a public map to {drawn.shape[1]} numbers",
            "up_kB": sizes["input_bytes"] / 1e3,
            "down_kB": sizes["output_bytes"] / 1e3,
            **timed(run, data, module.outputs(drawn) > 0, 0.0),
        }


def ckks(data: Row, seed: int) -> Iterator[Row]:
    """An MLP of 64 hidden neurons with square activations under CKKS, ring 8192: one beat at a time, then packed."""
    import tenseal
    import tensorflow as tf

    tf_keras = networks.start_tensorflow(seed)
    (X, y), (X_val, y_val), (X_test, y_test) = (data[split] for split in ("train", "val", "test"))
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Input((X.shape[1],)),
            tf_keras.layers.GaussianNoise(data["noise"]),
            tf_keras.layers.Dense(64, tf.square),
            tf_keras.layers.Dense(1, "sigmoid"),
        ]
    )
    model.compile(tf_keras.optimizers.Adam(1e-3), "binary_crossentropy", weighted_metrics=[])
    best = tf_keras.callbacks.EarlyStopping("val_loss", patience=CKKS_EPOCHS, restore_best_weights=True)
    model.fit(
        networks.training_draws(X, y, data["probability"], 64, seed),
        epochs=CKKS_EPOCHS,
        verbose=0,
        validation_data=(X_val, y_val, networks.balanced_weights(y_val)),
        callbacks=[best],
    )
    (w0, b0), (w1, b1) = (layer.get_weights() for layer in model.layers if layer.get_weights())
    started = time.perf_counter()
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 30, 30, 30, 40])
    context.global_scale = 2**30
    context.generate_galois_keys()
    keygen_time = time.perf_counter() - started
    common = {
        "kind": "CKKS",
        "balanced_accuracy": networks.balanced_accuracy(model, X_test, y_test),
        "balanced_accuracy_validation": networks.balanced_accuracy(model, X_val, y_val),
        "keygen_time": keygen_time,
        "client_computes": NOTHING,
    }

    def encrypt(x: np.ndarray) -> Any:
        return tenseal.ckks_vector(context, x.tolist())

    def evaluate(sent: Any) -> Any:
        return sent.mm(w0.tolist()).add(b0.tolist()).square().mm(w1.tolist()).add(b1.tolist())

    sent = encrypt(X_test[0])
    clear = networks.decisions(model, data["drawn"][0])
    yield {
        "name": "TenSEAL CKKS, square 64",
        **common,
        **traffic(sent, evaluate(sent)),
        **timed(lambda x: evaluate(encrypt(x)).decrypt()[0], data, clear, 0.0),
    }

    def plain(array: np.ndarray) -> Any:
        return tenseal.plain_tensor(array.ravel().tolist(), list(array.shape))

    rows = np.arange(CKKS_BATCH) % len(X_test)  # few test rows fill the slots several times
    started = time.perf_counter()
    sent = tenseal.ckks_tensor(context, plain(X_test[rows]), batch=True).reshape([1, X.shape[1]])
    hidden = sent.mm(plain(w0)).add(plain(b0[None])).square()
    answer = hidden.mm(plain(w1)).add(plain(b1[None]))
    logits = np.array(answer.decrypt().tolist()).ravel()
    seconds = time.perf_counter() - started
    yield {
        "name": f"TenSEAL CKKS, square 64, {CKKS_BATCH} beats packed",
        **common,
        "beats_per_second": CKKS_BATCH / seconds,
        **traffic(sent, answer, CKKS_BATCH),
        **agreement(logits > 0, networks.decisions(model, X_test[rows]), y_test[rows]),
        "note": f"the batch takes {seconds:.2f} s",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, one after the other, write it to the database and print one table."""
    import psutil

    args = step5.parse_arguments(argv)
    cli.check_writable(args.workdir)
    experiment, paths = step5.describe(args), step5.chosen_networks(args)
    data: Row = dict(experiment.data)
    X, y = data["test"]
    drawn = experiment.order[:SAMPLES]  # stratified, and so is every beginning of it
    data["drawn"] = (X[drawn], y[drawn])
    data["probability"] = training_probability(rows_of(args.data_dir, experiment.data)[0])
    baseline = networks.load_mlp(args.workdir / "MLP_model_0.h5", "python MLP_model_0.py", X.shape[1])
    data["teacher"] = baseline(data["train"][0]).numpy()[:, 0]
    unseen = experiment.patients == "unseen patients"
    data["penalties"] = (candidates.PENALTY_UNSEEN,) if unseen else candidates.PENALTIES
    data["noise"] = step1.NOISE_UNSEEN if unseen else step1.NOISE
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
            quantized_relus(args.workdir, experiment, data, speed, args.seed),
            packed_linear(data, args.seed),
            ckks(data, args.seed),
            concrete_ml_models(data, speed, args.seed),
            default_ptq(reference, compared, experiment, data, speed),  # last, for its circuits take minutes
        ):
            for row in source:
                store.compare(shown.basis, row)
                bar.set_postfix_str(row["name"])
                bar.update()
        shown.write([])
        table = store.comparison(shown.basis).reindex(columns=report.COMPARISON_COLUMNS)
    table = table.drop(columns=["kind", "model_name", "q_bits", "compared"])
    print(f"\n{table.to_string(index=False, float_format='{:.4g}'.format, na_rep='')}")
    machine = cli.machine_facts()
    print("\nseconds on {processor}, {cores} cores, {instruction_set}".format(**machine))


if __name__ == "__main__":
    cli.run_in_child(main, "what is measured is saved; rerun the command for the rest", lambda: None)
