"""Step 2: zero a growing share of the baseline's weights while training goes on (TFMOT, polynomial decay).

Structured: whole blocks of a neuron's incoming weights are zeroed together, because the cost of an encrypted network
falls only with its neurons; step 3 removes those with the most zeros. The output layer is left whole. Training rows are
drawn and the features noised as in step 1.

Reads   MLP_model_0.h5 in --workdir (python MLP_model_0.py makes it) and the arrays in --data-dir
Writes  to --workdir: tf_pruned_model.h5, tf_pruned_model_metrics.json, tf_pruned_model_training.png
Run     python TF_pruning.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fhe_mlp import cli, networks
from fhe_mlp.dataset import Dataset
from fhe_mlp.experiments import save_figure

if TYPE_CHECKING:
    import tf_keras

INITIAL_SPARSITY, FINAL_SPARSITY = 0.25, 0.75  # share of zero weights in each hidden layer, first and last
EPOCHS = 20  # all of them under the schedule
BATCH_SIZE = 32  # beats a gradient step
LEARNING_RATE = 1e-3  # of Adam
UPDATE_EVERY = 50  # gradient steps between two updates of the masks
BLOCK_ROWS = "4"  # incoming weights of a neuron zeroed together; docs/RESULTS.md compares it with 1, 8 and all


def block_mask(weights: Any, rows: str, choose: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return threshold and mask of a kernel (inputs, neurons); 0 where a block of a neuron's weights is zeroed.

    rows: weights of a block, a number or "neuron". Blocks are ranked by their mean absolute weight; `choose(means)` is
    TFMOT's rule for single values, which returns the threshold and a mask of the blocks. A last block that `rows` does
    not fill counts by its own mean.
    """
    import tensorflow as tf

    block_of_row = np.arange(len(weights)) // (len(weights) if rows == "neuron" else int(rows))
    means = tf.math.unsorted_segment_mean(tf.abs(weights), block_of_row, int(block_of_row[-1]) + 1)
    threshold, kept = choose(means)
    return threshold, tf.gather(kept, block_of_row)


def wrap_for_pruning(model: tf_keras.Sequential, steps: int, args: argparse.Namespace) -> tf_keras.Sequential:
    """Return `model` with hidden Dense layers that prune themselves over `steps` gradient steps.

    The schedule, of Zhu & Gupta, "To prune, or not to prune", arXiv:1710.01878 (TFMOT's PolynomialDecay, power 3), ends
    at the last update of the masks, so that the final sparsity is reached exactly.
    """
    import tf_keras
    from tensorflow_model_optimization.sparsity.keras import PolynomialDecay, prune_low_magnitude

    every = min(UPDATE_EVERY, max(1, steps - 1))
    end_step = (steps - 1) // every * every or 1  # TFMOT counts from 0
    schedule = PolynomialDecay(args.initial_sparsity, args.final_sparsity, 0, end_step, frequency=every)
    *layers, output = model.layers
    layers = [prune_low_magnitude(layer, schedule) if hasattr(layer, "kernel") else layer for layer in layers]
    wrapped = tf_keras.Sequential([tf_keras.layers.Input(model.input_shape[1:]), *layers, output])
    for pruning in (layer.pruning_obj for layer in layers if hasattr(layer, "pruning_obj")):
        # TFMOT's own blocks cannot span a whole column.
        pruning._maybe_update_block_mask = partial(block_mask, rows=args.block_rows, choose=pruning._update_mask)
    return wrapped


def layer_sparsity(model: tf_keras.Sequential) -> dict[str, float]:
    """Return the share of zero weights in the kernel of each Dense layer, wrapped or not."""
    layers = [getattr(layer, "layer", layer) for layer in model.layers]
    return {layer.name: float(np.mean(layer.kernel.numpy() == 0)) for layer in layers if hasattr(layer, "kernel")}


def plot_epochs(sparsity: list[dict[str, float]], val_accuracy: list[float], before: float, path: Path) -> None:
    """Draw the sparsity of each pruned layer, and validation accuracy, by epoch."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    table = 100 * pd.DataFrame(sparsity, index=range(1, len(sparsity) + 1)).assign(accuracy=val_accuracy)
    for place, name in enumerate(table.columns[:-2]):  # they nearly coincide: the later ones thinner
        axes[0].plot(table[name], linewidth=9 - 2.5 * place, label=name)
    axes[0].set(ylabel="zero weights (%)", title="Structured pruning: sparsity of the hidden layers", ylim=(0, 100))
    axes[0].legend()
    axes[1].plot(table["accuracy"], marker=".", label="while pruning")
    axes[1].axhline(100 * before, color="grey", ls="--", label="before pruning")
    axes[1].set(xlabel="epoch", ylabel="validation accuracy (%)", title="Validation accuracy", xticks=table.index)
    axes[1].legend()
    save_figure(figure, path)


def block_rows(text: str) -> str:
    """argparse type: 'neuron' or a positive number of rows."""
    if text != "neuron" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive number of rows or 'neuron'")
    return text


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = cli.make_parser(__doc__)
    option, share = parser.add_argument, cli.number(float, 0, cli.BELOW_ONE, "a number from 0 to less than 1")
    what = "incoming weights of a neuron that are zeroed together: a number (1: single weights) or 'neuron' (all)"
    option("--block-rows", type=block_rows, default=BLOCK_ROWS, help=what)
    option("--initial-sparsity", type=share, default=INITIAL_SPARSITY, help="zero weights at the start")
    option("--final-sparsity", type=share, default=FINAL_SPARSITY, help="zero weights at the end")
    what = "each of as many drawn rows as a balanced training part has"
    option("--epochs", type=cli.positive_int, default=EPOCHS, help=what)
    option("--batch-size", type=cli.positive_int, default=BATCH_SIZE, help="beats a gradient step")
    option("--learning-rate", type=cli.positive_float, default=LEARNING_RATE, help="of Adam")
    args = parser.parse_args(argv)
    if args.initial_sparsity > args.final_sparsity:
        parser.error("--initial-sparsity must not be above --final-sparsity")
    return args


def prune(
    mlp: networks.MLP, data: Dataset, args: argparse.Namespace
) -> tuple[networks.MLP, list[dict[str, float]], list[float]]:
    """Return the network with zeros, stripped of TFMOT's wrappers, and sparsity and validation accuracy by epoch."""
    import tf_keras
    from tensorflow_model_optimization.sparsity.keras import UpdatePruningStep, strip_pruning

    val, adam = data.val, tf_keras.optimizers.Adam(args.learning_rate)
    steps = args.epochs * -(-networks.epoch_rows(data.train.y) // args.batch_size)
    wrapped = wrap_for_pruning(networks.to_train(mlp, args.seed), steps, args)
    wrapped.compile(adam, "binary_crossentropy", metrics=["accuracy"], weighted_metrics=[])
    sparsity: list[dict[str, float]] = []
    record = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: sparsity.append(layer_sparsity(wrapped)))
    history = wrapped.fit(
        networks.training_draws(data, args.batch_size, args.seed),
        epochs=args.epochs,
        validation_data=(val.X, val.y, networks.balanced_weights(val.y)),
        callbacks=[UpdatePruningStep(), record, networks.epoch_progress("pruning", args.epochs)],
        verbose=0,
    ).history
    return networks.trained(strip_pruning(wrapped), mlp), sparsity, history["val_accuracy"]


def main(argv: Sequence[str] | None = None) -> None:
    """Prune, strip, save, reload, and report the reloaded network."""
    args = parse_arguments(argv)
    cli.check_writable(args.workdir)
    mlp, data = networks.load_with_data(args.workdir / "MLP_model_0.h5", "python MLP_model_0.py", args.data_dir)
    networks.start_tensorflow(args.seed)
    pruned, sparsity, val_accuracy = prune(mlp, data, args)
    path = args.workdir / "tf_pruned_model.h5"
    networks.save_mlp(pruned, path)
    reloaded = networks.load_mlp(path, "python TF_pruning.py")
    stages = {
        stage: {name: data.parts[name].figures(network.decisions(data.parts[name].X)) for name in ("val", "test")}
        for stage, network in (("before", mlp), ("after", pruned), ("reloaded", reloaded))
    }
    final = layer_sparsity(networks.to_keras(reloaded))
    metrics = {"block_rows": args.block_rows, "seed": args.seed, "figures": stages, "sparsity": final}
    cli.write_json(args.workdir / "tf_pruned_model_metrics.json", metrics)
    before = stages["before"]["val"]["accuracy"]
    plot_epochs(sparsity, val_accuracy, before, args.workdir / "tf_pruned_model_training.png")
    shown = {stage: {name: one["balanced_accuracy"] for name, one in found.items()} for stage, found in stages.items()}
    print(f"\n{pd.DataFrame(shown).rename_axis('balanced accuracy').to_string(float_format='{:.4f}'.format)}\n")
    print(pd.Series(final, name="zero weights").map("{:.1%}".format).to_string())
    print(f"wrote tf_pruned_model.h5, _metrics.json and _training.png to {args.workdir}")


if __name__ == "__main__":
    cli.run(main)
