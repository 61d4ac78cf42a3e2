"""Quantized networks: training, integers, ONNX and the imported graph must be one and the same."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from conftest import refusal

import dynamic_pruning_eval as step3
import fhe_experiments as step5
import h5_onnx_converter as step4
import preprocess_mitbih as pre
from fhe_mlp import circuit, common, networks, neuron_removal, quantized_training, results
from fhe_mlp import quantized as q

MEMBERS = [(2, 4), (4, 4), (7, 5)]


def float_layers(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        ((rng.normal(size=(a, b)) / np.sqrt(a)).astype(np.float32), (rng.normal(size=b) / 4).astype(np.float32))
        for a, b in itertools.pairwise(widths)
    ]


def random_rows(rows, seed=1):
    return np.clip(np.random.default_rng(seed).normal(0, 1.2, (rows, 32)), -3, 3).astype(np.float32)


@pytest.fixture(scope="module")
def population(keras_once):
    return quantized_training.Population(float_layers((32, 12, 7, 1)), MEMBERS, random_rows(500), dtype="float64")


@pytest.fixture(scope="module")
def keras_once():
    return networks.start_tensorflow(42)


@pytest.fixture(scope="module")
def members(population):
    return population.networks(random_rows(500))


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_fake_quantization_and_the_imported_graph_agree_exactly(population, members, member):
    network, training = members[member], random_rows(500)
    assert (network.bits, network.kept_bits) == MEMBERS[member]
    assert max(layer.accumulator_bits for layer in network.layers) > network.kept_bits  # the rounding is at work
    rows = random_rows(3000, seed=2)
    widths = [np.full((len(MEMBERS), 1, 1), layer.accumulator_bits) for layer in network.layers[:-1]]
    trained = population.forward(rows, widths)[0].numpy()[member]
    reference, accumulators = network.run(rows)
    graph = circuit.without_sigmoid(q.to_onnx(network, 14))
    calibration = circuit.calibration_rows(network, training, 100)
    setting = circuit.Setting(6, 2.0**-40, 0.0)
    module = circuit.compile_network(graph, network.bits, calibration, setting, network.kept_bits)
    imported = circuit.outputs(module, rows, "disable")
    # A logit is an integer times one step, plus a constant: equal up to the last bits of a float means equal integers.
    np.testing.assert_allclose(trained, reference, atol=1e-6)
    np.testing.assert_allclose(imported, reference, atol=1e-6)
    assert len(np.unique(reference)) > 4
    assert [a.shape[1] for a in accumulators] == [12, 7]
    assert module.fhe_circuit.programmable_bootstrap_count == network.pbs() == 19


def test_integers_are_as_narrow_as_they_say(members):
    for network in members:
        _, accumulators = network.run(random_rows(500), rounding=False)
        for layer, accumulator in zip(network.layers, accumulators):
            assert np.abs(layer.weights).max() <= 2 ** (layer.weight_bits - 1) - 1
            assert layer.weight_bits <= network.bits
            assert layer.output_bits <= network.bits
            assert q.signed_bits(accumulator) == layer.accumulator_bits
        assert network.layers[-1].weight_bits <= quantized_training.LAST_WEIGHT_BITS


def test_ranges_are_moved_to_the_middle_and_the_function_stays(members):
    rows, training = random_rows(2000, seed=5), random_rows(500)
    for network in members:
        first = network.layers[0]
        unit = network.rounding_unit(first)
        away = 3 * unit * np.arange(-2, first.weights.shape[1] - 2)
        step = network.input_step * first.scale
        moved = dataclasses.replace(
            first, bias=first.bias + away, offset=(first.offset - away * step).astype(np.float32)
        )
        odd = dataclasses.replace(network, layers=(moved, *network.layers[1:]))
        back = quantized_training.centred(odd, training)
        np.testing.assert_array_equal(back.layers[0].bias, first.bias)
        assert back.layers[0].accumulator_bits == first.accumulator_bits
        np.testing.assert_allclose(back.run(rows)[0], network.run(rows)[0], atol=1e-5)
        for layer, accumulator in zip(network.layers, network.run(training)[1]):
            middle = (accumulator.max(axis=0) + accumulator.min(axis=0)) / 2
            assert np.abs(middle).max() <= 2 * network.rounding_unit(layer)


def test_signed_bits_are_those_of_concrete():
    from concrete.ml.common.utils import compute_bits_precision

    for low, high in ((-1, 0), (-8, 7), (-9, 7), (-8, 8), (-3, 31), (-32, 32), (-5, 1)):
        assert q.signed_bits(np.array([low, high])) == compute_bits_precision(np.array([low, high]))


def test_onnx_runtime_runs_the_quantized_graph_and_it_reads_back_as_it_was(members):
    rows = random_rows(2000, seed=3)
    for network in members:
        graph = q.to_onnx(network, 14)
        onnx.checker.check_model(graph, full_check=True)
        session = onnxruntime.InferenceSession(graph.SerializeToString())
        (probability,) = session.run(None, {"features": rows})
        assert np.mean(np.abs(probability - step4.unrounded(network, rows)) < 1e-5) > 0.99
        back = q.from_onnx(graph)
        for field in dataclasses.fields(q.QuantizedLayer):
            for one, other in zip(network.layers, back.layers, strict=True):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
        np.testing.assert_array_equal(back.run(rows)[0], network.run(rows)[0])


def test_h5_holds_the_networks_beside_the_float_one_and_damage_is_refused(members, keras_once, tmp_path):
    import h5py

    layers = float_layers((32, 12, 7, 1))
    path = tmp_path / "x.h5"
    path.write_bytes(q.add_to_h5(networks.mlp_bytes(networks.build(layers)), members))
    rows = random_rows(200, seed=4)
    for network, back in zip(members, q.read_h5(path, ""), strict=True):
        np.testing.assert_array_equal(back.run(rows)[0], network.run(rows)[0])
    np.testing.assert_array_equal(networks.dense_layers(networks.load_mlp(path, ""))[0][0], layers[0][0])
    whole = path.read_bytes()
    for edit in (
        lambda f: f["quantized/4/1"].pop("weights"),
        lambda f: f["quantized/4/1/weights"].__setitem__((0, 0), 99),
        lambda f: f["quantized/4/0/scale"].__setitem__(0, np.nan),
        lambda f: f["quantized/4"].attrs.__setitem__("bits", 9),
    ):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            edit(file)
        with pytest.raises(common.InputError, match=r"damaged .*; make it with: the command"):
            q.read_h5(path, "the command")


def test_training_gains_what_quantization_lost(arrays, keras_once):
    data = pre.load_arrays(arrays)
    model = networks.build(float_layers((32, 16, 1)))
    step3.fine_tune(model, data, 5, "float")
    population = quantized_training.Population(networks.dense_layers(model), [(2, 4), (3, 4)], data["train"][0])
    before = [n.accuracy(*data["val"]) for n in population.networks(data["train"][0])]
    population.train(data, data["train"][1], 8, 42)
    after = [n.accuracy(*data["val"]) for n in population.networks(data["train"][0])]
    assert min(np.subtract(after, before)) > 0.01, (before, after)


def test_neurons_are_shared_and_narrow_layers_go():
    full = (64, 64, 32, 16)
    assert neuron_removal.share_neurons(88, full, 1) == [32, 32, 16, 8]
    assert neuron_removal.share_neurons(88, full, 16) == [35, 35, 18, 0]
    assert neuron_removal.share_neurons(88, full, 32) == [44, 44, 0, 0]
    assert neuron_removal.share_neurons(20, full, 32) == [20, 0, 0, 0]
    assert neuron_removal.share_neurons(132, full, 32) == [64, 64, 0, 0]  # no wider than it was
    assert neuron_removal.share_neurons(3, (4, 8), 1) == [1, 2]


def test_a_layer_that_is_linear_goes_without_a_trace():
    layers = float_layers((32, 6, 5, 1))
    layers[1][1][:] = 50  # no sum of the second layer is ever negative
    X = random_rows(400)

    def logits(layers):
        x = X
        for kernel, bias in layers[:-1]:
            x = np.maximum(x @ kernel + bias, 0)
        return x @ layers[-1][0] + layers[-1][1]

    smaller = neuron_removal.shrink(layers, (6, 0), X)
    assert [kernel.shape for kernel, _ in smaller] == [(32, 6), (6, 1)]
    np.testing.assert_allclose(logits(smaller), logits(layers), atol=1e-3)


def test_rank_is_by_price_among_the_accurate_and_by_accuracy_among_the_rest():
    table = pd.DataFrame(
        {
            "rate_percent": [25, 50, 75, 90, 95],
            "val_accuracy": [0.99, 0.98, 0.98, 0.97, 0.9],
            "quantized_val_accuracy": [np.nan, 0.985, 0.981, 0.97, 0.975],
            "predicted_complexity": [np.nan, 9e9, 4e9, 2e9, 1e9],
        }
    )
    assert step3.rank(table, 0.98) == [2, 1, 4, 3, 0]
    assert step3.rank(table.drop(columns="quantized_val_accuracy"), 0.98) == [0, 2, 1, 3, 4]
    assert step3.price(table[1:].rename(columns={"quantized_val_accuracy": "x"}), 0.98)["rate_percent"] == 75
    assert step3.price(table, 1.0)["rate_percent"] == 25


def test_front_holds_what_nothing_cheaper_equals():
    cost = pd.Series([1.0, 2, 2, 3, 4, 5], index=list("abcdef"))
    accuracy = pd.Series([0.9, 0.95, 0.96, 0.96, 0.93, 0.99], index=list("abcdef"))
    assert list(results.pareto(cost, accuracy)[lambda on: on].index) == ["a", "c", "f"]


@pytest.fixture(scope="module")
def run(arrays, keras_once, tmp_path_factory):
    """Steps 4 and 5 on one small network that was trained quantized at 3 bits."""
    folder = tmp_path_factory.mktemp("quantized")
    data = pre.load_arrays(arrays)
    model = networks.build(float_layers((32, 4, 1)))
    step3.fine_tune(model, data, 2, "float")
    found = step3.quantize(networks.dense_layers(model), data, data["train"][1], 2, 42, "quantized")
    chosen = found[found["chosen"]]
    assert list(chosen["bits"]) == list(q.BITS)
    three = chosen.loc[chosen["bits"] == 3, "network"]
    path = folder / "pruned_model_top_1_prune_90_acc_0.9.h5"
    path.write_bytes(q.add_to_h5(networks.mlp_bytes(model), list(three)))
    common = ["--data-dir", str(arrays), "--workdir", str(folder)]
    step4.main(common)
    step5.main([*common, "--bits", "2", "3", "--samples", "4", "--p-error", str(2.0**-40)])
    return folder, three.iloc[0], data


def test_trained_networks_are_what_runs_encrypted(run):
    folder, network, data = run
    assert [p.name for p in (folder / "quantized").iterdir()] == ["pruned_model_top_1_prune_90_acc_0.9_3bits.onnx"]
    rows = pd.read_excel(folder / "results_batch_0.xlsx").set_index("q_bits")
    assert list(rows["way"]) == ["quantized after training", "quantized in training"]
    assert rows.loc[3, "rounding_bits"] == network.kept_bits
    assert rows.loc[3, "accuracy_clear_test_set"] == pytest.approx(network.accuracy(*data["test"]))
    assert rows.loc[3, "accuracy_clear_validation"] == pytest.approx(network.accuracy(*data["val"]))
    assert rows.loc[3, "status"] == "ok"
    assert rows.loc[3, "decisions_equal_clear"] == 4
    assert abs(rows.loc[3, "accuracy_simulated"] - rows.loc[3, "accuracy_clear_same_rows"]) < 0.02
    predictions = pd.read_excel(folder / "results_batch_0.xlsx", sheet_name="predictions").query("q_bits == 3")
    clear = network.run(data["test"][0][predictions["test_row"]])[0]
    np.testing.assert_allclose(predictions["output_clear"], clear, atol=1e-5)


def test_summary_tells_the_price_against_the_plain_way(run):
    folder, _, _ = run
    sheets = pd.read_excel(folder / "fhe_summary.xlsx", sheet_name=None)
    summary, plain = sheets["summary"].set_index("q_bits"), sheets["plain way"].set_index("q_bits")
    assert sorted(summary.index) == [2, 3]
    assert list(summary["complexity"]) == sorted(summary["complexity"])
    assert plain["compared"].sum() == 1
    dear = plain.loc[plain["compared"], "complexity"].iloc[0]
    np.testing.assert_allclose(summary["times_cheaper_than_plain"], dear / summary["complexity"])
    assert (plain["way"] == "plain").all()
    assert (plain["pbs"] == 5).all()  # four ReLU and the sigmoid
    assert (summary["n"] == 4).all()
    assert summary["on_front"].any()
    assert summary["accuracy_fhe_low95"].notna().all()
    assert (folder / "fhe_frontier.png").read_bytes().startswith(b"\x89PNG")


def test_step_5_refuses_a_damaged_quantized_network_and_a_damaged_benchmark(run, arrays, tmp_path, capsys):
    folder, _, _ = run
    source = folder / "pruned_model_top_1_prune_90_acc_0.9.onnx"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "quantized").mkdir()
    damaged = tmp_path / "quantized" / f"{source.stem}_3bits.onnx"
    common = ["--data-dir", arrays, "--workdir", tmp_path, "--bits", "3", "--samples", "1"]
    for content in (b"hello", source.read_bytes()):  # the second is a float network
        damaged.write_bytes(content)
        assert "is no quantized network" in refusal(step5.main, common, capsys)
    damaged.unlink()
    (tmp_path / "benchmark.xlsx").write_bytes(b"hello")
    assert "benchmark.xlsx" in refusal(step5.main, common, capsys)
    assert not list(tmp_path.glob("fhe_*")) + list(tmp_path.glob("results_*"))
