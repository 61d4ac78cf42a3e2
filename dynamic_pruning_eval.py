"""Step 3: remove neurons at rates from 25 % to 100 %, fine-tune, quantize, and keep the ten best networks.

Each rate starts from the last network that is at least as wide, mostly that of the rate before. The neurons with the
most zero weights are removed first, and among equals those of the least saliency: fine-tuning fills the zeros of step
2, so from the second rate on, saliency decides, while one-shot pruning (--fine-tune-epochs 0) ranks by zeros
throughout. The mean activation of a removed neuron is folded into the next layer's bias. Layers narrower than
--min-width are removed, and the others get their neurons: an encrypted neuron costs the same in any layer, and a narrow
layer passes few bits.

Then networks of as many neurons, from 26 down, are trained at 2 to 7 bits as the encrypted graph computes them, with
the baseline as their teacher: each neuron is a table that is learned, beside a linear path (--activation relu: the
float networks quantized instead, the smallest first, until ten are within --max-loss). Without neurons the network is
logistic regression, rounded or trained quantized, and needs no bootstrap. Networks within --max-loss of the baseline on
validation data (for unseen patients, with the records of the training part) are ranked by their cost, the others by
accuracy; ten are kept.

Reads   tf_pruned_model.h5 and MLP_model_0.h5 in --workdir (steps 1 and 2 make them) and the arrays in --data-dir
Writes  to --workdir: ten pruned_model_top_{rank}_prune_{percent}_acc_{validation accuracy}.h5, each with its quantized
        networks inside, dynamic_pruning_results.xlsx, dynamic_pruning_metrics.json, dynamic_pruning_accuracy.png,
        _cost.png and _latency.png
Run     python dynamic_pruning_eval.py
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp import ec57
from fhe_mlp.arrays import Arrays, Rows, load_arrays, rows_of, training_probability, unseen_patients
from fhe_mlp.candidates import (
    PENALTIES,
    PENALTY_UNSEEN,
    RANKING,
    Lesson,
    Quantized,
    fit_linear,
    lowest_cost,
    quantize_relu,
    quantize_tables,
    ranking_rows,
)
from fhe_mlp.cli import (
    check_writable,
    machine_facts,
    make_parser,
    natural_int,
    number,
    positive_float,
    positive_int,
    run,
    whole_file,
    write_json,
)
from fhe_mlp.networks import (
    balanced_accuracy,
    build,
    by_rank,
    decisions,
    dense_layers,
    epoch_rows,
    input_noise,
    load_mlp,
    logit_shift,
    mlp_bytes,
    public_map,
    shift_logit,
    start_tensorflow,
    stream,
    training_draws,
)
from fhe_mlp.neuron_removal import revive, share_neurons, shrink
from fhe_mlp.pictures import save_figure
from fhe_mlp.quantized import BITS, NOISE_DRAWS, TOLERATED_LOSS, QuantizedNetwork, add_to_h5
from fhe_mlp.report import settings_sheet, write_workbook

if TYPE_CHECKING:
    import tf_keras

RATES = (*range(25, 91, 5), 92, *range(94, 101))  # percent of the hidden neurons that are removed
FINE_TUNE_EPOCHS = 30  # after each rate; 0 is one-shot pruning
BATCH_SIZE = 256  # beats a gradient step
LEARNING_RATE = 2e-3  # of Adam at the start of each fine-tuning; falls to 0 along a cosine
WEIGHT_DECAY = 0.3  # decoupled, of weights and biases; narrow ranges survive quantization (tried on validation rows)
MIN_WIDTH = 32  # neurons; with narrower hidden layers 0.3 to 1 points were lost at 3 and 4 bits (validation rows)
ACTIVATIONS = ("table", "relu")  # what a quantized neuron computes: what it learns, or the float network's ReLU
TABLES = 26  # neurons from which networks of tables start; 40 are no better at any number of neurons
QUANTIZATION_EPOCHS = 30  # of quantization-aware training, for each rate; 60 gain nothing
ROUNDING_BITS = 6  # of an accumulator that its bootstrap sees; at the same cost, 5 are 0.1 points worse, 4 more
P_ERROR = 2.0**-6  # chance that one bootstrap is off by a step; 2^-13 costs three times as much for up to 0.2 points
TRIALS = 3  # trainings of each number of bits, side by side
KEEP = 10  # networks that are saved
QUANTIZED_ACCURACIES = [
    *(f"{part}_balanced_accuracy{kind}" for part in ("val", "test") for kind in ("", "_encrypted")),
    RANKING,
]
CYCLES = 20  # timed repetitions of each latency, after one that warms up


def fine_tune(model: tf_keras.Sequential, rows: Rows, probability: np.ndarray, epochs: int, seed: int) -> None:
    """Train `model` in place on drawn rows, each with its probability (n,), until the learning rate is 0."""
    import tf_keras

    steps = -(-epoch_rows(rows[1]) // BATCH_SIZE)  # an epoch; all in one call, which computes the same in less time
    rate = tf_keras.optimizers.schedules.CosineDecay(LEARNING_RATE, epochs * steps)
    optimizer = tf_keras.optimizers.Adam(rate, weight_decay=WEIGHT_DECAY)
    model.compile(optimizer, "binary_crossentropy", steps_per_execution=steps)
    model.fit(training_draws(*rows, probability, BATCH_SIZE, seed), epochs=epochs, verbose=0)


def latency_ms(model: Callable, X: np.ndarray) -> tuple[float, float]:
    """Median and interquartile range, in milliseconds, of CYCLES calls on X after one that warms up."""
    seconds = []
    for _ in range(CYCLES + 1):
        started = time.perf_counter()
        model(X).numpy()
        seconds.append(time.perf_counter() - started)
    lower, median, upper = np.percentile(np.array(seconds[1:]) * 1000, [25, 50, 75])
    return float(median), float(upper - lower)


def measure(model: tf_keras.Sequential, data: Arrays, beats: pd.DataFrame | None) -> dict[str, Any]:
    """Figures of EC57, size and latency of one network; beats: of the test rows, where they are known."""
    import tensorflow as tf

    X = tf.constant(data["test"][0])
    call = tf.function(model, reduce_retracing=True)
    whole, whole_iqr = latency_ms(call, X)
    row, row_iqr = latency_ms(call, X[:1])
    found = ec57.columns(ec57.figures(data["test"][1], decisions(model, data["test"][0]), beats))
    widths = [len(bias) for _, bias in dense_layers(model)[:-1]]
    return {
        "hidden_layers": "-".join(map(str, widths)) or "none",
        "hidden_neurons": sum(widths),
        "parameters": model.count_params(),
        "val_balanced_accuracy": balanced_accuracy(model, *data["val"]),
        **{f"test_{name}": value for name, value in found.items()},
        "latency_set_ms": whole,
        "latency_set_iqr_ms": whole_iqr,
        "latency_row_ms": row,
        "latency_row_iqr_ms": row_iqr,
    }


def rank(table: pd.DataFrame, least: float) -> list[int]:
    """Index of `table`, the best first: what reaches `least` when quantized by its cost, the rest by its accuracy.

    Without quantized networks, by validation accuracy, the smaller network first among equals.
    """
    if f"quantized_{RANKING}" not in table:
        return list(table.sort_values(["val_balanced_accuracy", "rate_percent"], ascending=False).index)
    accuracy = table[f"quantized_{RANKING}"]
    good = accuracy >= least
    by_cost = table[good].sort_values(["predicted_complexity", "rate_percent"], ascending=[True, False])
    return [*by_cost.index, *accuracy[~good].sort_values(ascending=False).index]


def save_best(
    models: dict[int, tf_keras.Sequential],
    quantized: dict[int, list[QuantizedNetwork]],
    table: pd.DataFrame,
    order: list[int],
    workdir: Path,
) -> list[str]:
    """Write the first KEEP networks of `order` with what was quantized from them, remove an earlier run's.

    Returns the file name of each row of `table`, "" for one that is not kept; the first is rank 1.
    """
    names = [""] * len(table)
    earlier = [path for suffix in (".h5", ".onnx") for path in by_rank(workdir, suffix)]  # step 4 must run again
    earlier += by_rank(workdir / "quantized", ".onnx")
    with contextlib.ExitStack() as stack:  # all are written before the first takes its place
        for number, row in enumerate(order[:KEEP], 1):
            percent = int(table.loc[row, "rate_percent"])
            names[row] = (
                f"pruned_model_top_{number}_prune_{percent}_acc_{table.loc[row, 'val_balanced_accuracy']:.4f}.h5"
            )
            content = add_to_h5(mlp_bytes(models[percent]), quantized.get(percent, []))
            stack.enter_context(whole_file(workdir / names[row])).write_bytes(content)
    for old in earlier:
        if old.name not in names:
            old.unlink()
    return names


def plot_results(table: pd.DataFrame, before: dict[str, float], workdir: Path) -> None:
    """Rate against accuracy and against latency."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8))
    for part, name in (("val", "validation"), ("test", "test")):
        (line,) = axis.plot(table["rate_percent"], 100 * table[f"{part}_balanced_accuracy"], marker="o", label=name)
        axis.axhline(100 * before[part], color=line.get_color(), ls=":", label=f"{name}, step 2")
    axis.set(
        xlabel="neurons removed (%)",
        ylabel="balanced accuracy (%)",
        title="Accuracy after neuron removal and fine-tuning",
    )
    axis.legend()
    save_figure(figure, workdir / "dynamic_pruning_accuracy.png")

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, key, title in zip(axes, ("set", "row"), ("whole test set", "one beat")):
        spread = table[f"latency_{key}_iqr_ms"] / 2
        axis.errorbar(table["rate_percent"], table[f"latency_{key}_ms"], yerr=spread, marker="o", capsize=3)
        axis.set(xlabel="neurons removed (%)", ylabel="latency (ms)", title=f"Unencrypted latency, {title}")
        axis.set_ylim(bottom=0)
    figure.suptitle(f"median of {CYCLES} cycles, bars: interquartile range")
    save_figure(figure, workdir / "dynamic_pruning_latency.png")


def plot_cost(quantized: pd.DataFrame, baseline: float, max_loss: float, path: Path) -> None:
    """Predicted encrypted cost against accuracy on the rows of ranking, one series a bit width: the mean of its trials,
    and bars to the best and the worst. Networks without neurons, which cost next to nothing, are not shown."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.4))
    for bits, group in quantized[quantized["pbs"] > 0].groupby("bits"):
        trials = group.groupby("rate_percent").agg(
            cost=("predicted_complexity", "mean"), **{f: (RANKING, f) for f in ("mean", "min", "max")}
        )
        mean, ends = 100 * trials["mean"], 100 * trials[["min", "max"]].sub(trials["mean"], axis=0).abs().T
        axis.errorbar(trials["cost"], mean, yerr=ends, marker="o", capsize=2, label=f"{bits} bits")
    axis.axhline(100 * baseline, color="black", ls="--", label="float baseline")
    axis.axhline(100 * (baseline - max_loss), color="black", ls=":", label=f"baseline - {100 * max_loss:g}")
    axis.set(
        xscale="log",
        xlabel="predicted complexity of one encrypted beat",
        ylabel="balanced accuracy (%), rows of ranking",
        title=f"Quantized networks: accuracy against predicted cost, mean and range of {TRIALS} trainings",
    )
    axis.legend()
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Remove, fine-tune, quantize and measure at every rate, then keep the best."""
    parser = make_parser(__doc__)
    parser.add_argument("--rates", type=int, nargs="+", default=RATES, help="neurons removed, percent, rising")
    parser.add_argument(
        "--fine-tune-epochs", type=natural_int, default=FINE_TUNE_EPOCHS, help="after each rate; 0: one-shot"
    )
    parser.add_argument("--min-width", type=positive_int, default=MIN_WIDTH, help="narrower hidden layers are removed")
    parser.add_argument("--activation", choices=ACTIVATIONS, default=ACTIVATIONS[0], help="of quantized neurons")
    parser.add_argument("--rounding-bits", type=int, choices=range(3, 8), default=ROUNDING_BITS, help="of accumulators")
    parser.add_argument(
        "--p-error",
        type=number(float, 2.0**-40, 0.25, "from 2^-40 to 0.25"),
        default=P_ERROR,
        help="chance that one bootstrap is off by a step",
    )
    parser.add_argument(
        "--quantization-epochs", type=natural_int, default=QUANTIZATION_EPOCHS, help="0: leave quantization to step 5"
    )
    parser.add_argument(
        "--max-loss",
        type=positive_float,
        default=TOLERATED_LOSS,
        help="accuracy below the baseline up to which a quantized network is ranked by its cost",
    )
    args = parser.parse_args(argv)
    if sorted(set(args.rates)) != list(args.rates) or not 0 <= args.rates[0] <= args.rates[-1] <= 100:
        parser.error("--rates must rise and lie between 0 and 100")
    check_writable(args.workdir)
    data = load_arrays(args.data_dir, public_map(args.workdir))
    tf_keras = start_tensorflow(args.seed)
    features = data["train"][0].shape[1]
    start = load_mlp(args.workdir / "tf_pruned_model.h5", "python TF_pruning.py", features)
    baseline = load_mlp(args.workdir / "MLP_model_0.h5", "python MLP_model_0.py", features)
    before = {part: balanced_accuracy(start, *data[part]) for part in ("val", "test")}
    targets = baseline(data["train"][0]).numpy()[:, 0]
    beats, named = rows_of(args.data_dir, data)
    data["ranking"] = ranking_rows(data, beats)
    goal = balanced_accuracy(baseline, *data["ranking"])
    known = beats["test"] if named else None
    probability, noise, shift = training_probability(beats), input_noise(start), logit_shift(args.workdir)
    layers = dense_layers(start)
    full = [len(bias) for _, bias in layers[:-1]]

    history = [(full, layers)]  # widths by layer of step 2's network, 0 for one that is gone, and the network
    models, rows = {}, []
    for rate in tqdm(args.rates, desc="removing neurons", unit="rate"):
        widths = share_neurons(round(sum(full) * (1 - rate / 100)), full, args.min_width)
        has, layers = next((h, n) for h, n in reversed(history) if all(a >= b for a, b in zip(h, widths)))
        layers = shrink(layers, [width for width, old in zip(widths, has) if old], data["train"][0])
        one_shot = balanced_accuracy(build(layers), *data["val"])
        if args.fine_tune_epochs and len(layers) == 1:
            penalties = (PENALTY_UNSEEN,) if unseen_patients(beats) else PENALTIES
            models[rate] = build(fit_linear(data, probability, noise, args.seed, penalties), noise)
            shift_logit(models[rate], shift)
        elif args.fine_tune_epochs:
            tf_keras.utils.set_random_seed(own := stream(args.seed, rate))
            models[rate] = build(revive(layers, np.random.default_rng(own)), noise)
            shift_logit(models[rate], -shift)  # labels know nothing of a chosen threshold
            fine_tune(models[rate], data["train"], probability, args.fine_tune_epochs, own)
            shift_logit(models[rate], shift)
        else:
            models[rate] = build(layers, noise)
        layers = dense_layers(models[rate])
        history.append((widths, layers))
        before_tuning = {"rate_percent": rate, "val_balanced_accuracy_before_tuning": one_shot}
        rows.append({**before_tuning, **measure(models[rate], data, known)})
    found: Quantized = {}
    if args.quantization_epochs:
        form = {"bits": [bits for bits in BITS for _ in range(TRIALS)], "rounding_bits": args.rounding_bits}
        form |= {"p_error": args.p_error, "X": data["train"][0]}
        lesson = Lesson(data, targets, probability, noise, args.quantization_epochs, args.seed)
        networks = {rate: dense_layers(model) for rate, model in models.items()}
        if args.activation == "relu":
            found = quantize_relu(networks, form, lesson, goal - args.max_loss, KEEP)
        else:
            one_layer = [min(TABLES, full[0]), *[0] * (len(full) - 1)]
            widest = revive(shrink(history[0][1], one_layer, data["train"][0]), np.random.default_rng(args.seed))
            found = quantize_tables(networks, widest, form, lesson)
    for row in rows:
        if row["rate_percent"] in found:
            every = found[row["rate_percent"]]
            best = lowest_cost(every[every["chosen"]], goal - args.max_loss)
            row |= {f"quantized_{name}": best[name] for name in ("bits", *QUANTIZED_ACCURACIES)}
            row |= {name: best[name] for name in ("rounding_bits", "p_error", "pbs", "predicted_complexity")}
            if best["pbs"]:  # else there is one training
                trials = every.loc[every["bits"] == best["bits"], "test_balanced_accuracy_encrypted"]
                row |= {"quantized_test_trials_mean": trials.mean(), "quantized_test_trials_sd": trials.std(ddof=0)}
    quantized = {rate: list(one.loc[one["chosen"], "network"]) for rate, one in found.items()}
    table = pd.DataFrame(rows)
    table["file"] = save_best(models, quantized, table, rank(table, goal - args.max_loss), args.workdir)
    for name, expected in zip(table["file"], table["val_balanced_accuracy"]):
        if name and balanced_accuracy(load_mlp(args.workdir / name, ""), *data["val"]) != expected:
            raise AssertionError(f"{name} does not give the accuracy that was measured before it was saved")
    settings = {
        **machine_facts(),
        "start": f"tf_pruned_model.h5, validation {before['val']:.4f}, test {before['test']:.4f}",
        "teacher": f"MLP_model_0.h5, on the rows of ranking {goal:.4f}",
        "ranking_*": "on the rows by which networks are chosen and ranked: the validation part; of unseen patients the "
        "records of the training part too",
        "rank": f"by cost among those at most {100 * args.max_loss:g} points below the teacher when quantized",
        "activation": args.activation,
        "predicted_complexity": "neurons times the complexity of one PBS at their rounding bits, output and p_error",
        "*_encrypted": f"with the noise of p_error, mean of {NOISE_DRAWS} draws; of {TRIALS} trainings (trials) the "
        "best by ranking_* is kept; a difference within the trials' standard deviation is none",
        "fine_tune_epochs": args.fine_tune_epochs,
        "quantization_epochs": args.quantization_epochs,
        "min_width": args.min_width,
        "seed": args.seed,
        "latency": f"median and interquartile range of {CYCLES} cycles, not encrypted",
        "rows": f"validation {len(data['val'][1])}, test {len(data['test'][1])}",
    }
    sheets = {"results": table, "settings": settings_sheet(settings)}
    (args.workdir / "dynamic_pruning_cost.png").unlink(missing_ok=True)
    if found:
        parts = [one.drop(columns="network").assign(rate_percent=rate) for rate, one in sorted(found.items())]
        sheets["quantized"] = pd.concat(parts)[["rate_percent", *parts[0].columns[:-1]]]
        plot_cost(sheets["quantized"], goal, args.max_loss, args.workdir / "dynamic_pruning_cost.png")
    write_workbook(args.workdir / "dynamic_pruning_results.xlsx", sheets)
    write_json(args.workdir / "dynamic_pruning_metrics.json", {"rates": table.to_dict("records")})
    plot_results(table, before, args.workdir)
    shown = [
        "rate_percent",
        "hidden_layers",
        "val_balanced_accuracy",
        "test_balanced_accuracy",
        "quantized_bits",
        "rounding_bits",
        "pbs",
    ]
    shown += [f"quantized_{RANKING}", "quantized_test_balanced_accuracy_encrypted"]
    shown += ["quantized_test_trials_sd", "predicted_complexity"]
    printed = table[[name for name in shown if name in table]].assign(rank=table["file"].str.split("_").str[3])
    print(f"\n{printed.to_string(index=False, formatters={'predicted_complexity': '{:.2e}'.format})}\n")
    print(f"wrote {sum(map(bool, table['file']))} networks pruned_model_top_*.h5, dynamic_pruning_results.xlsx and")
    print(f"dynamic_pruning_*.png to {args.workdir}")


if __name__ == "__main__":
    run(main)
