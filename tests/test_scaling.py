"""fhe_mlp/scaling.py: the scaler, public maps and quantization of features."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from fhe_mlp import scaling

ROWS = np.random.default_rng(3).normal(size=(40, 32)).astype(np.float32)


def test_the_scaler_standardises_with_its_rows_and_clips():
    X = np.array([[0.0, 5], [2, 5], [4, 5]], np.float32)
    scaler = scaling.fit_scaler(X)
    scaled = scaling.apply_scaler(X, scaler)
    np.testing.assert_allclose(scaled, [[-1.2247449, 0], [0, 0], [1.2247449, 0]], rtol=1e-6)
    assert scaling.apply_scaler(np.array([[1e308, 5]]), scaler)[0].tolist() == [scaling.CLIP_SD, 0]
    assert scaled.dtype == np.float32


def test_a_weighted_scaler_is_that_of_a_sample_with_repetitions():
    times = np.array([1, 5, 2, 0, 4])
    X = np.random.default_rng(0).normal(3, 2, (5, 3)).astype(np.float32)
    weighted, repeated = scaling.fit_scaler(X, times / times.sum()), scaling.fit_scaler(np.repeat(X, times, axis=0))
    for part in ("mean", "sd"):
        np.testing.assert_allclose(weighted[part], repeated[part], rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_column_of_rounding_error_counts_as_constant(dtype):
    random = np.random.default_rng(0).normal(size=1000)
    X = np.column_stack([random, np.full(1000, 14.62), 14.62 + 1e-14 * random]).astype(dtype)
    scaler = scaling.fit_scaler(X)
    assert scaler["sd"][1:] == [1.0, 1.0] and scaler["sd"][0] == pytest.approx(1, abs=0.1)
    assert np.abs(scaling.apply_scaler(X, scaler)[:, 1:]).max() < 1e-5


def test_cosines_by_hand():
    random = np.random.RandomState(scaling.SEED)
    W, b = random.normal(0, 0.5, (4, 3)), random.uniform(0, 2 * np.pi, 3)
    x = np.array([0.5, -1, 2, 0], dtype=np.float32)
    by_hand = [3 * np.cos(sum(x[k] * W[k, j] for k in range(4)) + b[j]) for j in range(3)]
    np.testing.assert_allclose(scaling.map_features(x[None], "fourier:3")[0], by_hand, atol=scaling.GRID / 2)
    # of this seed, so that a client with another version of NumPy has the same map
    fixed = scaling.map_features(np.zeros((1, 1), np.float32), "fourier:2")[0]
    np.testing.assert_allclose(fixed, [3 * -0.79869, 3 * -0.960498], atol=scaling.GRID)


@pytest.mark.parametrize(("spec", "columns"), [("none", 32), ("fourier:7", 7), ("fourier:512", 512)])
def test_prepared_rows_have_the_maps_width_fill_its_range_and_do_not_depend_on_each_other(spec, columns):
    scaler = scaling.fit_scaler(10 + ROWS)
    Z = scaling.prepare(10 + 9 * ROWS, scaler, scaling.public_map(spec))
    assert (Z.shape, Z.dtype, scaling.columns(32, spec)) == ((40, columns), np.float32, columns)
    assert 2.9 < np.abs(Z).max() <= scaling.CLIP_SD + scaling.GRID
    np.testing.assert_allclose(scaling.prepare(10 + 9 * ROWS[5:6], scaler, spec), Z[5:6], atol=2 * scaling.GRID)


def test_other_maps_are_refused():
    for text in ("", "products", "none ", "fourier", *(f"fourier:{n}" for n in ("", 0, -1, "1e3", 4097, "²", "1\n"))):
        with pytest.raises(argparse.ArgumentTypeError, match="is not none or fourier:N with N from 1 to 4096"):
            scaling.public_map(text)


def test_features_are_quantized_to_whole_steps_on_both_sides_of_0():
    x = scaling.quantize(np.array([[-3, -0.26, 0, 0.24, 0.26, 0.74, 9]], np.float32), 3, 0.5)
    assert x.tolist() == [[-3, -1, 0, 0, 1, 1, 3]] and x.dtype == np.int64


def test_mapped_features_are_quantized_alike_in_any_precision():
    X = np.clip(np.random.default_rng(0).normal(size=(2000, 32)), -3, 3).astype(np.float32)
    mapped = scaling.map_features(X, "fourier:500")
    for bits in (5, 6, 7):
        step = np.float32(3 / (2 ** (bits - 1) - 1))
        exact = scaling.quantize(mapped, bits, float(step))
        np.testing.assert_array_equal(np.rint(mapped / step), exact)
        from_edge = np.abs(np.abs(mapped / np.float64(step) - exact) - 0.5)
        assert from_edge.min() > 3e-5  # steps; a float32 is off by 1e-5 at most
