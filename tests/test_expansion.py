"""Public maps of features: their numbers, widths and names."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from fhe_mlp import expansion

ROWS = np.random.default_rng(3).normal(size=(40, 32)).astype(np.float32)


def test_products_by_hand():
    X = np.array([[2, 3, -1]], dtype=np.float32)
    assert expansion.expand(X, "products").tolist() == [[2, 3, -1, 4, 6, -2, 9, -3, 1]]


def test_fourier_features_by_hand():
    random = np.random.RandomState(expansion.SEED)
    W, b = random.normal(0, 0.5, (4, 3)), random.uniform(0, 2 * np.pi, 3)
    x = np.array([0.5, -1, 2, 0], dtype=np.float32)
    by_hand = [np.cos(sum(x[k] * W[k, j] for k in range(4)) + b[j]) for j in range(3)]
    np.testing.assert_allclose(expansion.expand(x[None], "fourier:3")[0], by_hand, atol=1e-6)
    # of this seed, so that a client made with another version of NumPy has the same map
    np.testing.assert_allclose(expansion.fourier(np.zeros((1, 1)), 2)[0], [-0.79869, -0.960498], atol=1e-6)


def test_fourier_features_approximate_a_gaussian_kernel():
    Z = expansion.expand(ROWS, "fourier:20000").astype(np.float64)
    distances = ((ROWS[:, None] - ROWS[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(2 / 20_000 * Z @ Z.T, np.exp(-distances / 32 / 2), atol=0.05)


@pytest.mark.parametrize(("spec", "columns"), [("none", 32), ("products", 560), ("fourier:7", 7), ("fourier:512", 512)])
def test_a_map_has_its_width_and_is_the_same_for_every_row_and_time(spec, columns):
    Z = expansion.expand(ROWS, expansion.expansion(spec))
    assert (Z.shape, Z.dtype) == ((40, columns), np.float32)
    np.testing.assert_array_equal(Z, expansion.expand(ROWS, spec))
    np.testing.assert_allclose(expansion.expand(ROWS[5:6], spec), Z[5:6], atol=1e-6)


@pytest.mark.parametrize("text", ["", "squares", "fourier", "fourier:", "fourier:0", "fourier:-1", "fourier:1e3",
                                  "fourier:99999", "products ", "fourier:²"])  # fmt: skip
def test_other_maps_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not none, products or fourier:N"):
        expansion.expansion(text)
