"""Float networks of steps 1 to 4: TensorFlow's start, whole .h5 files, training draws, the noise they learn with."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp import ec57
from fhe_mlp.cli import InputError, first_line, whole_file
from fhe_mlp.expansion import NONE, expansion

if TYPE_CHECKING:
    import h5py
    import tf_keras

Layers = list[tuple[np.ndarray, np.ndarray]]  # kernel (inputs, neurons) and bias (neurons,) of each Dense layer
START_UP_NOISE = re.compile(
    r"^I\d{4} | I tensorflow|Unable to register cu|computation placer already|cuInit|"
    r"All log messages before absl|^To enable the following instructions"
)
HEAP = re.compile(rb"GCOL\x01...(.{8})", re.DOTALL)  # start of a global heap of an HDF5 file, and its size
MOST_NEURONS = 4096  # a layer, inputs too; more in a file are a damaged number


def stream(seed: int, rate: int) -> int:
    """Seed of the random numbers of one rate, which share no draw with those of another rate or seed."""
    return int(np.random.SeedSequence([seed, rate]).generate_state(1)[0])


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Drop TensorFlow's start-up messages; what else its C++ side writes to stderr is shown when the block ends."""
    keep = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)  # C++ writes past Python's sys.stderr
        try:
            yield
        finally:
            os.dup2(keep, 2)
            os.close(keep)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.writelines(line for line in lines if not START_UP_NOISE.search(line))


def start_tensorflow(seed: int) -> Any:
    """Import tf_keras, seeded and deterministic, without TensorFlow's start-up messages; its later warnings stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # from C++ only what ends the process; errors are exceptions too
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # networks this small are faster, and repeatable, on the CPU
    print("starting TensorFlow ...", flush=True)
    with quiet_tensorflow():
        import tensorflow as tf
        import tf_keras

        tf.config.list_physical_devices()
    warnings.filterwarnings("ignore", message="You are saving your model as an HDF5 file")  # .h5 is what we want
    tf_keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    return tf_keras


def open_h5(path: Path) -> h5py.File:
    """An .h5 file to read. Raises ValueError for damage on which the HDF5 library stays for ever, deaf to Ctrl-C.

    It walks through the global heaps, which hold all texts, from item to item: index (0: free space, to the end) and
    size. Zeros, as of a part that was never written, are free space of size 0.
    """
    import h5py

    content, place = path.read_bytes(), 0
    while heap := HEAP.search(content, place):
        place, end = heap.end(), heap.start() + int.from_bytes(heap[1], "little")
        while place + 16 <= end:
            index, size = struct.unpack_from("<H6xQ", content, place)
            step = 16 + -(-size // 8) * 8 if index else size
            if not 0 < step <= end - place:
                raise ValueError("a heap of its texts is damaged")
            place += step
    return h5py.File(path)


def claimed_bytes(dataset: h5py.Dataset, path: Path) -> int:
    """Memory that reading a data set of the HDF5 file at `path` takes.

    Raises ValueError unless it holds numbers, and in this file.
    """
    if dataset.file.filename != str(path) or dataset.external or dataset.is_virtual or dataset.dtype.kind not in "if":
        raise ValueError(f"{dataset.name} holds no numbers of its own")
    return math.prod(dataset.shape) * dataset.dtype.itemsize


def load_mlp(path: Path, made_by: str, features: int | None = None) -> tf_keras.Sequential:
    """The network in an .h5 file, rebuilt here from its layer sizes and weights, so that no code in it can run.

    Raises InputError unless it is a sequence of Dense (ReLU, at the end one sigmoid), GaussianNoise and Dropout layers,
    on `features` inputs where that is given, all weights finite; `made_by` is the command that makes the file.
    """
    import tf_keras

    remedy = f"make it with: {made_by}"
    if not path.exists():
        raise InputError(f"{path}: not found; {remedy}")
    try:
        with open_h5(path) as file:
            layers = json.loads(file.attrs["model_config"])["config"]["layers"]
        first = layers[0]["config"]
        inputs = int((first.get("batch_input_shape") or first["batch_shape"])[1])  # as Keras 2 and 3 name it
        if not 0 < inputs <= MOST_NEURONS:
            raise ValueError(f"{inputs} inputs")
        width, parameters = inputs, 0
        model = tf_keras.Sequential([tf_keras.layers.Input((inputs,))])
        for layer in layers:
            config = layer["config"]
            if layer["class_name"] == "Dense":
                activation, units = config["activation"], int(config["units"])
                if activation != ("sigmoid" if layer is layers[-1] else "relu") or not 0 < units <= MOST_NEURONS:
                    raise ValueError(f"{units} neurons with activation {activation} in {config['name']}")
                width, parameters = units, parameters + (width + 1) * units
                if parameters > path.stat().st_size:  # a byte each at least; before Keras takes memory for them
                    raise ValueError("it claims more weights than it can hold")
                model.add(tf_keras.layers.Dense(units, activation, name=config["name"]))
            elif layer["class_name"] == "Dropout":
                model.add(tf_keras.layers.Dropout(float(config["rate"]), name=config["name"]))
            elif layer["class_name"] == "GaussianNoise":
                model.add(tf_keras.layers.GaussianNoise(float(config["stddev"]), name=config["name"]))
            elif layer["class_name"] != "InputLayer":
                raise ValueError(f"layer {layer['class_name']}")
        with open_h5(path) as file:  # Keras would take memory for whatever size the data sets claim
            for layer in [layer for layer in model.layers if layer.weights]:
                group = file["model_weights"][layer.name]
                stored = [group[name] for name in group.attrs["weight_names"]]
                if sum(claimed_bytes(dataset, path) for dataset in stored) > path.stat().st_size:
                    raise ValueError("its weights claim to be larger than the file")
                layer.set_weights([dataset[()] for dataset in stored])
    except Exception as error:  # HDF5, json and Keras raise a dozen unrelated types
        raise InputError(
            f"{path}: is truncated or not a valid network of this pipeline ({first_line(error)}); {remedy}"
        ) from None
    if features not in (None, inputs):
        raise InputError(f"{path}: takes {inputs} features, the arrays have {features}; {remedy}")
    if model.output_shape != (None, 1):
        raise InputError(f"{path}: does not end in one sigmoid output; {remedy}")
    if not all(np.isfinite(w).all() for w in model.get_weights()):
        raise InputError(f"{path}: holds NaN or infinite weights; {remedy}")
    return model


def epoch_progress(title: str, epochs: int) -> Any:
    """Keras callback that shows a bar over the epochs with the last validation figures."""
    import tf_keras
    from tqdm import tqdm

    bar = tqdm(total=epochs, desc=title, unit="epoch")

    def update(_: int, logs: dict[str, float]) -> None:
        bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items() if k.startswith("val_")}, refresh=False)
        bar.update()

    return tf_keras.callbacks.LambdaCallback(on_epoch_end=update, on_train_end=lambda _: bar.close())


def decisions(model: Callable, X: np.ndarray) -> np.ndarray:
    """1 for each row of X (n, features) whose probability is over 0.5, else 0: (n,) int64."""
    return (model(X).numpy()[:, 0] > 0.5).astype(np.int64)


def balanced_accuracy(model: Callable, X: np.ndarray, y: np.ndarray) -> float:
    """Balanced accuracy of the decisions on rows X (n, features) with labels y (n,)."""
    return ec57.balanced_accuracy(decisions(model, X), y)


def balanced_weights(y: np.ndarray) -> np.ndarray:
    """Class-balanced sample weights (n,) of mean 1: both labels have the same sum; y: labels (n,) of 0 and 1."""
    return (len(y) / (2 * np.bincount(y, minlength=2)))[y]


def epoch_rows(y: np.ndarray) -> int:
    """Rows of an epoch of draws: as many as a balanced part of the labels y (n,) would hold."""
    return 2 * int(np.bincount(y, minlength=2).min())


def training_draws(
    X: np.ndarray, y: np.ndarray, probability: np.ndarray, batch_size: int, seed: int
) -> tf_keras.utils.Sequence:
    """Batches for Keras's fit, each row drawn with its probability (n,), anew in every epoch of epoch_rows."""
    import tf_keras

    class Draws(tf_keras.utils.Sequence):
        """Keras asks for the batches of an epoch by number."""

        def __init__(self) -> None:
            super().__init__()
            self.rng = np.random.default_rng(seed)
            self.on_epoch_end()

        def __len__(self) -> int:
            return -(-epoch_rows(y) // batch_size)

        def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
            chosen = self.rows[number * batch_size : (number + 1) * batch_size]
            return X[chosen], y[chosen]

        def on_epoch_end(self) -> None:
            self.rows = self.rng.choice(len(X), epoch_rows(y), p=probability)

    return Draws()


def input_noise(model: tf_keras.Sequential) -> float:
    """Standard deviation of the Gaussian noise that the network's features get in training, 0 without any."""
    return next((layer.stddev for layer in model.layers if hasattr(layer, "stddev")), 0.0)


def logit_shift(workdir: Path) -> float:
    """What step 1 added to the logit for its threshold, from MLP_model_0_metrics.json. Raises InputError without it."""
    path = workdir / "MLP_model_0_metrics.json"
    try:
        threshold = float(json.loads(path.read_text())["threshold"])
        return float(-np.log(threshold / (1 - threshold))) + 0.0
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise InputError(f"{path}: is missing or damaged; make it with: python MLP_model_0.py") from None


def public_map(workdir: Path) -> str:
    """The map of the features that step 1 trained on, from MLP_model_0_metrics.json; none without the file.

    Raises InputError for a damaged one.
    """
    path = workdir / "MLP_model_0_metrics.json"
    try:
        return expansion(json.loads(path.read_text()).get("expand", NONE)) if path.exists() else NONE
    except (OSError, ValueError, AttributeError, TypeError, argparse.ArgumentTypeError):
        raise InputError(f"{path}: is damaged; make it with: python MLP_model_0.py") from None


def shift_logit(model: tf_keras.Sequential, by: float) -> None:
    """Add `by` to the logit of every row, in place, through the last bias."""
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel, bias + np.float32(by)])


def mlp_bytes(model: tf_keras.Sequential) -> bytes:
    """The network as the content of an .h5 file without the optimizer's state, made in memory.

    The HDF5 library breaks down on a full disk; ordinary writing only fails. Raises InputError for NaN weights.
    """
    import h5py

    if not all(np.isfinite(w).all() for w in model.get_weights()):
        raise InputError("training ended in NaN or infinite weights, nothing was written; lower --learning-rate")
    buffer = io.BytesIO()
    model.compile(loss="binary_crossentropy")
    with h5py.File(buffer, "w") as file:
        model.save(file, save_format="h5", include_optimizer=False)
    return buffer.getvalue()


def save_mlp(model: tf_keras.Sequential, path: Path) -> None:
    """Write a network as .h5, whole."""
    with whole_file(path) as temporary:
        temporary.write_bytes(mlp_bytes(model))


def by_rank(workdir: Path, suffix: str) -> list[Path]:
    """Step 3's networks pruned_model_top_{rank}_... in `workdir`, as .h5 or .onnx files, the best first."""
    ranked = [(path.name.split("_")[3], path) for path in workdir.glob(f"pruned_model_top_*{suffix}") if path.is_file()]
    return [path for _, path in sorted((int(rank), path) for rank, path in ranked if rank.isdecimal())]


def dense_layers(model: tf_keras.Sequential) -> Layers:
    """Kernels and biases of a network without its dropout, which does nothing in inference."""
    return [tuple(w.numpy() for w in (layer.kernel, layer.bias)) for layer in model.layers if hasattr(layer, "kernel")]


def build(layers: Layers, noise: float = 0.0) -> tf_keras.Sequential:
    """Keras network of the given Dense layers, ReLU and a sigmoid at the end; noise: of its input, as input_noise."""
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.Input((len(layers[0][0]),))])
    if noise:
        model.add(tf_keras.layers.GaussianNoise(noise, name="input_noise"))
    for number, (kernel, bias) in enumerate(layers, 1):
        last = number == len(layers)
        name = "output" if last else f"hidden_{number}"
        model.add(tf_keras.layers.Dense(len(bias), "sigmoid" if last else "relu", name=name))
        model.layers[-1].set_weights([kernel, bias])
    return model
