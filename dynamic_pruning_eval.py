"""Step 3: remove neurons at rates from 25 % to 100 %, fine-tune, quantize, and keep the ten best networks.

Each rate starts from the last network that is at least as wide, mostly that of the rate before. The neurons with the
most zero weights are removed first, and among equals those of the least saliency: fine-tuning fills the zeros of step
2, so from the second rate on, saliency decides, while one-shot pruning (--fine-tune-epochs 0) ranks by zeros
throughout. The mean activation of a removed neuron is folded into the next layer's bias. Layers narrower than
--min-width are removed, and the others get their neurons: an encrypted neuron costs the same in any layer, and a narrow
layer passes few bits.

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
import time
from collections.abc import Callable, Sequence
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
QUANTIZED_ACCURACIES = [
    *(f"{part}_balanced_accuracy{kind}" for part in ("val", "test") for kind in ("", "_simulated")),
    quantized.RANKING,
]
CYCLES = 20  # timed repetitions of each latency, after one that warms up


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


def latency_ms(model: Callable, X: np.ndarray) -> tuple[float, float]:
    """Return median and interquartile range, in milliseconds, of CYCLES calls on X after one that warms up."""
    seconds = []
    for _ in range(CYCLES + 1):
        started = time.perf_counter()
        model(X).numpy()
        seconds.append(time.perf_counter() - started)
    lower, median, upper = np.percentile(np.array(seconds[1:]) * 1000, [25, 50, 75])
    return float(median), float(upper - lower)


def measure(mlp: networks.MLP, data: Dataset) -> dict[str, Any]:
    """Return figures of EC57, size and latency of one network."""
    import tensorflow as tf

    call, X = tf.function(networks.to_keras(mlp), reduce_retracing=True), tf.constant(data.test.X)
    whole, whole_iqr = latency_ms(call, X)
    row, row_iqr = latency_ms(call, X[:1])
    figures = ecg.columns(data.test.figures(mlp.decisions(data.test.X)))
    return {
        "hidden_layers": "-".join(map(str, mlp.widths)) or "none",
        "hidden_neurons": sum(mlp.widths),
        "parameters": mlp.parameters,
        "val_balanced_accuracy": mlp.balanced_accuracy(data.val),
        **{f"test_{name}": value for name, value in figures.items()},
        "latency_set_ms": whole,
        "latency_set_iqr_ms": whole_iqr,
        "latency_row_ms": row,
        "latency_row_iqr_ms": row_iqr,
    }


def share_widths(start: networks.MLP, args: argparse.Namespace) -> dict[int, list[int]]:
    """Return the widths of the hidden layers at each rate, 0 for a layer that is removed."""
    full = start.widths
    neurons = {rate: round(sum(full) * (1 - rate / 100)) for rate in args.rates}
    return {rate: networks.share_neurons(count, full, args.min_width) for rate, count in neurons.items()}


def remove_at_rates(shared: tuple[networks.MLP, Dataset], args: argparse.Namespace) -> dict[int, list[networks.MLP]]:
    """Return for each rate the network after removal, and behind it the fine-tuned one if it is.

    shared: step 2's network and the data; sent once to the process that this runs in.
    """
    networks.start_tensorflow(args.seed)
    (start, data), found = shared, {}
    history = [(start.widths, start.layers)]  # widths by layer of step 2's network, and the layers
    for rate, widths in share_widths(start, args).items():
        seed = networks.stream(args.seed, rate)
        has, layers = next((h, n) for h, n in reversed(history) if all(a >= b for a, b in zip(h, widths)))
        layers = networks.shrink(layers, [width for width, old in zip(widths, has) if old], data.train.X)
        found[rate] = [replace(start, layers=layers)]
        if args.fine_tune_epochs and not any(widths):
            found[rate].append(quantized.fit_linear(data, start.noise, args.seed).decided_at(start.threshold))
        elif args.fine_tune_epochs:
            mlp = replace(start, layers=networks.revive(layers, np.random.default_rng(seed)))
            found[rate].append(fine_tune(mlp, data, args.fine_tune_epochs, seed))
        history.append((widths, found[rate][-1].layers))
    return found


def make_networks(
    start: networks.MLP, baseline: networks.MLP, data: Dataset, args: argparse.Namespace
) -> tuple[dict[int, list[networks.MLP]], quantized.Quantized]:
    """Return what remove_at_rates does, and the quantized networks of each rate.

    Both trainings use one core: float networks are trained in a process beside those of lookup tables.
    """
    found: quantized.Quantized = {}
    with workers.open_workers((start, data), 1) as crew:
        removed = crew.submit(remove_at_rates, (args,))
        if args.quantization_epochs:
            form = quantized.Form([b for b in quantized.BITS for _ in range(TRIALS)], args.rounding_bits, args.p_error)
            targets = networks.to_keras(baseline)(data.train.X).numpy()[:, 0]
            lesson = quantized.Lesson(data, targets, start.noise, args.quantization_epochs, baseline.shift)
            one_layer = [min(TABLES, start.widths[0]), *[0] * (len(start.widths) - 1)]
            rng, layers = np.random.default_rng(args.seed), networks.shrink(start.layers, one_layer, data.train.X)
            widest = replace(start, layers=networks.revive(layers, rng))
            neurons = {rate: sum(widths) for rate, widths in share_widths(start, args).items()}
            found = quantized.quantize_tables(neurons, widest, form, lesson, args.seed)
        print("waiting for the float networks ...", flush=True)
        try:
            mlps = removed.result()
        except crew.death:
            raise cli.InputError("the process of the float networks was killed, perhaps for want of memory") from None
    for rate in [rate for rate, stages in mlps.items() if args.quantization_epochs and not stages[-1].widths]:
        found[rate] = quantized.quantize_linear(mlps[rate][-1], form, lesson, networks.stream(args.seed, rate))
    return mlps, found


def add_quantized(row: dict[str, Any], candidates: pd.DataFrame, least: float) -> None:
    """Add to a rate's row its quantized network of the lowest cost of at least `least` accuracy."""
    best = quantized.lowest_cost(candidates[candidates["chosen"]], least)
    row |= {f"quantized_{name}": best[name] for name in ("bits", *QUANTIZED_ACCURACIES)}
    row |= {name: best[name] for name in ("rounding_bits", "p_error", "pbs", "predicted_complexity")}
    if best["pbs"]:  # else there is one training
        trials = candidates.loc[candidates["bits"] == best["bits"], "test_balanced_accuracy_simulated"]
        row |= {"quantized_test_trials_mean": trials.mean(), "quantized_test_trials_sd": trials.std(ddof=0)}


def rank(table: pd.DataFrame, least: float) -> list[int]:
    """Return the index of `table`, the best first: by cost what reaches `least` when quantized, the rest by accuracy.

    Without quantized networks, by validation accuracy, the smaller network first among equals.
    """
    if f"quantized_{quantized.RANKING}" not in table:
        return list(table.sort_values(["val_balanced_accuracy", "rate_percent"], ascending=False).index)
    accuracy = table[f"quantized_{quantized.RANKING}"]
    good = accuracy >= least
    by_cost = table[good].sort_values(["predicted_complexity", "rate_percent"], ascending=[True, False])
    return [*by_cost.index, *accuracy[~good].sort_values(ascending=False).index]


def save_best(
    mlps: dict[int, networks.MLP], found: quantized.Quantized, table: pd.DataFrame, order: list[int], workdir: Path
) -> list[str]:
    """Write the first KEEP networks of `order` with what was quantized from them, remove an earlier run's.

    Returns the file name of each row of `table`, "" for one that is not saved; the first is rank 1.
    """
    names = [""] * len(table)
    earlier = [path for suffix in (".h5", ".onnx") for path in networks.by_rank(workdir, suffix)]  # step 4 must rerun
    earlier += networks.by_rank(workdir / "quantized", ".onnx")
    with contextlib.ExitStack() as stack:  # all are written before the first takes its place
        for number, row in enumerate(order[:KEEP], 1):
            percent, accuracy = table.loc[row, ["rate_percent", "val_balanced_accuracy"]]
            names[row] = f"pruned_model_top_{number}_prune_{percent:.0f}_acc_{accuracy:.4f}.h5"
            candidates = found.get(int(percent))
            chosen = [] if candidates is None else candidates.loc[candidates["chosen"], "network"]
            content = quantized.add_networks(networks.h5_bytes(mlps[int(percent)]), chosen)
            stack.enter_context(cli.whole_file(workdir / names[row])).write_bytes(content)
    for old in earlier:
        if old.name not in names:
            old.unlink()
    return names


def check_saved(table: pd.DataFrame, data: Dataset, workdir: Path) -> None:
    """Stop where a saved network has another validation accuracy than was measured before."""
    for name, expected in zip(table["file"], table["val_balanced_accuracy"]):
        if name and networks.load_mlp(workdir / name, "").balanced_accuracy(data.val) != expected:
            raise AssertionError(f"{name} has another accuracy than was measured before it was saved")


def plot_results(table: pd.DataFrame, before: dict[str, float], workdir: Path) -> None:
    """Draw the rate against accuracy and against latency."""
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


def plot_cost(table: pd.DataFrame, baseline: float, max_loss: float, path: Path) -> None:
    """Draw predicted cost against accuracy on the rows of ranking, one series a bit width.

    Points are the mean of the trials, bars reach to the best and the worst. Networks without neurons, which cost next
    to nothing, are not shown.
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
    axis.set(
        xscale="log",
        xlabel="predicted complexity of one encrypted beat",
        ylabel="balanced accuracy (%), rows of ranking",
        title=f"Quantized networks: accuracy against predicted cost, mean and range of {TRIALS} trainings",
    )
    axis.legend()
    save_figure(figure, path)


def describe_settings(
    args: argparse.Namespace, data: Dataset, start: networks.MLP, baseline: networks.MLP
) -> dict[str, Any]:
    """Return the settings sheet: machine, versions, options, and what the columns mean."""
    before = ", ".join(f"{name} {start.balanced_accuracy(data.parts[name]):.4f}" for name in ("val", "test"))
    return {
        **cli.machine_facts(),
        "start": f"tf_pruned_model.h5, {before}",
        "teacher": f"MLP_model_0.h5, on the rows of ranking {baseline.balanced_accuracy(data.ranking):.4f}",
        "ranking_*": "on the rows by which networks are chosen and ranked: the validation part; of unseen patients the "
        "records of the training part too",
        "rank": f"by cost among those at most {100 * args.max_loss:g} points below the teacher when quantized",
        "predicted_complexity": "neurons times the complexity of one PBS at their rounding bits, output and p_error",
        "*_simulated": f"with the noise of p_error, mean of {quantized.NOISE_DRAWS} draws; of {TRIALS} trainings "
        "(trials) the best by ranking_* is chosen; a difference within the trials' standard deviation is none",
        "fine_tune_epochs": args.fine_tune_epochs,
        "quantization_epochs": args.quantization_epochs,
        "min_width": args.min_width,
        "seed": args.seed,
        "latency": f"median and interquartile range of {CYCLES} cycles, not encrypted",
        "rows": f"validation {len(data.val.y)}, test {len(data.test.y)}",
    }


def print_table(table: pd.DataFrame) -> None:
    """Print the columns that a reader needs first, with the rank of each saved network."""
    shown = "rate_percent hidden_layers val_balanced_accuracy test_balanced_accuracy quantized_bits rounding_bits pbs"
    shown += f" quantized_{quantized.RANKING} quantized_test_balanced_accuracy_simulated quantized_test_trials_sd"
    names = [name for name in [*shown.split(), "predicted_complexity"] if name in table]
    printed = table[names].assign(rank=table["file"].str.split("_").str[3])
    print(f"\n{printed.to_string(index=False, formatters={'predicted_complexity': '{:.2e}'.format})}\n")


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
    what = "0: leave quantization to step 5"
    option("--quantization-epochs", type=cli.natural_int, default=QUANTIZATION_EPOCHS, help=what)
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
    mlps, rows, least = {}, [], baseline.balanced_accuracy(data.ranking) - args.max_loss
    for rate, (removed, *tuned) in tqdm(stages.items(), desc="measuring", unit="rate"):
        mlps[rate] = [removed, *tuned][-1]
        before = {"rate_percent": rate, "val_balanced_accuracy_before_tuning": removed.balanced_accuracy(data.val)}
        rows.append({**before, **measure(mlps[rate], data)})
        if rate in found:
            add_quantized(rows[-1], found[rate], least)
    table = pd.DataFrame(rows)
    table["file"] = save_best(mlps, found, table, rank(table, least), workdir)
    check_saved(table, data, workdir)
    sheets = {"results": table, "settings": settings_sheet(describe_settings(args, data, start, baseline))}
    (workdir / "dynamic_pruning_cost.png").unlink(missing_ok=True)
    if found:
        parts = [one.drop(columns="network").assign(rate_percent=rate) for rate, one in sorted(found.items())]
        sheets["quantized"] = pd.concat(parts)[["rate_percent", *parts[0].columns[:-1]]]
        plot_cost(sheets["quantized"], least + args.max_loss, args.max_loss, workdir / "dynamic_pruning_cost.png")
    write_workbook(workdir / "dynamic_pruning_results.xlsx", sheets)
    cli.write_json(workdir / "dynamic_pruning_metrics.json", {"rates": table.to_dict("records")})
    before = {name: start.balanced_accuracy(data.parts[name]) for name in ("val", "test")}
    plot_results(table, before, workdir)
    print_table(table)
    print(f"wrote {sum(map(bool, table['file']))} networks pruned_model_top_*.h5, dynamic_pruning_results.xlsx and")
    print(f"dynamic_pruning_*.png to {workdir}")


if __name__ == "__main__":
    cli.run(main)
