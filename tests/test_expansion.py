"""Public maps of features: their numbers, widths and names."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from conftest import refusal

import dynamic_pruning_eval as step3
import h5_onnx_converter as step4
import MLP_model_0 as step1
import TF_pruning as step2
from fhe_mlp import expansion, networks
from fhe_mlp.arrays import load_arrays
from fhe_mlp.configuration import load_quantized, quantized_path

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
    Z = expansion.expand(ROWS, "fourier:4096").astype(np.float64)
    distances = ((ROWS[:, None] - ROWS[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(2 / 4096 * Z @ Z.T, np.exp(-distances / 32 / 2), atol=0.1)


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


def test_maps_of_clipped_features_stay_in_their_range_and_fill_it():
    X = np.clip(ROWS, -3, 3)
    X[0] = 3
    for spec in ("none", "products", "fourier:50"):
        mapped = expansion.expand_scaled(X, spec, 3.0)
        assert mapped.shape[1] == expansion.columns(32, spec)
        assert 2.9 < np.abs(mapped).max() <= 3 + expansion.GRID
    squares = expansion.expand_scaled(X, "products", 3.0)[:, 32]
    np.testing.assert_allclose(squares, X[:, 0] ** 2 / 3, atol=expansion.GRID)


def test_mapped_features_are_quantized_alike_in_any_precision():
    X = np.clip(np.random.default_rng(0).normal(size=(2000, 32)), -3, 3).astype(np.float32)
    for spec in ("products", "fourier:500"):
        mapped = expansion.expand_scaled(X, spec, 3.0)
        for top in (15, 31, 63):
            step = np.float32(3 / top)
            exact = np.rint(mapped.astype(np.float64) / float(step))
            np.testing.assert_array_equal(np.rint(mapped / step), exact)
            from_edge = np.abs(np.abs(mapped / np.float64(step) - exact) - 0.5)
            assert from_edge.min() > 3e-5  # steps; a float32 is off by 1e-5 at most


def test_steps_1_to_4_run_on_the_map_that_step_1_was_given(arrays, tmp_path, capsys):
    common = ["--data-dir", str(arrays), "--workdir", str(tmp_path)]
    step1.main([*common, "--expand", "fourier:40", "--epochs", "1"])
    assert networks.public_map(tmp_path) == "fourier:40"
    step2.main([*common, "--epochs", "1"])
    step3.main([*common, "--rates", "100", "--fine-tune-epochs", "1", "--quantization-epochs", "1"])
    step4.main(common)
    (path,) = networks.by_rank(tmp_path, ".onnx")
    X = load_arrays(arrays, "fourier:40")["test"][0]
    _, network = load_quantized(quantized_path(path, 7), 40)
    by_hand = 3 * expansion.fourier(load_arrays(arrays)["test"][0], 40)
    np.testing.assert_allclose(X, by_hand, atol=expansion.GRID)
    assert network.run(X)[0].shape == (len(X),)
    assert network.pbs() == 0
    assert "N from 1 to 4096" in refusal(step1.main, [*common[:2], "--expand", "fourier:4097"], capsys)
    (tmp_path / "MLP_model_0_metrics.json").write_text('{"expand": "squares"}')
    assert "MLP_model_0.py" in refusal(step2.main, common, capsys)
