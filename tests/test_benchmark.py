"""The benchmark's own models: encrypted, they decide as in the clear."""

from __future__ import annotations

import benchmark
import pytest

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
