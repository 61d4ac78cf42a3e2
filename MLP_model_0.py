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

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fhe_mlp import ec57
from fhe_mlp.arrays import (
    Arrays,
    Rows,
    draw_probability,
    load_arrays,
    patients,
    rows_of,
    training_probability,
    unseen_patients,
)
from fhe_mlp.cli import (
    BELOW_ONE,
    InputError,
    check_writable,
    make_parser,
    number,
    positive_float,
    positive_int,
    run,
    write_json,
)
from fhe_mlp.expansion import NONE, expansion
from fhe_mlp.networks import (
    balanced_weights,
    build,
    decisions,
    epoch_progress,
    epoch_rows,
    load_mlp,
    save_mlp,
    shift_logit,
    start_tensorflow,
    training_draws,
)
from fhe_mlp.pictures import save_figure

if TYPE_CHECKING:
    import tf_keras

HIDDEN = (64, 64, 32, 16)  # neurons of each hidden layer
LEARNING_RATE = 6e-3  # of Adam at its highest; docs/METHOD.md has what was tried
WARM_UP = 0.3  # of the gradient steps, in which the rate rises from START_SHARE; then it falls along a cosine
START_SHARE = 0.04  # of the learning rate, at the start
BATCH_SIZE = 256  # beats a gradient step
EPOCHS, EPOCHS_UNSEEN = 40, 12  # of as many rows as a balanced training part has; the second for unseen patients
NOISE, NOISE_UNSEEN = 0.0, 0.75  # standard deviations that are added to the standardised features in training
# Probability that decides, where validation rows do not clearly ask for another. On the folds 0.5 to 0.8 have the same
# balanced accuracy, and 0.7 has far fewer false alarms.
THRESHOLD, THRESHOLD_UNSEEN = 0.5, 0.7


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    hidden: Sequence[int]
    noise: float
    epochs: int
    batch_size: int
    learning_rate: float
    usual_threshold: float
    seed: int


def new_mlp(features: int, recipe: Recipe) -> tf_keras.Sequential:
    """MLP from `features` to one probability of an abnormal beat; weights as Glorot & Bengio (AISTATS 2010) draw."""
    rng = np.random.default_rng(recipe.seed)
    widths, layers = [features, *recipe.hidden, 1], []
    for inputs, neurons in itertools.pairwise(widths):
        limit = np.sqrt(6 / (inputs + neurons))
        layers.append((rng.uniform(-limit, limit, (inputs, neurons)).astype(np.float32), np.zeros(neurons, np.float32)))
    return build(layers, recipe.noise)


def train(
    rows: Rows, probability: np.ndarray, recipe: Recipe, watched: Rows | None = None
) -> tuple[tf_keras.Sequential, dict[str, list[float]]]:
    """A network trained on draws of `rows`, each with its probability (n,), and losses by epoch.

    watched: rows and labels whose loss is recorded too. The weights are those at the end, when the learning rate is 0.
    """
    import tf_keras

    steps = recipe.epochs * -(-epoch_rows(rows[1]) // recipe.batch_size)
    warm_up = int(WARM_UP * steps)
    rate = tf_keras.optimizers.schedules.CosineDecay(
        START_SHARE * recipe.learning_rate,
        steps - warm_up,
        warmup_target=recipe.learning_rate,
        warmup_steps=warm_up,
    )
    model = new_mlp(rows[0].shape[1], recipe)
    model.compile(tf_keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"], weighted_metrics=[])
    history = model.fit(
        training_draws(*rows, probability, recipe.batch_size, recipe.seed),
        epochs=recipe.epochs,
        validation_data=None if watched is None else (*watched, balanced_weights(watched[1])),
        callbacks=[epoch_progress("training", recipe.epochs)],
        verbose=0,
    ).history
    return model, history


def move_threshold(
    model: tf_keras.Sequential, val: Rows, beats: pd.DataFrame, usual: float, asked: float | None
) -> float:
    """The threshold, `asked` or chosen on validation rows, after moving it to 0.5 in `model`, in place."""
    chosen = asked or ec57.choose_threshold(model(val[0]).numpy()[:, 0], val[1], patients(beats), usual)
    shift_logit(model, -np.log(chosen / (1 - chosen)))
    return chosen


def figures(model: tf_keras.Sequential, rows: Rows, beats: pd.DataFrame, named: bool) -> dict[str, Any]:
    """Figures of EC57 on `rows`, with the area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    found = ec57.figures(rows[1], decisions(model, rows[0]), beats if named else None)
    return {**found, "auc": float(roc_auc_score(rows[1], model(rows[0]).numpy()[:, 0]))}


def cross_validate(data: Arrays, beats: dict[str, pd.DataFrame], folds: int, recipe: Recipe) -> dict[str, Any]:
    """Figures on the beats of each patient of the training and validation part when the others train a network.

    Copies of records (preprocess_mitbih.py, --s-majority) train with their patient, and are reported apart.
    The scaler is that of the arrays. Raises InputError with fewer patients than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    X, y = (np.concatenate([data[split][k] for split in ("train", "val")]) for k in (0, 1))
    beats = pd.concat([beats["train"], beats["val"]], ignore_index=True)
    patient = patients(beats)
    if len(set(patient)) < folds:
        raise InputError(f"--folds {folds}: the training and validation part have {len(set(patient))} known patients")
    decided = np.zeros_like(y)
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=recipe.seed)
    for others, held_out in split.split(X, beats["aami"], patient):
        model, _ = train((X[others], y[others]), draw_probability(beats.iloc[others]), recipe)
        decided[held_out] = model(X[held_out]).numpy()[:, 0] > recipe.usual_threshold
    original = (patient == beats["record"]).to_numpy()
    found = {"patients": ec57.figures(y[original], decided[original], beats[original])}
    table = ec57.by_record(y[original], decided[original], beats[original])
    if not original.all():
        found["copies in which S is frequent"] = ec57.figures(y[~original], decided[~original], beats[~original])
    return {**found, "by_record": table.reset_index().to_dict("records")}


def plot_training(history: dict[str, list[float]], path: Path) -> None:
    """Loss and accuracy by epoch, training against validation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    epochs = np.arange(1, len(history["loss"]) + 1)
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("binary cross-entropy", "share of beats")):
        axis.plot(epochs, history[name], label="training (with noise)")
        axis.plot(epochs, history[f"val_{name}"], label="validation")
        axis.set(xlabel="epoch", ylabel=f"{name} ({unit})", title=f"Baseline MLP: {name}")
        axis.legend()
    save_figure(figure, path)


def plot_roc(y: np.ndarray, probability: np.ndarray, auc: float, path: Path) -> None:
    """Sensitivity against false alarms on the test set, with the corner that matters enlarged."""
    import matplotlib.pyplot as plt
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(y, probability)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    for axis, title in zip(axes, ("ROC of the test set", "its upper left corner")):
        axis.plot(100 * false_positive, 100 * true_positive, label=f"baseline MLP, AUC {auc:.4f}")
        axis.plot([0, 100], [0, 100], color="grey", ls="--", label="chance")
        axis.set(xlabel="normal beats called abnormal (%)", ylabel="abnormal beats found (%)", title=title)
        axis.legend(loc="lower right")
    axes[1].set(xlim=(0, 20), ylim=(80, 100.5))
    save_figure(figure, path)


def plot_records(table: pd.DataFrame, path: Path) -> None:
    """Balanced accuracy of each record of the test set, the worst first; of records with one label, what is defined."""
    import matplotlib.pyplot as plt

    shown = table.assign(shown=table["balanced_accuracy"].fillna(table["specificity"]).fillna(table["sensitivity"]))
    shown = shown.sort_values("shown")
    both = shown["balanced_accuracy"].notna()
    figure, axis = plt.subplots(figsize=(max(8, 0.3 * len(shown)), 4.6))
    axis.bar(shown.index, 100 * shown["shown"], color=["tab:blue" if one else "lightgrey" for one in both])
    for kind, marker in (("sensitivity", "^"), ("specificity", "v")):
        axis.plot(shown.index, 100 * shown[kind], marker, color="black", ms=5, ls="none", label=kind)
    axis.set(ylabel="balanced accuracy (%)", xlabel="record (grey: beats of one label only)", ylim=(0, 103))
    axis.set_title("Baseline MLP: test set by record")
    axis.tick_params(axis="x", rotation=90)
    axis.legend(loc="lower right")
    save_figure(figure, path)


def print_figures(found: dict[str, dict[str, Any]]) -> None:
    """Gross figures with their intervals, averages over records and shares found of each class, a column a set."""
    rows: dict[str, dict[str, str]] = {}
    for title, one in found.items():
        column = {"beats": f"{one['beats']}", "accuracy": f"{one['accuracy']:.4f}"}
        for name in ec57.FIGURES:
            low, high = one.get("interval95", {}).get(name) or (np.nan, np.nan)
            column[name] = f"{one[name]:.4f}" + (f" ({low:.3f} to {high:.3f})" if low == low else "")
            if "average" in one:
                column[f"{name}, mean of records"] = f"{one['average'][name]:.4f}"
        column |= {f"class {c} found": f"{share:.4f}" for c, share in one.get("found", {}).items()}
        rows[title] = column
    print(f"\n{pd.DataFrame(rows).fillna('').to_string()}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, reload, and report the reloaded network."""
    parser = make_parser(__doc__)
    option = parser.add_argument
    option("--hidden", type=positive_int, nargs="+", default=HIDDEN, help="neurons of each hidden layer")
    option(
        "--noise",
        type=number(float, 0, sys.float_info.max, "a number from 0"),
        help=f"standard deviation added to the features (default: {NOISE:g}, for unseen patients {NOISE_UNSEEN:g})",
    )
    option(
        "--epochs",
        type=positive_int,
        help="each of as many drawn rows as a balanced training part has "
        f"(default: {EPOCHS}, for unseen patients {EPOCHS_UNSEEN})",
    )
    option("--batch-size", type=positive_int, default=BATCH_SIZE, help="beats a gradient step")
    option("--learning-rate", type=positive_float, default=LEARNING_RATE, help="of Adam, at its highest")
    option(
        "--threshold",
        type=number(float, sys.float_info.min, BELOW_ONE, "a number between 0 and 1"),
        help=f"probability that decides (default: {THRESHOLD:g}, for unseen patients {THRESHOLD_UNSEEN:g}, unless "
        "validation rows clearly ask for another)",
    )
    option("--expand", type=expansion, default=NONE, help="public map of the features: none, products or fourier:N")
    option("--folds", type=positive_int, help="cross-validate over patients in so many parts; trains no baseline")
    args = parser.parse_args(argv)
    if args.folds == 1:
        parser.error("--folds needs at least 2")
    check_writable(args.workdir)
    data = load_arrays(args.data_dir, args.expand)
    beats, named = rows_of(args.data_dir, data)
    unseen = named and (bool(args.folds) or unseen_patients(beats))  # folds hold out whole patients
    recipe = Recipe(
        args.hidden,
        (NOISE_UNSEEN if unseen else NOISE) if args.noise is None else args.noise,
        args.epochs or (EPOCHS_UNSEEN if unseen else EPOCHS),
        args.batch_size,
        args.learning_rate,
        args.threshold or (THRESHOLD_UNSEEN if unseen else THRESHOLD),
        args.seed,
    )
    start_tensorflow(args.seed)
    if args.folds:
        found = {"folds": args.folds, **vars(recipe), **cross_validate(data, beats, args.folds, recipe)}
        write_json(args.workdir / "MLP_model_0_folds.json", found)
        shown = ["record", "beats", *"NSVF", *ec57.FIGURES]
        table = pd.DataFrame(found["by_record"])[shown].sort_values("balanced_accuracy")
        print(f"\n{table.to_string(index=False, float_format='{:.3f}'.format, na_rep='')}")
        print_figures({title: one for title, one in found.items() if isinstance(one, dict)})
        print(f"wrote MLP_model_0_folds.json to {args.workdir}")
        return

    model, history = train(data["train"], training_probability(beats), recipe, data["val"])
    chosen = move_threshold(model, data["val"], beats["val"], recipe.usual_threshold, args.threshold)
    path = args.workdir / "MLP_model_0.h5"
    save_mlp(model, path)

    model = load_mlp(path, "python MLP_model_0.py")
    (X_test, y_test), probability = data["test"], model(data["test"][0]).numpy()[:, 0]
    metrics = {
        "parameters": model.count_params(),
        "unseen_patients": unseen,
        **vars(recipe),
        "expand": args.expand,
        "threshold": chosen,
        "validation": figures(model, data["val"], beats["val"], named),
        "test": figures(model, data["test"], beats["test"], named),
    }
    written = ["MLP_model_0.h5", "_metrics.json", "_training.png", "_roc.png"]
    if named:
        table = ec57.by_record(y_test, decisions(model, X_test), beats["test"])
        metrics["test_by_record"] = table.reset_index().to_dict("records")
        plot_records(table, args.workdir / "MLP_model_0_records.png")
        written.append("_records.png")
    write_json(args.workdir / "MLP_model_0_metrics.json", metrics)
    plot_training(history, args.workdir / "MLP_model_0_training.png")
    plot_roc(y_test, probability, metrics["test"]["auc"], args.workdir / "MLP_model_0_roc.png")

    print_figures({part: metrics[part] for part in ("validation", "test")})
    print(f"decision threshold {chosen:.2f}; counts of the test set: {metrics['test']['counts']}")
    print(f"wrote {', '.join(written)} to {args.workdir}")


if __name__ == "__main__":
    run(main)
