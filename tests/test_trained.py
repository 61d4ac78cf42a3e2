"""Step 5 on networks that step 3 quantized."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import refusal

import dynamic_pruning_eval as step3
import fhe_experiments as step5
import h5_onnx_converter as step4
from fhe_mlp import candidates, circuit, configuration, networks
from fhe_mlp import quantized as q
from fhe_mlp.arrays import load_arrays

EXACT = str(2.0**-40)  # p_error of default PTQ: what differs then comes from approximate rounding


def logit_range(network, X):
    """Least and largest logit (n,) when each accumulator of the one hidden layer is rounded a step down, or up, or not.

    Approximate rounding does no more, so where both have one sign the decision is certain. X: rows (n, 32).
    """
    (layer,), last = network.hidden, network.last
    k = np.floor(network.run(X)[1][0] / network.rounding_unit(layer) + 0.5).astype(int) + len(layer.table) // 2
    entries = [np.take_along_axis(layer.table, np.clip(k + s, 0, len(layer.table) - 1), 0) for s in (-1, 0, 1)]
    terms = np.array(entries) * (last.weights * last.scale * layer.step)
    rest = network.run(X)[0] - terms[1].sum(axis=1)
    edge = ((k <= 0) | (k >= len(layer.table) - 1)).any(axis=1)  # a step beyond comes back at the other end
    least, largest = rest + terms.min(axis=0).sum(axis=1), rest + terms.max(axis=0).sum(axis=1)
    return np.where(edge, -np.inf, least), np.where(edge, np.inf, largest)


def certain(network, X):
    """Whether no rounding can change the decision on each row (n,)."""
    least, largest = logit_range(network, X)
    return (least > 0) | (largest < 0)


@pytest.fixture(scope="module")
def quantized_run(arrays, tmp_path_factory):
    """Steps 4 and 5 on one small network that was trained quantized at 3 bits."""
    networks.start_tensorflow(42)
    folder = tmp_path_factory.mktemp("quantized")
    data = load_arrays(arrays)
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=(a, b)).astype("f4") / 5, np.zeros(b, "f4")) for a, b in ((32, 4), (4, 1))]
    model = networks.build(layers)
    even = np.full(len(data["train"][1]), 1 / len(data["train"][1]))
    step3.fine_tune(model, data["train"], even, 2, 0)
    form = {"bits": [3, 3], "rounding_bits": 5, "p_error": float(EXACT), "X": data["train"][0]}
    lesson = candidates.Lesson(data, data["train"][1], even, 0.0, 2, 42)
    layers = networks.dense_layers(model)
    found = candidates.quantize_tables({90: layers}, layers, form, lesson)[90]
    three = found.loc[found["chosen"], "network"]
    assert len(three) == 1
    path = folder / "pruned_model_top_1_prune_90_acc_0.9.h5"
    path.write_bytes(q.add_to_h5(networks.mlp_bytes(model), list(three)))
    common = ["--data-dir", str(arrays), "--workdir", str(folder)]
    step4.main(common)
    sure = certain(three.iloc[0], data["test"][0])
    order = step5.describe(step5.parse_arguments(["--data-dir", str(arrays)])).order
    batch = next(b for b in range(12) if sure[step5.drawn_rows(b, 50, 4, order)].all())
    step5.main([*common, "--bits", "2", "3", "--samples", "4", "--start-batch", str(batch), "--p-error", EXACT])
    (folder / f"results_batch_{batch}.xlsx").rename(folder / "results.xlsx")
    return folder, three.iloc[0], data


def test_trained_networks_are_what_runs_encrypted(quantized_run):
    folder, network, data = quantized_run
    rows = pd.read_excel(folder / "results.xlsx").set_index("q_bits")
    assert list(rows["quantization"]) == ["post-training", "quantization-aware"]
    assert rows.loc[3, "rounding_bits"] == network.rounding_bits
    assert rows.loc[3, "balanced_accuracy_test_set"] == pytest.approx(network.balanced_accuracy(*data["test"]))
    assert rows.loc[3, "balanced_accuracy_validation"] == pytest.approx(network.balanced_accuracy(*data["val"]))
    assert rows.loc[3, "decisions_equal_clear"] == 4
    predictions = pd.read_excel(folder / "results.xlsx", sheet_name="predictions").query("q_bits == 3")
    X = data["test"][0][predictions["test_row"]]
    np.testing.assert_allclose(predictions["output_clear"], network.run(X)[0], atol=1e-5)
    least, largest = logit_range(network, X)
    assert predictions["output_fhe"].between(least - 1e-5, largest + 1e-5).all()


def test_simulation_moves_outputs_by_rounding_and_by_nothing_else(quantized_run, arrays):
    folder, network, data = quantized_run
    (X, y), setting = data["test"], configuration.Setting(6, float(EXACT), 0.0)
    path = folder / "pruned_model_top_1_prune_90_acc_0.9.onnx"
    one = configuration.load_configuration(path, 3, setting, data, data["train"][0][:100], {})
    simulated = circuit.outputs(circuit.compile_circuit(one), X, "simulate")
    least, largest = logit_range(network, X)
    assert np.isfinite(least).mean() > 0.9
    assert ((simulated > least - 1e-5) & (simulated < largest + 1e-5)).all()
    sure, cleartext = certain(network, X), network.run(X)[0] > 0
    assert sure.mean() > 0.5
    np.testing.assert_array_equal((simulated > 0)[sure], cleartext[sure])
    assert abs(np.mean((simulated > 0) == y) - np.mean(cleartext == y)) < 0.02  # of 600 rows
    row = pd.read_excel(folder / "results.xlsx").set_index("q_bits").loc[3]
    drawn = step5.describe(step5.parse_arguments(["--data-dir", str(arrays)])).simulated
    assert row["simulated_rows"] == len(drawn)
    assert row["accuracy_clear_same_rows"] == pytest.approx(np.mean(cleartext[drawn] == y[drawn]))
    assert abs(row["accuracy_simulated"] - row["accuracy_clear_same_rows"]) <= np.mean(~sure[drawn]) + 1e-9


def test_a_circuit_that_decides_otherwise_than_step_3_is_a_failed_row(quantized_run, arrays, tmp_path, monkeypatch):
    folder, _, _ = quantized_run
    for path in [*folder.glob("*.onnx"), *folder.glob("quantized/*")]:
        (tmp_path / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    outputs = circuit.outputs
    monkeypatch.setattr(circuit, "outputs", lambda *a: -outputs(*a))
    step5.main(["--data-dir", str(arrays), "--workdir", str(tmp_path), "--bits", "3", "--samples", "1"])
    row = pd.read_excel(tmp_path / "results_batch_0.xlsx").iloc[0]
    assert row["status"] == "failed"
    assert "does not decide as the network of step 3" in row["reason"]


def test_damaged_quantized_networks_are_refused(quantized_run, arrays, tmp_path, capsys):
    folder, _, _ = quantized_run
    source = folder / "pruned_model_top_1_prune_90_acc_0.9.onnx"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "quantized").mkdir()
    damaged = tmp_path / "quantized" / f"{source.stem}_3bits.onnx"
    common = ["--data-dir", arrays, "--workdir", tmp_path, "--bits", "3", "--samples", "1"]
    for content in (b"hello", source.read_bytes()):  # the second is a float network
        damaged.write_bytes(content)
        assert "is not a valid quantized network" in refusal(step5.main, common, capsys)
    assert not list(tmp_path.glob("*.xlsx"))
