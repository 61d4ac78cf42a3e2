"""Step 3: remove neurons at rates from 25 % to 100 %, fine-tune, quantize, and keep the ten best networks.

Each rate starts from the last network that is at least as wide, mostly that of the rate before. The neurons with the
most zero weights are removed first, and among equals those of the least saliency, which decides from the second rate
on: fine-tuning fills step 2's zeros, one-shot pruning (--fine-tune-epochs 0) does not. The mean activation of a removed
neuron is folded into the next layer's bias. Layers narrower than --min-width are removed, and the others get their
neurons: an encrypted neuron costs the same in any layer, and a narrow layer passes few bits.

Then networks of as many neurons, from 26 down, are trained at 2 to 7 bits as the encrypted graph computes them, with
the baseline as their teacher: each neuron is a lookup table that is learned, beside a linear path. Without neurons the
network is logistic regression, rounded or trained quantized, and needs no bootstrap. Networks within --max-loss of the
baseline on validation data (for unseen patients, with the records of the training part) are ranked by their cost, the
others by accuracy; the best ten are saved.

Reads   tf_pruned_model.h5 and MLP_model_0.h5 in --workdir (steps 1 and 2 make them) and the arrays in --data-dir
Writes  to --workdir: ten pruned_model_top_{rank}_prune_{percent}_acc_{validation accuracy}.h5, each with its quantized
        networks inside, dynamic_pruning_results.xlsx, dynamic_pruning_metrics.json, dynamic_pruning_accuracy.png,
        _cost.png and _latency.png
Run     python dynamic_pruning_eval.py
"""

from __future__ import annotations

import argparse
import contextlib
import timeit
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp import cli, ecg, networks, quantized, workers
from fhe_mlp.dataset import Dataset
from fhe_mlp.experiments import save_figure, settings_sheet, write_workbook

RATES = (*range(25, 91, 5), 92, *range(94, 101))  # percent of the hidden neurons that are removed
FINE_TUNE_EPOCHS = 30  # after each rate; 0 is one-shot pruning
BATCH_SIZE = 256  # beats a gradient step
LEARNING_RATE = 2e-3  # of Adam at the start of each fine-tuning; falls to 0 along a cosine
WEIGHT_DECAY = 0.3  # decoupled, of weights and biases; narrow ranges survive quantization (tried on validation rows)
MIN_WIDTH = 32  # neurons; with narrower hidden layers 0.3 to 1 points were lost at 3 and 4 bits (validation rows)
TABLES = 26  # neurons from which networks of lookup tables start; 40 are no better at any number of neurons
QUANTIZATION_EPOCHS = 30  # of quantization-aware training, for each rate; 60 gain nothing
ROUNDING_BITS = 6  # of an accumulator that its bootstrap sees; at the same cost, 5 are 0.1 points worse, 4 more
P_ERROR = 2.0**-6  # chance that one bootstrap is off by a step; 2^-13 costs three times as much for up to 0.2 points
TRIALS = 3  # trainings of each number of bits, side by side
KEEP = 10  # networks that are saved
CYCLES = 20  # timed repetitions of each latency, after one that warms up
RANKED_BY = f"quantized_{quantized.RANKING}"  # column of the results
PRINTED = (  # columns that a reader needs first
    "rate_percent hidden_layers val_balanced_accuracy test_balanced_accuracy quantized_bits rounding_bits pbs "
    f"{RANKED_BY} quantized_test_balanced_accuracy_simulated quantized_test_trials_sd predicted_complexity"
).split()
Stages = dict[int, tuple[networks.MLP, networks.MLP]]  # by rate, the network after removal and after fine-tuning


def fine_tune(mlp: networks.MLP, data: Dataset, epochs: int, seed: int) -> networks.MLP:
    """Return the network trained on drawn rows until the learning rate is 0."""
    import tf_keras

    steps = -(-networks.epoch_rows(data.train.y) // BATCH_SIZE)  # an epoch, in one call: the same in less time
    rate = tf_keras.optimizers.schedules.CosineDecay(LEARNING_RATE, epochs * steps)
    model = networks.to_train(mlp, seed)
    optimizer = tf_keras.optimizers.Adam(rate, weight_decay=WEIGHT_DECAY)
    model.compile(optimizer, "binary_crossentropy", steps_per_execution=steps)
    model.fit(networks.training_draws(data, BATCH_SIZE, seed), epochs=epochs, verbose=0)
    return networks.trained(model, mlp)


def latencies(mlp: networks.MLP, X: np.ndarray) -> dict[str, float]:
    """Return median and interquartile range, in ms, of CYCLES calls on all rows X (n, features) and on one."""
    import tensorflow as tf

    model, result = tf.function(networks.to_keras(mlp), reduce_retracing=True), {}
    for key, rows in (("set", tf.constant(X)), ("row", tf.constant(X[:1]))):
        seconds = timeit.repeat(lambda rows=rows: model(rows).numpy(), number=1, repeat=CYCLES + 1)
        lower, median, upper = 1000 * np.percentile(seconds[1:], [25, 50, 75])
        result |= {f"latency_{key}_ms": median, f"latency_{key}_iqr_ms": upper - lower}
    return result


def measure(mlp: networks.MLP, data: Dataset) -> dict[str, Any]:
    """Return figures of EC57, size and latency of one network."""
    figures = ecg.columns(data.test.figures(mlp.decisions(data.test.X)))
    return {
        "hidden_layers": "-".join(map(str, mlp.widths)) or "none",
        "hidden_neurons": sum(mlp.widths),
        "parameters": mlp.parameters,
        "val_balanced_accuracy": mlp.balanced_accuracy(data.val),
        **{f"test_{name}": value for name, value in figures.items()},
        **latencies(mlp, data.test.X),
    }


def share_widths(start: networks.MLP, args: argparse.Namespace) -> dict[int, list[int]]:
    """Return the widths of the hidden layers at each rate, 0 for a layer that is removed."""
    neurons = {rate: round(sum(start.widths) * (1 - rate / 100)) for rate in args.rates}
    return {rate: networks.share_neurons(count, start.widths, args.min_width) for rate, count in neurons.items()}


def remove_at_rates(shared: tuple[networks.MLP, Dataset], args: argparse.Namespace) -> Stages:
    """Remove neurons and fine-tune; shared: step 2's network and the data, sent once to the process this runs in."""
    networks.start_tensorflow(args.seed)
    (start, data), found = shared, {}
    history = [(start.widths, start.layers)]  # widths by layer of step 2's network, and the layers
    for rate, widths in share_widths(start, args).items():
        seed = networks.stream(args.seed, rate)
        has, layers = next((h, n) for h, n in reversed(history) if all(a >= b for a, b in zip(h, widths)))
        layers = networks.shrink(layers, [width for width, old in zip(widths, has) if old], data.train.X)
        removed = tuned = replace(start, layers=layers)
        if args.fine_tune_epochs and not any(widths):
            tuned = quantized.fit_linear(data, start.noise, args.seed).decided_at(start.threshold)
        elif args.fine_tune_epochs:
            revived = replace(start, layers=networks.revive(layers, np.random.default_rng(seed)))
            tuned = fine_tune(revived, data, args.fine_tune_epochs, seed)
        found[rate] = removed, tuned
        history.append((widths, tuned.layers))
    return found


def make_networks(
    start: networks.MLP, baseline: networks.MLP, data: Dataset, args: argparse.Namespace
) -> tuple[Stages, quantized.Quantized]:
    """Return the float networks and the quantized ones of each rate.

    Both trainings use one core: float networks are trained in a process beside those of lookup tables.
    """
    found: quantized.Quantized = {}
    with workers.open_workers((start, data), 1) as crew:
        removed = crew.submit(remove_at_rates, (args,))
        if args.quantization_epochs:
            form = quantized.Form([b for b in quantized.BITS for _ in range(TRIALS)], args.rounding_bits, args.p_error)
            targets = networks.to_keras(baseline)(data.train.X).numpy()[:, 0]
            lesson = quantized.Lesson(data, targets, start.noise, args.quantization_epochs, baseline.shift)
            first, *others = start.widths
            layers = networks.shrink(start.layers, [min(TABLES, first), *[0 for _ in others]], data.train.X)
            widest = replace(start, layers=networks.revive(layers, np.random.default_rng(args.seed)))
            neurons = {rate: sum(widths) for rate, widths in share_widths(start, args).items()}
            found = quantized.quantize_tables(neurons, widest, form, lesson, args.seed)
        print("waiting for the float networks ...", flush=True)
        try:
            stages = removed.result()
        except crew.death:
            raise cli.InputError("the process of the float networks was killed, perhaps for want of memory") from None
    for rate, (_, mlp) in stages.items():
        if args.quantization_epochs and not mlp.widths:
            found[rate] = quantized.quantize_linear(mlp, form, lesson, networks.stream(args.seed, rate))
    return stages, found


def quantized_columns(candidates: pd.DataFrame, least: float) -> dict[str, Any]:
    """Return the facts of a rate's quantized network of the lowest cost of at least `least` accuracy."""
    best = quantized.lowest_cost(candidates[candidates["chosen"]], least)
    accuracies = [f"{part}_balanced_accuracy{kind}" for part in ("val", "test") for kind in ("", "_simulated")]
    row = {f"quantized_{name}": best[name] for name in ("bits", *accuracies, quantized.RANKING)}
    row |= {name: best[name] for name in ("rounding_bits", "p_error", "pbs", "predicted_complexity")}
    if best["pbs"]:  # else there is one training
        trials = candidates.loc[candidates["bits"] == best["bits"], "test_balanced_accuracy_simulated"]
        row |= {"quantized_test_trials_mean": trials.mean(), "quantized_test_trials_sd": trials.std(ddof=0)}
    return row


def rank(table: pd.DataFrame, least: float) -> list[int]:
    """Return the index of `table`, the best first: by cost what reaches `least` when quantized, the rest by accuracy.

    Without quantized networks, by validation accuracy, the smaller network first among equals.
    """
    if RANKED_BY not in table:
        return list(table.sort_values(["val_balanced_accuracy", "rate_percent"], ascending=False).index)
    good = table[RANKED_BY] >= least
    by_cost = table[good].sort_values(["predicted_complexity", "rate_percent"], ascending=[True, False])
    return [*by_cost.index, *table[~good].sort_values(RANKED_BY, ascending=False).index]


def save_best(
    stages: Stages, found: quantized.Quantized, table: pd.DataFrame, order: list[int], workdir: Path
) -> list[str]:
    """Write the first KEEP networks of `order` with what was quantized from them, remove an earlier run's.

    Returns the file name of each row of `table`, "" for one that is not saved.
    """
    names = [""] * len(table)
    with contextlib.ExitStack() as stack:  # all are written before the first takes its place
        for number, row in enumerate(order[:KEEP], 1):
            rate, accuracy = int(table.loc[row, "rate_percent"]), table.loc[row, "val_balanced_accuracy"]
            names[row] = f"pruned_model_top_{number}_prune_{rate}_acc_{accuracy:.4f}.h5"
            chosen = found[rate].loc[found[rate]["chosen"], "network"] if rate in found else []
            content = quantized.add_networks(networks.h5_bytes(stages[rate][1]), chosen)
            stack.enter_context(cli.whole_file(workdir / names[row])).write_bytes(content)
    onnx = [*networks.by_rank(workdir, ".onnx"), *networks.by_rank(workdir / "quantized", ".onnx")]  # step 4 must rerun
    for path in [*onnx, *networks.by_rank(workdir, ".h5")]:
        if path.name not in names:
            path.unlink()
    return names


def plot_results(table: pd.DataFrame, before: dict[str, float], workdir: Path) -> None:
    """Draw the rate against accuracy and against latency."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8))
    for part, name in (("val", "validation"), ("test", "test")):
        (line,) = axis.plot(table["rate_percent"], 100 * table[f"{part}_balanced_accuracy"], marker="o", label=name)
        axis.axhline(100 * before[part], color=line.get_color(), ls=":", label=f"{name}, step 2")
    axis.set(xlabel="neurons removed (%)", ylabel="balanced accuracy (%)", title="Accuracy after removal and tuning")
    axis.legend()
    save_figure(figure, workdir / "dynamic_pruning_accuracy.png")

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, key, title in zip(axes, ("set", "row"), ("whole test set", "one beat")):
        spread = table[f"latency_{key}_iqr_ms"] / 2
        axis.errorbar(table["rate_percent"], table[f"latency_{key}_ms"], yerr=spread, marker="o", capsize=3)
        axis.set(xlabel="neurons removed (%)", ylabel="latency (ms)", title=title, ylim=(0, None))
    figure.suptitle(f"Unencrypted latency: median of {CYCLES} cycles, bars: interquartile range")
    save_figure(figure, workdir / "dynamic_pruning_latency.png")


def plot_cost(table: pd.DataFrame, baseline: float, max_loss: float, path: Path) -> None:
    """Draw predicted cost against accuracy on the rows of ranking, mean and range of the trials, a series a bit width.

    Networks without neurons, which cost next to nothing, are not shown.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.4))
    for bits, group in table[table["pbs"] > 0].groupby("bits"):
        trials = group.groupby("rate_percent").agg(
            cost=("predicted_complexity", "mean"), **{f: (quantized.RANKING, f) for f in ("mean", "min", "max")}
        )
        mean, ends = 100 * trials["mean"], 100 * trials[["min", "max"]].sub(trials["mean"], axis=0).abs().T
        axis.errorbar(trials["cost"], mean, yerr=ends, marker="o", capsize=2, label=f"{bits} bits")
    axis.axhline(100 * baseline, color="black", ls="--", label="float baseline")
    axis.axhline(100 * (baseline - max_loss), color="black", ls=":", label=f"baseline - {100 * max_loss:g}")
    axis.set(xscale="log", xlabel="predicted complexity of one encrypted beat")
    axis.set_ylabel("balanced accuracy (%), rows of ranking")
    axis.set_title(f"Quantized networks: accuracy against predicted cost, mean and range of {TRIALS} trainings")
    axis.legend()
    save_figure(figure, path)


def settings(args: argparse.Namespace, data: Dataset, before: dict[str, float], teacher: float) -> dict[str, Any]:
    """Return the settings sheet: machine, versions, options, and what the columns mean.

    before, teacher: balanced accuracies of step 2's network by part, and of the baseline on the rows of ranking.
    """
    return {
        **cli.machine_facts(),
        "start": "tf_pruned_model.h5, " + ", ".join(f"{part} {accuracy:.4f}" for part, accuracy in before.items()),
        "teacher": f"MLP_model_0.h5, on the rows of ranking {teacher:.4f}",
        "ranking_*": "on the rows by which networks are chosen and ranked: the validation part; of unseen patients the "
        "records of the training part too",
        "rank": f"by cost among those at most {100 * args.max_loss:g} points below the teacher when quantized",
        "predicted_complexity": "neurons times the complexity of one PBS at their rounding bits, output and p_error",
        "*_simulated": f"with the noise of p_error, mean of {quantized.NOISE_DRAWS} draws; of {TRIALS} trainings "
        "(trials) the best by ranking_* is chosen; a difference within the trials' standard deviation is none",
        **{name: vars(args)[name] for name in ("fine_tune_epochs", "quantization_epochs", "min_width", "seed")},
        "latency": f"median and interquartile range of {CYCLES} cycles, not encrypted",
        "rows": f"validation {len(data.val.y)}, test {len(data.test.y)}",
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = cli.make_parser(__doc__)
    option = parser.add_argument
    option("--rates", type=int, nargs="+", default=RATES, help="neurons removed, percent, rising")
    option("--fine-tune-epochs", type=cli.natural_int, default=FINE_TUNE_EPOCHS, help="after each rate; 0: one-shot")
    option("--min-width", type=cli.positive_int, default=MIN_WIDTH, help="narrower hidden layers are removed")
    option("--rounding-bits", type=int, choices=range(3, 8), default=ROUNDING_BITS, help="of accumulators")
    chance = cli.number(float, 2.0**-40, 0.25, "from 2^-40 to 0.25")
    option("--p-error", type=chance, default=P_ERROR, help="probability that one bootstrap is off by a step")
    option("--quantization-epochs", type=cli.natural_int, default=QUANTIZATION_EPOCHS, help="0: quantize in step 5")
    what = "accuracy below the baseline up to which a quantized network is ranked by its cost"
    option("--max-loss", type=cli.positive_float, default=quantized.TOLERATED_LOSS, help=what)
    args = parser.parse_args(argv)
    if sorted(set(args.rates)) != list(args.rates) or not 0 <= args.rates[0] <= args.rates[-1] <= 100:
        parser.error("--rates must rise and lie between 0 and 100")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Remove, fine-tune, quantize and measure at every rate, then save the best."""
    args = parse_arguments(argv)
    workdir = args.workdir
    cli.check_writable(workdir)
    start, data = networks.load_with_data(workdir / "tf_pruned_model.h5", "python TF_pruning.py", args.data_dir)
    baseline = networks.load_mlp(workdir / "MLP_model_0.h5", "python MLP_model_0.py")
    networks.check_features(baseline, workdir / "MLP_model_0.h5", data)
    networks.start_tensorflow(args.seed)
    stages, found = make_networks(start, baseline, data, args)
    teacher = baseline.balanced_accuracy(data.ranking)
    least, rows = teacher - args.max_loss, []
    for rate, (removed, tuned) in tqdm(stages.items(), desc="measuring", unit="rate"):
        before_tuning = removed.balanced_accuracy(data.val)
        row = {"rate_percent": rate, "val_balanced_accuracy_before_tuning": before_tuning, **measure(tuned, data)}
        rows.append(row | quantized_columns(found[rate], least) if rate in found else row)
    table = pd.DataFrame(rows)
    table["file"] = save_best(stages, found, table, rank(table, least), workdir)
    before = {part: start.balanced_accuracy(data.parts[part]) for part in ("val", "test")}
    sheets = {"results": table, "settings": settings_sheet(settings(args, data, before, teacher))}
    (workdir / "dynamic_pruning_cost.png").unlink(missing_ok=True)
    if found:
        by_rate = pd.concat(found, names=["rate_percent"]).reset_index("rate_percent")
        sheets["quantized"] = by_rate.drop(columns="network")
        plot_cost(by_rate, teacher, args.max_loss, workdir / "dynamic_pruning_cost.png")
    write_workbook(workdir / "dynamic_pruning_results.xlsx", sheets)
    cli.write_json(workdir / "dynamic_pruning_metrics.json", {"rates": table.to_dict("records")})
    plot_results(table, before, workdir)
    printed = table.filter(PRINTED).assign(rank=table["file"].str.split("_").str[3])
    print(f"\n{printed.to_string(index=False, float_format='{:.4g}'.format)}\n")
    print(f"wrote pruned_model_top_*.h5, dynamic_pruning_results.xlsx and dynamic_pruning_*.png to {workdir}")


if __name__ == "__main__":
    cli.run(main)
