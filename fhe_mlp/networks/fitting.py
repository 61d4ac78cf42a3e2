"""Float networks in Keras, which trains and writes them: TensorFlow's start, models, .h5 files, draws of rows."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from fhe_mlp.cli import InputError, whole_file
from fhe_mlp.dataset import Dataset
from fhe_mlp.networks.mlp import MLP, refusing

if TYPE_CHECKING:
    import tf_keras

KERAS_SETTINGS = "name units activation use_bias rate stddev batch_input_shape batch_shape".split()  # of its layers
LEAST_ROWS = 4096  # of an epoch; where a label has few rows they are drawn again and again, or too few steps are made


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Discard what is written to stderr while TensorFlow starts or converts; errors are exceptions."""
    keep = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # C++ writes past Python's sys.stderr
    try:
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)


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


def stream(seed: int, number: int) -> int:
    """Return the seed of the random numbers of one training, which share no draw with another number's or seed's."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def to_keras(mlp: MLP) -> tf_keras.Sequential:
    """Return the network as a Keras model that ends in a sigmoid, with the noise of its features."""
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.Input((mlp.features,))])
    if mlp.noise:
        model.add(tf_keras.layers.GaussianNoise(mlp.noise, name="input_noise"))
    for number, (kernel, bias) in enumerate(mlp.layers, 1):
        last = number == len(mlp.layers)
        name = "output" if last else f"hidden_{number}"
        model.add(tf_keras.layers.Dense(len(bias), "sigmoid" if last else "relu", name=name))
        model.layers[-1].set_weights([kernel, bias])
    return model


def to_train(mlp: MLP, seed: int) -> tf_keras.Sequential:
    """Return a Keras model of the labels, which know no threshold; seed: of all that is random but the draws."""
    import tf_keras

    tf_keras.utils.set_random_seed(seed)
    return to_keras(mlp.moved(-mlp.shift))


def trained(model: tf_keras.Sequential, mlp: MLP) -> MLP:
    """Return `mlp`, from which to_train made `model`, with the weights that training gave it, its threshold moved."""
    layers = [layer.get_weights() for layer in model.layers if hasattr(layer, "kernel")]
    return replace(mlp, layers=[(kernel, bias) for kernel, bias in layers]).moved(mlp.shift)


def h5_bytes(mlp: MLP) -> bytes:
    """Return the content of an .h5 file that Keras loads too. Raises InputError for NaN weights.

    Made in memory: the HDF5 library breaks down on a full disk, ordinary writing only fails.
    """
    if not all(np.isfinite(w).all() for layer in mlp.layers for w in layer):
        raise InputError("training ended in NaN or infinite weights, nothing was written; lower --learning-rate")
    model, buffer = to_keras(mlp), io.BytesIO()
    model.compile(loss="binary_crossentropy")
    with h5py.File(buffer, "w") as file:
        model.save(file, save_format="h5", include_optimizer=False)
        file.attrs.update({"threshold": mlp.threshold, "map": mlp.map})
    return buffer.getvalue()


def save_mlp(mlp: MLP, path: Path) -> None:
    """Write a network with its noise, threshold and map as .h5, whole."""
    with whole_file(path) as temporary:
        temporary.write_bytes(h5_bytes(mlp))


def probabilities_in_keras(path: Path, X: np.ndarray, made_by: str) -> np.ndarray:
    """Return the probabilities (n,) of rows X (n, features) that Keras 2 or 3 computes with its own .h5 file.

    path, made_by: as load_mlp takes them. Keras sees nothing of the configuration that could hold code.
    Raises InputError for what it cannot load.
    """
    with refusing(path, "file of Keras", made_by), h5py.File(path) as file:
        model = json.loads(file.attrs["model_config"])["config"]
        keras = importlib.import_module(
            "tf_keras" if str(file.attrs.get("keras_version", "2")).startswith("2") else "keras"
        )
        for layer in model["layers"]:
            layer["config"] = {key: value for key, value in layer["config"].items() if key in KERAS_SETTINGS}
            for key in layer.keys() - {"class_name", "config", "name", "inbound_nodes"}:
                del layer[key]
        network = (keras.Model if "output_layers" in model else keras.Sequential).from_config(model)
        network.load_weights(path)
        return network(X).numpy()[:, 0]


def epoch_progress(title: str, epochs: int) -> Any:
    """Return a Keras callback that shows a bar over the epochs with the last validation figures."""
    import tf_keras
    from tqdm import tqdm

    bar = tqdm(total=epochs, desc=title, unit="epoch")

    def update(_: int, logs: dict[str, float]) -> None:
        bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items() if k.startswith("val_")}, refresh=False)
        bar.update()

    return tf_keras.callbacks.LambdaCallback(on_epoch_end=update, on_train_end=lambda _: bar.close())


def balanced_weights(y: np.ndarray) -> np.ndarray:
    """Return class-balanced sample weights (n,) of mean 1: both labels have the same sum; y: labels (n,) of 0 and 1."""
    return (len(y) / (2 * np.bincount(y, minlength=2)))[y]


def epoch_rows(y: np.ndarray) -> int:
    """Return the rows of an epoch of draws: as many as a balanced part of the labels y (n,) holds, or LEAST_ROWS."""
    return max(2 * int(np.bincount(y, minlength=2).min()), LEAST_ROWS)


def training_draws(data: Dataset, batch_size: int, seed: int) -> tf_keras.utils.Sequence:
    """Return batches for Keras's fit: training rows drawn with their probability, anew in every epoch of epoch_rows."""
    import tf_keras

    X, y = data.train.X, data.train.y

    class Draws(tf_keras.utils.Sequence):
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
            self.rows = self.rng.choice(len(X), epoch_rows(y), p=data.draw)

    return Draws()
