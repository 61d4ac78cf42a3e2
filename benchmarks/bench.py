"""Measure this pipeline against what else a user could pick, in one run on the same arrays.

Measured are the configurations on the front of the last run of step 5, linear networks on public maps of the features
(without bootstraps; steps 1 to 5 make them with --expand), an MLP with square activations under CKKS, and Concrete ML's
own models. Rivals learn from the draws and with the noise of step 1. Accuracies are those of the quantized model, not
encrypted. Seconds are those of one encrypted beat with all that the client does; beats per second and kilobytes per
beat, those of a full payload.

Reads   what steps 1 to 5 wrote to --workdir, and the arrays in --data-dir
Writes  its rows to fhe_results.sqlite in --workdir; then step 5 writes fhe_summary.xlsx and fhe_frontier.png anew
Run     make bench
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fhe_mlp import cli, ecg, encrypted, networks, quantized
from fhe_mlp.dataset import Dataset, Part, load_dataset, stratified_order
from fhe_mlp.encrypted.post_training import PostTraining, Setting
from fhe_mlp.experiments import OURS, P_ERROR, ROUNDING_BITS, Results, jobs, versions
from fhe_mlp.scaling import NONE, map_features

SAMPLES = 1000  # encrypted beats of each model at most
FEWEST_SAMPLES = 10  # of a model that takes longer than SAMPLING_SECONDS
SAMPLING_SECONDS = 30.0
MOST_SECONDS = 10.0  # of a beat, above which no second one runs
MAPS = ("fourier:512", "fourier:2048")  # public ones, of the linear networks
LINEAR_EPOCHS = 30  # of their quantization-aware training, as in step 3
CALIBRATION_ROWS = 1000  # training rows from which Concrete ML takes ranges


@dataclass(frozen=True, eq=False)
class Model:
    """A model to measure."""

    name: str
    kind: str
    compiled: Any  # has cost, client, server and beats, as a Scheme of fhe_mlp/encrypted/
    logits: Callable[[np.ndarray], np.ndarray]  # cleartext ones (n,) of mapped rows (n, columns)
    map: str = NONE  # public map of the features, which the client computes
    columns: dict[str, Any] = field(default_factory=dict)  # more of its row
    alone: bool = True  # whether a beat can run without others


def measure(model: Model, data: Dataset) -> dict[str, Any]:
    """Return a model's row: accuracies, cost and, where memory allows it, encrypted runs of test rows.

    data: without a public map, its test rows in an order of which every beginning is stratified.
    """
    row = {"name": model.name, "kind": model.kind, "client_computes": "nothing", **model.columns}
    for name, part in (("balanced_accuracy", data.test), ("balanced_accuracy_validation", data.val)):
        row[name] = ecg.balanced_accuracy(model.logits(map_features(part.X, model.map)) > 0, part.y)
    if model.map != NONE:
        row["client_computes"] = f"a public map to {model.map.split(':')[1]} numbers"
    try:
        cost = model.compiled.cost()
        row |= {name: cost[name] for name in ("pbs", "complexity") if name in cost}
        refused = jobs.too_large(cost)
        return row | ({"note": refused["reason"]} if refused else run_encrypted(model, data.test))
    except encrypted.CIRCUIT_ERRORS as error:
        return {**row, "note": cli.first_line(error)}


def run_encrypted(model: Model, test: Part) -> dict[str, Any]:
    """Return seconds of keys and beats, traffic, and how many decisions are right and equal the cleartext ones.

    Beats run one at a time, then as many as fill a payload. The first unpacks the keys; its time counts if it is alone.
    """
    client, server, beats = model.compiled.client(), model.compiled.server(), model.compiled.beats
    started = time.perf_counter()
    client.make_keys()
    row = {"keygen_time": time.perf_counter() - started}
    server.load_keys(client.evaluation_keys())
    rows, decisions, seconds = [], [], []  # of the beats, and of each call

    def call(chosen: np.ndarray) -> None:
        started = time.perf_counter()
        payload = client.encrypt(map_features(test.X[chosen], model.map))
        answer = server.run(payload)
        decisions.extend(client.decrypt(answer, len(chosen)) > 0)
        seconds.append(time.perf_counter() - started)
        rows.extend(chosen)
        row.update(up_kB=len(payload) / len(chosen) / 1e3, down_kB=len(answer) / len(chosen) / 1e3)

    if model.alone:
        for number in range(min(SAMPLES, len(test.y))):
            call(np.array([number]))
            enough = number >= FEWEST_SAMPLES and sum(seconds) > SAMPLING_SECONDS
            if enough or seconds[-1] > MOST_SECONDS:
                break
        lower, row["seconds"], upper = np.percentile(seconds[1:] or seconds, [25, 50, 75])
        row |= {"seconds_iqr": upper - lower} if seconds[1:] else {"note": "one beat, with the unpacking of the keys"}
    if beats > 1:
        call(np.arange(beats) % len(test.y))  # few rows fill it several times
        row["beats_per_second"] = beats / seconds[-1]
    clear = model.logits(map_features(test.X, model.map)) > 0
    counts = {"right": np.sum(decisions == test.y[rows]), "decisions_equal_clear": np.sum(decisions == clear[rows])}
    return {**row, "n": len(rows), **counts}


def on_front(workdir: Path, data: Dataset) -> Iterator[Model]:
    """Yield step 3's networks on the front of the last run of step 5, compiled anew. Raises InputError without one."""
    path = workdir / "fhe_summary.xlsx"
    if not path.exists():
        raise cli.InputError(f"{path}: not found; make it with: python fhe_experiments.py")
    summary = pd.read_excel(path).drop_duplicates(["model_name", "q_bits"])
    for found in summary[summary["on_front"] & summary["scheme"].isin(encrypted.scheme_names())].to_dict("records"):
        stem, bits = found["model_name"], found["q_bits"]
        network = quantized.load_onnx(workdir / "quantized" / f"{stem}_{bits}bits.onnx", data.train.X.shape[1])
        compiled = encrypted.choose(network, found["scheme"])(network, data.train.X)
        columns = {name: found[name] for name in ("model_name", "q_bits", "noisy_balanced_accuracy_test_set")}
        name = f"{stem.split('_acc')[0].removeprefix('pruned_model_')}, {bits} bits"
        yield Model(name, OURS, compiled, network.logits, data.map, columns)


def packed_linear(data_dir: Path, baseline: networks.MLP, targets: np.ndarray, seed: int) -> Iterator[Model]:
    """Yield what steps 3 to 5 make of no neurons on each public map; targets: the baseline's probabilities (n,)."""
    form = quantized.Form(quantized.BITS[-1:], ROUNDING_BITS, P_ERROR)
    for spec in MAPS:
        data = load_dataset(data_dir, spec)
        mlp = quantized.fit_linear(data, baseline.noise, seed).decided_at(baseline.threshold)
        lesson = quantized.Lesson(data, targets, baseline.noise, LINEAR_EPOCHS, baseline.shift)
        candidates = quantized.quantize_linear(mlp, form, lesson, seed)
        network = candidates.loc[candidates["chosen"], "network"].item()
        compiled = encrypted.choose(network)(network, data.train.X)
        yield Model(f"linear on {spec}, packed", "linear on a public map", compiled, network.logits, spec)


def ckks_models(data: Dataset, noise: float, seed: int) -> Iterator[Model]:
    """Yield one network for a beat at a time, and for full ciphertexts."""
    import ckks

    layers = ckks.train(data, noise, seed)
    for beats, packing in ((1, ""), (ckks.SLOTS, f", {ckks.SLOTS} beats packed")):
        name, compiled = f"TenSEAL CKKS, square {ckks.NEURONS}{packing}", ckks.Ckks(layers, beats)
        yield Model(name, "CKKS", compiled, compiled.logits, alone=beats == 1)


class LibraryModel(PostTraining):
    """A compiled model of Concrete ML's own."""

    def __init__(self, model: Any) -> None:
        self.model, self.circuit, self.module = model, model.fhe_circuit, self
        self.quantize_input, self.setting = model.quantize_input, Setting(0, 0, 0.0)

    def logits(self, X: np.ndarray) -> np.ndarray:
        return self.model.predict(X) - 0.5

    def dequantize_output(self, values: np.ndarray) -> np.ndarray:
        """Return how far the probability (n, 1) of an abnormal beat is above one half."""
        probabilities = self.model.post_processing(self.model.dequantize_output(values))
        return np.reshape(probabilities, (len(values), -1))[:, -1:] - 0.5


def library_models(data: Dataset, noise: float, seed: int) -> Iterator[Model]:
    """Yield Concrete ML's own models, at its settings or at those that did best elsewhere."""
    from concrete.ml.sklearn import DecisionTreeClassifier, LogisticRegression, NeuralNetClassifier, XGBClassifier
    from torch import manual_seed

    def net(hidden: int, bits: int) -> NeuralNetClassifier:
        widths = {"module__n_w_bits": bits, "module__n_a_bits": bits, "module__n_hidden_neurons_multiplier": 2}
        training = {"max_epochs": 30, "batch_size": 64, "lr": 1e-3, "verbose": 0}
        return NeuralNetClassifier(module__n_layers=hidden + 1, **widths, **training)

    models = {
        "logistic regression, 8 bits": LogisticRegression(n_bits=8),
        "neural net, 2 hidden, w2 a2": net(2, 2),
        "neural net, 2 hidden, w3 a3": net(2, 3),
        "neural net, 3 hidden, w3 a3": net(3, 3),
        "decision tree, 6 bits, depth 8": DecisionTreeClassifier(n_bits=6, max_depth=8, random_state=seed),
        "XGBoost, 4 bits, 20 trees, depth 3": XGBClassifier(n_bits=4, n_estimators=20, max_depth=3, random_state=seed),
        "XGBoost, 6 bits, 50 trees, depth 4": XGBClassifier(n_bits=6, n_estimators=50, max_depth=4, random_state=seed),
    }
    train, rng = data.train, np.random.default_rng(seed)
    X = train.X + np.float32(noise) * rng.standard_normal(train.X.shape, np.float32)
    drawn = rng.choice(len(X), len(X), p=data.draw)
    for name, model in models.items():
        manual_seed(seed)
        if isinstance(model, NeuralNetClassifier):  # accepts no weights of rows
            model.fit(X[drawn], train.y[drawn])
        else:
            model.fit(X, train.y, sample_weight=data.draw * len(X))
        model.compile(X[drawn[:CALIBRATION_ROWS]])
        columns = {"client_computes": "the sum of the trees"} if isinstance(model, XGBClassifier) else {}
        compiled = LibraryModel(model)
        yield Model(name, "Concrete ML models", compiled, compiled.logits, columns=columns)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one model after the other, write the rows to the database, have them reported and print them."""
    args = cli.make_parser(__doc__).parse_args(argv)
    workdir, seed = args.workdir, args.seed
    cli.check_writable(workdir)
    baseline, own = networks.load_with_data(workdir / "MLP_model_0.h5", "python MLP_model_0.py", args.data_dir)
    plain = load_dataset(args.data_dir)
    ordered = replace(plain, test=plain.test.take(stratified_order(plain.test.beats, seed)))
    key = cli.digest(repr({"data_sha256": own.sha256, **versions(), "seed": seed}))  # as step 5's report finds them
    networks.start_tensorflow(seed)
    models = itertools.chain(
        on_front(workdir, own),
        packed_linear(args.data_dir, baseline, baseline.probabilities(own.train.X), seed),
        ckks_models(plain, baseline.noise, seed),
        library_models(plain, baseline.noise, seed),
    )
    with Results(workdir / "fhe_results.sqlite") as results, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's and skorch's own deprecations
        for model in tqdm(models, unit="model"):
            results.compare(key, measure(model, ordered))
        table = results.comparison(key).drop(columns=["kind", "model_name", "q_bits"])
    options = ["--data-dir", args.data_dir, "--workdir", workdir, "--seed", str(seed)]
    subprocess.run([sys.executable, cli.ROOT / "fhe_experiments.py", "--report", *options], check=True)
    print(f"\n{table.to_string(index=False, float_format='{:.4g}'.format, na_rep='')}")
    print("\nseconds on {processor}, {cores} cores, {instruction_set}".format(**cli.machine_facts()))


if __name__ == "__main__":
    cli.run_and_leave(main, "finished rows are saved; the command measures all anew")
