"""Public maps of features that a client evaluates before it encrypts, so that a linear model can be enough.

Additions and products with known weights cost little on ciphertexts; only what is not linear needs a bootstrap. A map
without labels and without secrets does that part in the clear, on the client's side. It depends on the number of
features alone and never on data.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np

NONE, PRODUCTS, FOURIER = "none", "products", "fourier:"
SEED = 0  # of the Fourier map; public, since client and server have to use the same map
GRID = 2.0**-12  # of mapped features; the finest quantization has steps 195 times as wide
MOST_COLUMNS = 4096  # of a map: the inputs that a network can have


def expansion(text: str) -> str:
    """argparse type: "none", "products" or "fourier:N" for N from 1 to MOST_COLUMNS."""
    waves = text.removeprefix(FOURIER)
    if text in (NONE, PRODUCTS):
        return text
    if text.startswith(FOURIER) and waves.isascii() and waves.isdecimal() and 0 < int(waves) <= MOST_COLUMNS:
        return f"{FOURIER}{int(waves)}"
    raise argparse.ArgumentTypeError(f"{text!r} is not none, products or fourier:N with N from 1 to {MOST_COLUMNS}")


def products(X: np.ndarray) -> np.ndarray:
    """(n, d + d (d + 1) / 2) float32: the columns of X (n, d), then x_i x_j for i <= j in the order (0, 0), (0, 1)."""
    first, second = np.triu_indices(X.shape[1])
    return np.hstack([X, X[:, first] * X[:, second]]).astype(np.float32)


@functools.lru_cache(maxsize=1)  # drawing takes longer than the map of one row
def frequencies(features: int, waves: int) -> tuple[np.ndarray, np.ndarray]:
    """W (features, waves) from N(0, 1 / features) and b (waves,) from U(0, 2 pi), float64, the same at every call.

    Standardised features then give phases of about unit variance, whatever their number.
    """
    # NumPy freezes the numbers of RandomState; those of default_rng may change between versions of client and server.
    random = np.random.RandomState(SEED)
    return random.normal(0, features**-0.5, (features, waves)), random.uniform(0, 2 * np.pi, waves)


def fourier(X: np.ndarray, waves: int) -> np.ndarray:
    """(n, waves) float32: cos(X W + b) of X (n, d), random Fourier features (Rahimi & Recht, NIPS 2007).

    A linear model of these approximates one with a Gaussian kernel.
    """
    W, b = frequencies(X.shape[1], waves)
    return np.cos(X @ W + b).astype(np.float32)


def columns(features: int, spec: str) -> int:
    """Columns of the map that `spec` (of `expansion`) names, of `features` columns."""
    if spec == PRODUCTS:
        return features + features * (features + 1) // 2
    return features if spec == NONE else int(spec.removeprefix(FOURIER))


def expand_scaled(X: np.ndarray, spec: str, most: float) -> np.ndarray:
    """The same of rows X (n, d) that lie within -most and most, and scaled so that the result does too, nearly.

    So the networks' inputs have one known range, which depends on no data. They are odd multiples of GRID / 2, none of
    which lies where quantization rounds up or down: with millions of values some would, and be rounded otherwise in
    another precision or on another processor.
    """
    if spec == NONE:
        return X
    expanded = expand(X, spec)
    if spec == PRODUCTS:
        expanded[:, X.shape[1] :] /= np.float32(most)
    else:
        expanded *= np.float32(most)
    return (np.floor(expanded / np.float32(GRID)) + np.float32(0.5)) * np.float32(GRID)


def expand(X: np.ndarray, spec: str) -> np.ndarray:
    """The map that `spec` (of `expansion`) names, of rows X (n, d) float32; float32."""
    if spec == PRODUCTS:
        return products(X)
    return X if spec == NONE else fourier(X, int(spec.removeprefix(FOURIER)))
