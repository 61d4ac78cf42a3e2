"""Step 1: train the baseline network that the later steps make small, a float MLP of four hidden layers.

Where the validation records hold no patient of the training part (preprocess_mitbih.py --split inter-patient), training
rows are drawn by class and record, so that no patient and no common class dominates, and get Gaussian noise, so that
the network does not learn who the patient is; training is shorter. These are the best settings on folds over the
patients of DS1. Where other beats of the test patients are known, all rows are equal and there is no noise.
The decision threshold is chosen on validation rows and moved to 0.5 through the last bias, so that in all later steps,
encrypted ones too, the sign of the logit decides.

Reads   data/Arryth_MITBIH_{train,val,test}_{X,y}.npy, of any number of columns (python preprocess_mitbih.py makes them)
Writes  to --workdir: MLP_model_0.h5, MLP_model_0_metrics.json, MLP_model_0_training.png, MLP_model_0_roc.png and, where
        the records are known, MLP_model_0_records.png; with --folds only MLP_model_0_folds.json
Run     python MLP_model_0.py
        python MLP_model_0.py --folds 6         (cross-validation over the patients of training and validation part)
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp import cli, ecg, networks
from fhe_mlp.dataset import Dataset, Part, load_dataset
from fhe_mlp.experiments import save_figure
from fhe_mlp.scaling import NONE, public_map

HIDDEN = (64, 64, 32, 16)  # neurons of each hidden layer
LEARNING_RATE = 6e-3  # of Adam at its highest; docs/METHOD.md has what was tried
WARM_UP = 0.3  # of the gradient steps, in which the rate rises from START_SHARE; then it falls along a cosine
START_SHARE = 0.04  # of the learning rate, at the start
BATCH_SIZE = 256  # beats a gradient step
EPOCHS, EPOCHS_UNSEEN = 40, 12  # of as many rows as a balanced training part has; the second for unseen patients
NOISE, NOISE_UNSEEN = 0.0, 0.75  # standard deviations that are added to the standardised features in training
# Of others' arrays where a label has a smaller share than RARE: its rows with which the standard deviation is 1.
RARE, NOISE_ROWS = 0.25, 300
WEIGHT_DECAY = 1.0  # decoupled, with others' arrays: best where a linear network is, and no worse elsewhere
LEAST_FOUND = 0.1  # of a label's test rows; a network that finds fewer has learned nothing of it
# Probability that decides, where validation rows do not clearly ask for another. On the folds 0.5 to 0.8 have the same
# balanced accuracy, and 0.7 has far fewer false alarms.
THRESHOLD, THRESHOLD_UNSEEN = 0.5, 0.7


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; usual_threshold: where validation rows do not clearly ask for another."""

    hidden: Sequence[int]
    noise: float
    epochs: int
    batch_size: int
    learning_rate: float
    usual_threshold: float
    weight_decay: float
    seed: int


def usual_noise(data: Dataset, unseen: bool) -> float:
    """Return the standard deviation of what training adds to the features.

    Where a label is rare in others' arrays, it falls with the sixth root of its rows, as the width of a density
    estimated in two dimensions does (Silverman 1986); with 40 to 1,600 rows, less is overfitted and more is blurred.
    """
    rows = int(np.bincount(data.train.y).min())
    if data.train.named or rows >= RARE * len(data.train.y):
        return NOISE_UNSEEN if unseen else NOISE
    return float((NOISE_ROWS / rows) ** (1 / 6))


def new_mlp(data: Dataset, recipe: Recipe) -> networks.MLP:
    """Return an MLP from the columns of the data to one logit, with weights as Glorot & Bengio (AISTATS 2010) draw."""
    rng = np.random.default_rng(recipe.seed)
    layers = []
    for inputs, neurons in itertools.pairwise([data.train.X.shape[1], *recipe.hidden, 1]):
        limit = np.sqrt(6 / (inputs + neurons))
        layers.append((rng.uniform(-limit, limit, (inputs, neurons)).astype(np.float32), np.zeros(neurons, np.float32)))
    return networks.MLP(layers, recipe.noise, map=data.map)


def train(data: Dataset, recipe: Recipe) -> tuple[networks.MLP, dict[str, list[float]]]:
    """Return a network trained on draws of the training part, and losses and accuracies by epoch.

    Validation rows are watched only: the weights are those at the end, when the learning rate is 0.
    """
    import tf_keras

    steps = recipe.epochs * -(-networks.epoch_rows(data.train.y) // recipe.batch_size)
    rising, highest = int(WARM_UP * steps), recipe.learning_rate
    rate = tf_keras.optimizers.schedules.CosineDecay(
        START_SHARE * highest, steps - rising, warmup_target=highest, warmup_steps=rising
    )
    start = new_mlp(data, recipe)
    model = networks.to_train(start, recipe.seed)
    optimizer = tf_keras.optimizers.Adam(rate, weight_decay=recipe.weight_decay or None)
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"], weighted_metrics=[])
    history = model.fit(
        networks.training_draws(data, recipe.batch_size, recipe.seed),
        epochs=recipe.epochs,
        validation_data=(data.val.X, data.val.y, networks.balanced_weights(data.val.y)),
        callbacks=[networks.epoch_progress("training", recipe.epochs)],
        verbose=0,
    ).history
    return networks.trained(model, start), history


def figures(mlp: networks.MLP, part: Part) -> dict[str, Any]:
    """Return the figures of EC57 on a part of the data, with the area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    return {**part.figures(mlp.decisions(part.X)), "auc": float(roc_auc_score(part.y, mlp.probabilities(part.X)))}


def cross_validate(data: Dataset, folds: int, recipe: Recipe) -> dict[str, Any]:
    """Return figures on the beats of each patient of training and validation part when the others train a network.

    Copies of records (preprocess_mitbih.py, --s-majority) train with their patient, and are reported apart.
    The scaler is that of the arrays. Raises InputError with fewer patients than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    known = data.train.join(data.val)
    patient = known.beats["patient"]
    if (count := patient.nunique()) < folds:
        raise cli.InputError(f"--folds {folds}: the training and validation part have {count} known patients")
    decided = np.zeros_like(known.y)
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=recipe.seed)
    for others, held_out in split.split(known.X, known.beats["aami"], patient):
        mlp, _ = train(replace(data, train=known.take(others), val=known.take(held_out)), recipe)
        decided[held_out] = mlp.decided_at(recipe.usual_threshold).decisions(known.X[held_out])
    own = ~known.copied
    found = {"patients": known.take(own).figures(decided[own])}
    if not own.all():
        found["copies in which S is frequent"] = known.take(~own).figures(decided[~own])
    table = ecg.by_record(known.y[own], decided[own], known.beats[own])
    return {**found, "by_record": table.reset_index().to_dict("records")}


def plot_training(history: dict[str, list[float]], noise: float, path: Path) -> None:
    """Draw loss and accuracy by epoch, training against validation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    table = pd.DataFrame(history, index=range(1, len(history["loss"]) + 1))
    labels = ["training, with noise" if noise else "training", "validation"]
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("binary cross-entropy", "share of beats")):
        axis.plot(table[[name, f"val_{name}"]], label=labels)
        axis.set(xlabel="epoch", ylabel=f"{name} ({unit})", title=f"Baseline MLP: {name}")
        axis.legend()
    save_figure(figure, path)


def plot_roc(part: Part, mlp: networks.MLP, auc: float, path: Path) -> None:
    """Draw sensitivity against false alarms, with the corner that matters enlarged."""
    import matplotlib.pyplot as plt
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(part.y, mlp.probabilities(part.X))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    for axis, title in zip(axes, ("ROC of the test set", "its upper left corner")):
        axis.plot(100 * false_positive, 100 * true_positive, label=f"baseline MLP, AUC {auc:.4f}")
        axis.plot([0, 100], [0, 100], color="grey", ls="--", label="chance")
        axis.set(xlabel="normal beats called abnormal (%)", ylabel="abnormal beats found (%)", title=title)
        axis.legend(loc="lower right")
    axes[1].set(xlim=(0, 20), ylim=(80, 100.5))
    save_figure(figure, path)


def plot_records(table: pd.DataFrame, path: Path) -> None:
    """Draw the balanced accuracy of each record of the test set, the worst first; of one label, what is defined."""
    import matplotlib.pyplot as plt

    table = 100 * table[["balanced_accuracy", "sensitivity", "specificity"]]
    table["shown"] = table["balanced_accuracy"].fillna(table["specificity"]).fillna(table["sensitivity"])
    table = table.sort_values("shown")
    figure, axis = plt.subplots(figsize=(max(8, 0.3 * len(table)), 4.6))
    colour = np.where(table["balanced_accuracy"].notna(), "tab:blue", "lightgrey")
    axis.bar(table.index, table["shown"], color=colour)
    axis.plot(table["sensitivity"], "k^", ms=5, label="sensitivity")
    axis.plot(table["specificity"], "kv", ms=5, label="specificity")
    axis.set(ylabel="balanced accuracy (%)", xlabel="record (grey: beats of one label only)", ylim=(0, 103))
    axis.set_title("Baseline MLP: test set by record")
    axis.tick_params(axis="x", rotation=90)
    axis.legend(loc="lower right")
    save_figure(figure, path)


def print_figures(found: dict[str, dict[str, Any]]) -> None:
    """Print all figures, a column a set."""
    columns = []
    for one in found.values():
        ends = one.get("interval95", {}).items()
        columns.append({**one, "interval95": {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in ends}})
    table = pd.json_normalize(columns, sep=" ").set_axis(list(found)).astype(object).T
    print(f"\n{table.to_string(float_format='{:.4f}'.format, na_rep='')}")


def report_folds(data: Dataset, folds: int, recipe: Recipe, workdir: Path) -> None:
    """Cross-validate, write and print the figures."""
    found = cross_validate(data, folds, recipe)
    cli.write_json(workdir / "MLP_model_0_folds.json", {"folds": folds, **asdict(recipe), **found})
    shown = ["record", "beats", *"NSVF", *ecg.FIGURES]
    table = pd.DataFrame(found.pop("by_record"))[shown].sort_values("balanced_accuracy")
    print(f"\n{table.to_string(index=False, float_format='{:.3f}'.format, na_rep='')}")
    print_figures(found)
    print(f"wrote MLP_model_0_folds.json to {workdir}")


def report(mlp: networks.MLP, data: Dataset, recipe: Recipe, workdir: Path) -> None:
    """Write metrics and pictures of the saved network, and print its figures."""
    metrics = {
        "parameters": mlp.parameters,
        "unseen_patients": data.unseen,
        **asdict(recipe),
        "map": mlp.map,
        "threshold": mlp.threshold,
        "validation": figures(mlp, data.val),
        "test": figures(mlp, data.test),
    }
    if data.test.named:
        table = ecg.by_record(data.test.y, mlp.decisions(data.test.X), data.test.beats)
        metrics["test_by_record"] = table.reset_index().to_dict("records")
        plot_records(table, workdir / "MLP_model_0_records.png")
    cli.write_json(workdir / "MLP_model_0_metrics.json", metrics)
    for name in ("sensitivity", "specificity"):
        if metrics["test"][name] < LEAST_FOUND:
            print(
                f"warning: {name} {metrics['test'][name]:.3f} on test rows: nearly all get one label", file=sys.stderr
            )
    plot_roc(data.test, mlp, metrics["test"]["auc"], workdir / "MLP_model_0_roc.png")
    print_figures({part: metrics[part] for part in ("validation", "test")})
    print(f"decision threshold {mlp.threshold:.2f}; wrote MLP_model_0.h5, _metrics.json and pictures to {workdir}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = cli.make_parser(__doc__)
    option, default = parser.add_argument, "default: {:g}, for unseen patients {:g}".format
    option("--hidden", type=cli.positive_int, nargs="+", default=HIDDEN, help="neurons of each hidden layer")
    what = (
        f"standard deviation added to the features ({default(NOISE, NOISE_UNSEEN)}, where a label is rare by its rows)"
    )
    option("--noise", type=cli.number(float, 0, sys.float_info.max, "a number from 0"), help=what)
    what = f"each of as many drawn rows as a balanced training part has ({default(EPOCHS, EPOCHS_UNSEEN)})"
    option("--epochs", type=cli.positive_int, help=what)
    option("--batch-size", type=cli.positive_int, default=BATCH_SIZE, help="beats a gradient step")
    option("--learning-rate", type=cli.positive_float, default=LEARNING_RATE, help="of Adam, at its highest")
    chance = cli.number(float, sys.float_info.min, cli.BELOW_ONE, "a number between 0 and 1")
    usual = f"{default(THRESHOLD, THRESHOLD_UNSEEN)}, unless validation rows clearly ask for another"
    option("--threshold", type=chance, help=f"probability that decides ({usual})")
    option("--expand", type=public_map, default=NONE, help="public map of the features: none or fourier:N")
    option("--folds", type=cli.positive_int, help="cross-validate over patients in so many parts; trains no baseline")
    args = parser.parse_args(argv)
    if args.folds == 1:
        parser.error("--folds needs at least 2")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, reload, and report the reloaded network."""
    args = parse_arguments(argv)
    cli.check_writable(args.workdir)
    data = load_dataset(args.data_dir, args.expand)
    unseen = data.train.named and (bool(args.folds) or data.unseen)  # folds hold out whole patients
    recipe = Recipe(
        args.hidden,
        usual_noise(data, unseen) if args.noise is None else args.noise,
        args.epochs or (EPOCHS_UNSEEN if unseen else EPOCHS),
        args.batch_size,
        args.learning_rate,
        args.threshold or (THRESHOLD_UNSEEN if unseen else THRESHOLD),
        0.0 if data.train.named else WEIGHT_DECAY,
        args.seed,
    )
    networks.start_tensorflow(args.seed)
    if args.folds:
        report_folds(data, args.folds, recipe, args.workdir)
        return
    mlp, history = train(data, recipe)
    val, patients = data.val, data.val.beats["patient"].to_numpy()
    chosen = ecg.choose_threshold(mlp.probabilities(val.X), val.y, patients, recipe.usual_threshold)
    path = args.workdir / "MLP_model_0.h5"
    networks.save_mlp(mlp.decided_at(args.threshold or chosen), path)
    plot_training(history, recipe.noise, args.workdir / "MLP_model_0_training.png")
    report(networks.load_mlp(path, "python MLP_model_0.py"), data, recipe, args.workdir)


if __name__ == "__main__":
    cli.run(main)
