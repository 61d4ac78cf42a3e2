"""All that a beat goes through around encryption, in training and at the client: scaled, clipped, mapped, quantized."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

NONE, FOURIER = "none", "fourier:"  # public maps: no map, or as many cosines as the number behind the colon
SEED = 0  # of the cosines; public, since training and client have to use the same map
CLIP_SD = 3.0  # standard deviations; artefacts of 20 sd would waste the few bits of the encrypted network
MOST_COLUMNS = 4096  # of a map: the inputs that a network can have
CONSTANT = 1e-6  # of a column's mean: a smaller standard deviation is rounding error, also in float32
GRID = 2.0**-12  # of mapped features; the finest quantization has steps 195 times as wide


def public_map(text: str) -> str:
    """argparse type: "none" or "fourier:N" for N from 1 to MOST_COLUMNS."""
    if text == NONE or (re.fullmatch(FOURIER + "[1-9][0-9]{0,3}", text) and columns(0, text) <= MOST_COLUMNS):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not none or fourier:N with N from 1 to {MOST_COLUMNS}")


def columns(features: int, spec: str) -> int:
    """Number of columns that the map `spec` (of public_map) makes of so many features."""
    return features if spec == NONE else int(spec.removeprefix(FOURIER))


def fit_scaler(X: np.ndarray, probability: np.ndarray | None = None) -> dict[str, Any]:
    """Return mean and standard deviation of each column of training rows X (n, features), and the clip in deviations.

    probability: chance (n,) of each row in a training draw, which weighs the rows; None: all are equal.
    """
    X = X.astype(np.float64)
    mean = np.average(X, axis=0, weights=probability)
    sd = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=probability))
    sd = np.where(sd > CONSTANT * np.abs(mean), sd, 1.0)  # a constant column stays near 0
    return {"mean": mean.tolist(), "sd": sd.tolist(), "clip_sd": CLIP_SD}


def apply_scaler(X: np.ndarray, scaler: dict[str, Any]) -> np.ndarray:
    """Standardise and clip rows X (n, features); float32. scaler: of fit_scaler."""
    with np.errstate(over="ignore"):  # of numbers like 1e308, which are clipped
        z = (X - np.array(scaler["mean"])) / np.array(scaler["sd"])
    return np.clip(z, -scaler["clip_sd"], scaler["clip_sd"]).astype(np.float32)


def map_features(X: np.ndarray, spec: str) -> np.ndarray:
    """Map scaled rows X (n, features) by `spec` (of public_map): to themselves or to random cosines, float32.

    The cosines (Rahimi & Recht, NIPS 2007) let a linear model approximate one with a Gaussian kernel, without the cost
    of bootstraps. They depend on the number of features alone, and fill the range of clipped features. All are odd
    multiples of GRID / 2: of millions of values some would else lie where another processor rounds to another integer.
    """
    if spec == NONE:
        return X
    features, waves = X.shape[1], columns(X.shape[1], spec)
    random = np.random.RandomState(SEED)  # NumPy freezes its numbers; default_rng's may change between versions
    W = random.normal(0, features**-0.5, (features, waves))  # phases of standardised features vary by about 1 radian
    Z = np.cos(X @ W + random.uniform(0, 2 * np.pi, waves)).astype(np.float32) * np.float32(CLIP_SD)
    return (np.floor(Z / np.float32(GRID)) + np.float32(0.5)) * np.float32(GRID)


def prepare(X: np.ndarray, scaler: dict[str, Any], spec: str) -> np.ndarray:
    """Turn raw features X (n, features) into a network's inputs: standardised, clipped and mapped, float32."""
    return map_features(apply_scaler(X, scaler), spec)


def quantize(X: np.ndarray, bits: int, step: float) -> np.ndarray:
    """Round X to multiples of `step` and return these int64 multiples, at most 2**(bits - 1) - 1 on each side of 0."""
    top = 2 ** (bits - 1) - 1
    return np.clip(np.rint(X.astype(np.float64) / step), -top, top).astype(np.int64)


def logits_of_sums(numbers: Mapping[str, float], tables: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """Return the logits (n,) float64 of a network's integer sums (n,) of lookup tables and linear path.

    numbers: table_step, linear_step and offset, in logits (QuantizedNetwork.numbers).
    """
    return numbers["offset"] + tables * numbers["table_step"] + linear * numbers["linear_step"]
