"""The benchmark's own models: encrypted, they decide as in the clear."""

from __future__ import annotations

import benchmark
import numpy as np
import pytest

import fhe_experiments as step5
from fhe_mlp import networks
from fhe_mlp.arrays import draw_probability, load_arrays, rows_of


@pytest.fixture
def data(arrays, monkeypatch):
    monkeypatch.setattr(benchmark, "SAMPLES", 12)
    monkeypatch.setattr(benchmark, "CKKS_EPOCHS", 2)
    loaded = load_arrays(arrays)
    X, y = loaded["test"]
    probability = draw_probability(rows_of(arrays, loaded)[0]["train"])
    monkeypatch.setattr(benchmark.step3, "QUANTIZATION_EPOCHS", 2)
    return {
        **loaded,
        "teacher": loaded["train"][1],
        "drawn": (X[:12], y[:12]),
        "probability": probability,
        "noise": 0.1,
        "penalties": (0.1, 1.0),
    }


@pytest.mark.parametrize("spec", ["products", "fourier:64"])
def test_a_packed_linear_model_decides_as_in_the_clear(data, monkeypatch, spec):
    monkeypatch.setattr(benchmark, "MAPS", (spec,))
    (row,) = benchmark.packed_linear(data, 0)
    assert row["balanced_accuracy"] > 0.85
    assert row["n"] == row["decisions_equal_clear"] == 12
    assert 5 < row["down_kB"] < row["up_kB"] < 20


def test_ckks_decides_as_in_the_clear_one_beat_at_a_time_and_packed(data):
    pytest.importorskip("tenseal")
    single, packed = benchmark.ckks(data, 0)
    assert single["decisions_equal_clear"] == 12
    assert packed["decisions_equal_clear"] >= 0.99 * 4096 and packed["n"] == 4096
    assert packed["beats_per_second"] > 0 and "seconds" not in packed  # of a beat, which packing does not have
    assert packed["up_kB"] < single["up_kB"] / 50


def test_quantized_relus_are_those_of_the_kept_network_nearest_in_size(arrays, data, tmp_path, monkeypatch):
    networks.start_tensorflow(0)
    monkeypatch.setattr(benchmark, "RELU_NEURONS", 4)
    rng = np.random.default_rng(0)
    for rank, neurons in enumerate((2, 5), 1):
        shapes = ((32, neurons), (neurons, 1))
        layers = [(rng.normal(size=shape).astype("f4") / 5, np.zeros(shape[1], "f4")) for shape in shapes]
        networks.save_mlp(networks.build(layers), tmp_path / f"pruned_model_top_{rank}_prune_90_acc_0.9.h5")
    experiment = step5.describe(step5.parse_arguments(["--data-dir", str(arrays)]))
    slow = {"seconds_per_unit": 1.0, "memory": 1e12}  # of complexity, so that it is not run
    (row,), (again,) = (benchmark.quantized_relus(tmp_path, experiment, data, slow, 0) for _ in range(2))
    assert row["balanced_accuracy"] == again["balanced_accuracy"]
    assert row["accuracy_simulated"] == again["accuracy_simulated"]
    assert (row["name"], row["pbs"]) == ("5 ReLU neurons, 6 bits", 5)
    assert row["balanced_accuracy"] > 0.7
    assert row["note"].startswith("not run")
