"""Integer networks: training, integers, ONNX Runtime and circuit are one and the same."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from conftest import most_off, random_layers, random_rows, small_data
from scipy.stats import norm

import dynamic_pruning_eval as step3
from fhe_mlp import cli, encrypted, networks, quantized
from fhe_mlp.dataset import load_dataset
from fhe_mlp.quantized import selection
from fhe_mlp.quantized.files import NUMBERS
from fhe_mlp.quantized.network import noise_steps
from fhe_mlp.scaling import quantize

ROWS, OTHERS = random_rows(500), random_rows(1000, seed=2)
BITS, P_ERROR = [2, 4, 7], 2.0**-13


@pytest.fixture(scope="module")
def training(keras):
    """Module that imports TensorFlow."""
    from fhe_mlp.quantized import training

    return training


def ensemble_of(widths, bits=(4, 7), rounding_bits=5, p_error=2.0**-6):
    from fhe_mlp.quantized.training import Ensemble

    return Ensemble(random_layers(widths), quantized.Form(bits, rounding_bits, p_error), ROWS, "float64")


@pytest.fixture(scope="module", params=["tables", "narrow", "linear"])
def ensemble(training, request):
    """Lookup tables beside a linear path, the same of two features, whose sums need no rounding, or the path alone."""
    if request.param == "linear":
        return ensemble_of((32, 1), BITS, 4, P_ERROR)
    if request.param == "narrow":
        layers = random_layers((32, 5, 1))
        layers[0][0][2:] = 0
        return training.Ensemble(layers, quantized.Form([2, 3], 8, P_ERROR), ROWS, "float64")
    made, rng = ensemble_of((32, 9, 1), BITS, 4, P_ERROR), np.random.default_rng(7)
    for name, size in (("linear", 0.1), ("table", 0.4)):  # tables that no ReLU has
        made.parts[name].assign_add(rng.normal(0, size, made.parts[name].shape))
    made.remove(5, ROWS[:300])
    made.fit_ranges(ROWS)
    return made


def test_training_integers_onnx_runtime_and_circuit_agree_exactly(ensemble):
    form = ensemble.form
    for member, network in enumerate(ensemble.networks(ROWS)):
        assert (network.bits, network.p_error) == (form.bits[member], form.p_error)
        sums, logits = network.sums(OTHERS), network.logits(OTHERS)
        # Of the rows in its ranges: training does not leave them.
        inside = np.array([not network.overflowing(row[None]) for row in OTHERS])
        assert inside.mean() > 0.9 and len(np.unique(logits)) > 4
        trained = ensemble.forward(OTHERS)[0].numpy()[member]
        np.testing.assert_allclose(trained[inside], logits[inside], atol=1e-6)
        session = onnxruntime.InferenceSession(quantized.to_onnx(network).SerializeToString())
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"features": OTHERS})))
        for name, expected in zip(("tables", "linear"), sums):
            np.testing.assert_array_equal(outputs.get(name, np.zeros((1000, 1)))[:, 0], expected)
        np.testing.assert_array_equal(outputs["probability"][:, 0] > 0.5, logits > 0)
        if network.neurons:
            assert network.neurons == 5 and network.rounding_bits == min(form.rounding_bits, network.accumulator_bits)
            scheme, some = encrypted.choose(network)(network, ROWS, 2), OTHERS[inside][:100]
            x = quantize(some, network.input_bits, network.input_step)
            found = np.transpose([scheme.circuit.beat.graph(row) for row in x])
            np.testing.assert_array_equal(found, network.sums(some))
            assert (np.abs(scheme.simulate(some) - network.logits(some)) < most_off(network, some) + 1e-9).all()
            cost = scheme.cost()
            assert cost["pbs"] == 5 and cost["complexity"] == pytest.approx(network.predicted_complexity, rel=0.01)


def test_integers_are_as_narrow_as_they_say(ensemble):
    for network in ensemble.networks(ROWS):
        assert not network.overflowing(ROWS)
        for weights in (network.weights, network.linear):
            assert np.abs(weights).max(initial=0) <= 2 ** (network.bits - 1) - 1
        if network.neurons:
            accumulators, (tables, linear) = network.accumulators(ROWS), network.sums(ROWS)
            widths = (network.accumulator_bits, network.tables_bits, network.linear_bits)
            assert widths == tuple(map(quantized.signed_bits, (accumulators, tables, linear)))
            middle = (accumulators.max(axis=0) + accumulators.min(axis=0)) / 2
            assert np.abs(middle).max() <= 2 * network.rounding_unit
    for network in ensemble.networks(0.3 * ROWS):  # other rows can leave them, but not those of a linear path alone
        assert not network.overflowing(0.3 * ROWS) and bool(network.overflowing(ROWS)) == bool(network.neurons)
        outside = np.abs(network.accumulators(ROWS)) > 2.0 ** (network.accumulator_bits - 1) + network.rounding_unit
        assert network.overflowing(ROWS[outside.any(axis=1)]) == outside.any(axis=1).sum()


def test_all_accumulators_lie_in_the_range_after_fitting(training):
    ensemble, wide = ensemble_of((32, 6, 1)), 1.5 * random_rows(500, seed=8).clip(-2, 2)
    ensemble.parts["bias"].assign_add(np.full(ensemble.parts["bias"].shape, 0.7))
    aim = ensemble.range_bits.ravel()
    assert max(network.accumulator_bits for network in ensemble.networks(wide)) > aim.min()
    ensemble.fit_ranges(wide)
    assert all(network.accumulator_bits <= bits for network, bits in zip(ensemble.networks(wide), aim))


def test_sums_of_tables_keep_to_their_bits_and_the_function_nearly_stays(training):
    ensemble = ensemble_of((32, 6, 1))
    ensemble.parts["table"].assign(60 * ensemble.parts["table"])
    wide = ensemble.outputs(ensemble.inputs(ROWS))[0].numpy().sum(axis=2)
    assert (np.abs(wide).max(axis=1) > 1.1 * training.MOST).all()
    for network, logits in zip(ensemble.networks(ROWS), wide):
        assert network.tables_bits <= training.SUM_BITS and quantized.signed_bits(network.tables) <= training.SUM_BITS
        np.testing.assert_allclose(network.sums(ROWS)[0] * network.table_step, logits, atol=6 * network.table_step)


def test_of_tables_those_are_removed_whose_place_others_can_take(training):
    """In one member neuron 2 gives the same for every row, in the other neuron 4 half of what neuron 1 gives."""
    ensemble = ensemble_of((32, 6, 1))
    values = {name: variable.numpy() for name, variable in ensemble.parts.items()}
    values["table"] = 4 * values["table"]
    values["table"][0, 2] = 3.0
    for name in ("kernel", "scale", "bias"):
        values[name][1, :, 4] = values[name][1, :, 1]
    values["table"][1, 4] = values["table"][1, 1] / 2
    ensemble._set(values)
    before = ensemble.forward(OTHERS)[0].numpy()
    ensemble.remove(5, ROWS)
    after = ensemble.forward(OTHERS)[0].numpy()
    assert ensemble.neurons == 5 and np.std(before[1]) > 10 * training.SUM_STEP
    np.testing.assert_allclose(ensemble.parts["table"][0], np.delete(values["table"][0], 2, axis=0), atol=1e-9)
    assert np.abs(after - before).max() <= 3 * training.SUM_STEP  # entries are rounded to steps


def test_hopeless_rows_have_a_bounded_loss_and_soft_labels_keep_their_side(training):
    logits = np.linspace(-30, 30, 601)
    loss = {label: training.generalized_cross_entropy(label, logits).numpy() for label in (0.0, 0.3, 1.0)}
    np.testing.assert_allclose(loss[1.0], (1 - (1 / (1 + np.exp(-logits))) ** 0.4) / 0.4, atol=1e-9)
    np.testing.assert_allclose(loss[0.0], loss[1.0][::-1], atol=1e-12)
    assert loss[1.0].max() <= 1 / training.LOSS_POWER and -5 < logits[loss[0.3].argmin()] < 0


def test_training_gains_what_quantization_lost_also_beside_neurons_without_weights(arrays, training):
    data, start = load_dataset(arrays), networks.MLP(random_layers((32, 16, 1)))
    layers = step3.fine_tune(start, data, 5, 0).layers
    layers[0][0][:, [1, 4]] = 0
    ensemble = training.Ensemble(layers, quantized.Form([2, 3], 4, 2.0**-6), data.train.X)
    before = [network.balanced_accuracy(data.val) for network in ensemble.networks(data.train.X)]
    ensemble.train(quantized.Lesson(data, data.train.y.astype(float), 0.1, 8), 42)
    after = [network.balanced_accuracy(data.val) for network in ensemble.networks(data.train.X)]
    assert min(np.subtract(after, before)) > 0.01, (before, after)


def test_the_epoch_is_chosen_by_labels_which_know_nothing_of_a_threshold(training, monkeypatch):
    y, validated, loss = (ROWS[:, 0] > 0).astype(int), [], training.generalized_cross_entropy
    data = small_data((ROWS[:400], y[:400], "1"), (ROWS[400:], y[400:], "1"))
    recorded = lambda labels, logits: validated.append(logits.numpy()) or loss(labels, logits)  # noqa: E731
    monkeypatch.setattr(training, "generalized_cross_entropy", recorded)
    monkeypatch.setattr(training.tf, "function", lambda function: function)  # whose logits are numbers
    ensemble = ensemble_of((32, 1))
    ensemble.train(quantized.Lesson(data, y[:400].astype(float), 0.0, 1, shift=-2.0), 0)
    np.testing.assert_allclose(validated[-1], ensemble.forward(ROWS[400:])[0].numpy() + 2)


def test_noise_is_off_by_half_a_step_with_its_probability():
    for p_error in (0.25, 2.0**-6, 2.0**-40, 2.0**-53, 2.0**-60):
        assert 2 * norm.sf(0.5 / noise_steps(p_error)) == pytest.approx(p_error)


# ---------------------------------------------------------------------------------------------------------------- files
def test_files_hold_the_networks_as_they_are_the_h5_beside_the_float_one(ensemble, tmp_path):
    members, mlp = ensemble.networks(ROWS), networks.MLP(random_layers((32, 12, 1)))
    h5, onnx_file = tmp_path / "x.h5", tmp_path / "x.onnx"
    h5.write_bytes(quantized.add_networks(networks.h5_bytes(mlp), members))
    assert np.array_equal(networks.load_mlp(h5, "").layers[0][0], mlp.layers[0][0])
    for network, back in zip(members, quantized.read_networks(h5, ""), strict=True):
        onnx_file.write_bytes(quantized.to_onnx(network).SerializeToString())
        for copy in (back, quantized.load_onnx(onnx_file, 32)):
            for field in dataclasses.fields(network):
                np.testing.assert_array_equal(getattr(copy, field.name), getattr(network, field.name))


def test_a_damaged_file_or_another_graph_is_refused(training, tmp_path):
    network, path, onnx_file = ensemble_of((32, 5, 1)).networks(ROWS)[0], tmp_path / "x.h5", tmp_path / "x.onnx"
    path.write_bytes(quantized.add_networks(networks.h5_bytes(networks.MLP(random_layers((32, 1)))), [network]))
    content = quantized.to_onnx(network).SerializeToString()
    facts = {name: repr(getattr(network, name)) for name in NUMBERS}
    for damage in (
        lambda group: group.attrs.__setitem__("input_step", np.nan),
        lambda group: group["weights"].__setitem__((0, 0), -(2**31)),
        lambda group: group.__delitem__("linear"),
    ):
        with h5py.File(path, "r+") as file:
            damage(file["quantized/4"])
        with pytest.raises(cli.InputError, match=r"not a valid file of quantized .*make it with: the command"):
            quantized.read_networks(path, "the command")
    for change in (
        lambda model: model.graph.ClearField("node"),
        lambda model: model.graph.node.append(model.graph.node.pop(0)),  # another order
        lambda model: onnx.helper.set_model_props(model, {**facts, "table_step": "0.5"}),
        lambda model: model.ClearField("metadata_props"),
    ):
        model = onnx.load_from_string(content)
        change(model)
        onnx_file.write_bytes(model.SerializeToString())
        with pytest.raises(cli.InputError, match="not a valid quantized network"):
            quantized.load_onnx(onnx_file, 32)
    onnx_file.write_bytes(content)
    with pytest.raises(cli.InputError, match="32 features; the arrays have 31"):
        quantized.load_onnx(onnx_file, 31)


# --------------------------------------------------------------------------------------------------------------- choice
def test_rank_is_by_cost_among_the_accurate_and_by_accuracy_among_the_rest():
    accuracy, cost = [np.nan, 0.985, 0.981, 0.97, 0.975], [np.nan, 9e9, 4e9, 2e9, 1e9]
    table = pd.DataFrame({"rate_percent": [25, 50, 75, 90, 95], "predicted_complexity": cost})
    table["val_balanced_accuracy"], table[f"quantized_{quantized.RANKING}"] = [0.99, 0.98, 0.98, 0.97, 0.9], accuracy
    assert step3.rank(table, 0.98) == [2, 1, 4, 3, 0]
    assert step3.rank(table.drop(columns=f"quantized_{quantized.RANKING}"), 0.98) == [0, 2, 1, 3, 4]
    bits = pd.DataFrame({"bits": [5, 3, 4, 7], quantized.RANKING: accuracy[1:], "predicted_complexity": cost[1:]})
    assert quantized.lowest_cost(bits, 0.98)["bits"] == 3
    assert quantized.lowest_cost(bits, 1.0)["bits"] == 5  # none has it: the most accurate
    assert quantized.lowest_cost(bits.assign(predicted_complexity=[4.01e9, 4e9, 1, 1]), 0.98)["bits"] == 5


def test_a_linear_network_has_the_best_penalty_and_is_rounded_or_trained(keras, monkeypatch):
    parts, rng = [], np.random.default_rng(4)
    for n in (300, 400):
        y, X = rng.integers(0, 2, n), rng.normal(0, 0.7, (n, 40)).clip(-3, 3)
        X[:, 3] += y - 0.5
        parts.append((X, y, "1"))
    data, found = small_data(*parts), []
    for penalties in (*((penalty,) for penalty in selection.PENALTIES), selection.PENALTIES):
        monkeypatch.setattr(selection, "PENALTIES", penalties)
        found.append(quantized.fit_linear(data, 0.0, 0))
    *single, best = (mlp.balanced_accuracy(data.val) for mlp in found)
    assert len(set(single)) > 1 and best == pytest.approx(max(single), abs=0.005)
    form, lesson = quantized.Form([2, 2, 7, 7], 5, 2.0**-6), quantized.Lesson(data, data.train.y, 0.0, 2)
    table = quantized.quantize_linear(found[-1], form, lesson, 100)
    assert list(zip(table["bits"], table["trial"])) == [(2, 0), (2, 1), (7, 0), (7, 1)] and not table["pbs"].any()
    for _, pair in table.groupby("bits"):
        assert pair.loc[pair["chosen"], quantized.RANKING].item() == pair[quantized.RANKING].max()
    exact, rounded = (network.logits(data.test.X) for network in (found[-1], table.loc[2, "network"]))
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()
