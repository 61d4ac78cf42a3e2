"""Step 1: train the baseline network that the later steps make small, a float MLP of four hidden layers.

Reads   data/Arryth_MITBIH_{train,val,test}_{X,y}.npy, of any number of columns (python preprocess_mitbih.py makes them)
Writes  to --workdir: MLP_model_0.h5, MLP_model_0_metrics.json, MLP_model_0_training.png, MLP_model_0_roc.png
Run     python MLP_model_0.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fhe_mlp.arrays import beats_of, load_arrays
from fhe_mlp.cli import check_writable, make_parser, positive_float, positive_int, run, write_json
from fhe_mlp.networks import balanced_weights, epoch_progress, load_mlp, save_mlp, start_tensorflow
from fhe_mlp.report import save_figure

if TYPE_CHECKING:
    import tf_keras

HIDDEN = (64, 64, 32, 16)  # neurons of each hidden layer
DROPOUT = 0.2  # share of inputs dropped after each of the first three hidden layers
LEARNING_RATE = 1e-3  # of Adam
BATCH_SIZE = 64  # beats a gradient step
EPOCHS = 100  # at most; early stopping usually ends before
PATIENCE = 20  # epochs without a better validation loss


def build_mlp(features: int, hidden: Sequence[int], dropout: float, learning_rate: float) -> tf_keras.Sequential:
    """Compiled MLP from `features` to one probability of an abnormal beat; dropout after all but the last hidden."""
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.Input((features,))])
    for number, neurons in enumerate(hidden, 1):
        model.add(tf_keras.layers.Dense(neurons, "relu", name=f"hidden_{number}"))
        if number < len(hidden):
            model.add(tf_keras.layers.Dropout(dropout, name=f"dropout_{number}"))
    model.add(tf_keras.layers.Dense(1, "sigmoid", name="output"))
    optimizer = tf_keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"], weighted_metrics=[])
    return model


def classification_metrics(y: np.ndarray, probability: np.ndarray, aami: np.ndarray | None) -> dict[str, Any]:
    """Figures of merit at threshold 0.5.

    y: labels (n,) of 0 and 1; probability: (n,) of label 1; aami: class of each row (n,), where known.
    Recall is the sensitivity and precision the positive predictive value of ANSI/AAMI EC57.
    """
    from sklearn.metrics import confusion_matrix, roc_auc_score

    predicted = probability > 0.5
    (tn, fp), (fn, tp) = confusion_matrix(y, predicted, labels=[0, 1]).tolist()
    recall, specificity, precision = tp / (tp + fn), tn / (tn + fp), tp / max(1, tp + fp)
    metrics = {
        "rows": len(y),
        "accuracy": (tp + tn) / len(y),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": precision,
        "recall": recall,
        "specificity": specificity,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "auc": float(roc_auc_score(y, probability)),
        "confusion_matrix": {"tn": tn, "fp": fp, "fn": fn, "tp": tp},
    }
    if aami is not None:
        abnormal = [c for c in "SVFQ" if (aami == c).any()]
        metrics["sensitivity_by_class"] = {c: float(predicted[aami == c].mean()) for c in abnormal}
    return metrics


def aami_of_test_rows(data_dir: Path) -> np.ndarray | None:
    """AAMI class of each test row (n,), or None where the arrays come without it."""
    beats = beats_of(data_dir)
    return None if beats is None else beats.loc[beats["split"] == "test", "aami"].to_numpy()


def plot_training(history: dict[str, list[float]], path: Path) -> None:
    """Loss and accuracy by epoch, training against validation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    epochs = np.arange(1, len(history["loss"]) + 1)
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("binary cross-entropy", "share of beats")):
        axis.plot(epochs, history[name], label="training (dropout on)")
        axis.plot(epochs, history[f"val_{name}"], label="validation")
        axis.axvline(1 + int(np.argmin(history["val_loss"])), color="grey", ls=":", label="weights kept")
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


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, reload, and report the reloaded network."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=positive_int, default=EPOCHS, help="most passes over the training part")
    parser.add_argument(
        "--patience", type=positive_int, default=PATIENCE, help="epochs without a better validation loss"
    )
    parser.add_argument("--batch-size", type=positive_int, default=BATCH_SIZE, help="beats a gradient step")
    parser.add_argument("--learning-rate", type=positive_float, default=LEARNING_RATE, help="of Adam")
    args = parser.parse_args(argv)
    check_writable(args.workdir)
    data = load_arrays(args.data_dir)
    keras = start_tensorflow(args.seed)
    (X, y), (X_val, y_val), (X_test, y_test) = (data[split] for split in ("train", "val", "test"))

    model = build_mlp(X.shape[1], HIDDEN, DROPOUT, args.learning_rate)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=args.patience, restore_best_weights=True)
    history = model.fit(
        X,
        y,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=(X_val, y_val, balanced_weights(y_val)),
        callbacks=[stop, epoch_progress("training", args.epochs)],
        verbose=0,
    ).history
    path = args.workdir / "MLP_model_0.h5"
    save_mlp(model, path)

    model = load_mlp(path, "python MLP_model_0.py")
    val_probability, probability = (model(x).numpy()[:, 0] for x in (X_val, X_test))
    metrics = {
        "parameters": model.count_params(),
        "epochs": len(history["loss"]),
        "best_epoch": 1 + int(np.argmin(history["val_loss"])),
        "seed": args.seed,
        "validation": classification_metrics(y_val, val_probability, None),
        "test": classification_metrics(y_test, probability, aami_of_test_rows(args.data_dir)),
    }
    write_json(args.workdir / "MLP_model_0_metrics.json", metrics)
    plot_training(history, args.workdir / "MLP_model_0_training.png")
    plot_roc(y_test, probability, metrics["test"]["auc"], args.workdir / "MLP_model_0_roc.png")

    rows = {part: {k: v for k, v in metrics[part].items() if isinstance(v, float)} for part in ("validation", "test")}
    print(f"\n{pd.DataFrame(rows).to_string(float_format='{:.4f}'.format)}")
    print("confusion matrix of the test set:", metrics["test"]["confusion_matrix"])
    for name, share in metrics["test"].get("sensitivity_by_class", {}).items():
        print(f"sensitivity for class {name}: {share:.4f}")
    print(f"wrote MLP_model_0.h5, _metrics.json, _training.png and _roc.png to {args.workdir}")


if __name__ == "__main__":
    run(main)
