"""An MLP with square activations under CKKS (TenSEAL), which computes sums and products of approximate numbers.

One beat is a vector in a ciphertext; of many, each feature is a ciphertext with a slot for each beat.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tenseal

from fhe_mlp import networks
from fhe_mlp.dataset import Dataset

NEURONS, EPOCHS, BATCH_SIZE, LEARNING_RATE = 64, 60, 64, 1e-3
RING, MODULI, SCALE = 8192, [40, 30, 30, 30, 40], 2.0**30
SLOTS = RING // 2  # of a ciphertext


def train(data: Dataset, noise: float, seed: int) -> networks.Layers:
    """Return both layers, from the epoch of the least validation loss; noise: added to the features."""
    import tensorflow as tf
    import tf_keras

    layers, val = tf_keras.layers, data.val
    hidden, output = layers.Dense(NEURONS, tf.square), layers.Dense(1, "sigmoid")
    model = tf_keras.Sequential([layers.GaussianNoise(noise, input_shape=val.X.shape[1:]), hidden, output])
    model.compile(tf_keras.optimizers.Adam(LEARNING_RATE), "binary_crossentropy", weighted_metrics=[])
    model.fit(
        networks.training_draws(data, BATCH_SIZE, seed),
        epochs=EPOCHS,
        verbose=0,
        validation_data=(val.X, val.y, networks.balanced_weights(val.y)),
        callbacks=[tf_keras.callbacks.EarlyStopping("val_loss", patience=EPOCHS, restore_best_weights=True)],
    )
    return [hidden.get_weights(), output.get_weights()]


class Ckks:
    """The network with payloads of 1 beat or SLOTS; all methods of a Scheme of fhe_mlp/encrypted/ and its sides."""

    def __init__(self, layers: networks.Layers, beats: int) -> None:
        self.layers, self.beats = layers, beats
        self.load = tenseal.ckks_vector_from if beats == 1 else tenseal.ckks_tensor_from

    def logits(self, X: np.ndarray) -> np.ndarray:
        (w0, b0), (w1, b1) = self.layers
        return ((X @ w0 + b0) ** 2 @ w1 + b1)[:, 0]

    def cost(self) -> dict[str, Any]:
        return {"evaluation_keys_MB": 0.0}  # some 40 for any network

    def client(self) -> Ckks:
        return Ckks(self.layers, self.beats)

    server = client

    def make_keys(self) -> None:
        self.context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, RING, coeff_mod_bit_sizes=MODULI)
        self.context.global_scale = SCALE
        self.context.generate_galois_keys()

    def evaluation_keys(self) -> bytes:
        return self.context.serialize(save_secret_key=False)

    def load_keys(self, keys: bytes) -> None:
        self.context = tenseal.context_from(keys)

    def encrypt(self, X: np.ndarray) -> bytes:
        if self.beats == 1:
            return tenseal.ckks_vector(self.context, X[0].tolist()).serialize()
        return tenseal.ckks_tensor(self.context, self.plain(X), batch=True).serialize()

    def run(self, beats: bytes) -> bytes:
        (w0, b0), (w1, b1) = ([self.plain(array) for array in layer] for layer in self.layers)
        x = self.load(self.context, beats)
        if self.beats > 1:
            x = x.reshape([1, len(self.layers[0][0])])
        return x.mm(w0).add(b0).square().mm(w1).add(b1).serialize()

    def decrypt(self, answer: bytes, beats: int) -> np.ndarray:
        values = self.load(self.context, answer).decrypt()
        return np.ravel(values if self.beats == 1 else values.tolist())

    def plain(self, array: np.ndarray) -> Any:
        """Return numbers as TenSEAL wants them beside a vector or a tensor."""
        return array.tolist() if self.beats == 1 else tenseal.plain_tensor(np.atleast_2d(array))
