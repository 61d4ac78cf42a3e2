"""Quantized networks: training, integers, ONNX and the imported graph must be one and the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from conftest import small_network

import dynamic_pruning_eval as step3
import h5_onnx_converter as step4
from fhe_mlp import circuit, cli, configuration, networks, neuron_removal, qat
from fhe_mlp import quantized as q
from fhe_mlp.arrays import load_arrays

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
def ensemble(keras_once):
    return qat.Ensemble(float_layers((32, 12, 7, 1)), MEMBERS, random_rows(500), dtype="float64")


@pytest.fixture(scope="module")
def keras_once():
    return networks.start_tensorflow(42)


@pytest.fixture(scope="module")
def members(ensemble):
    return ensemble.networks(random_rows(500))


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_fake_quantization_and_the_imported_graph_agree_exactly(ensemble, members, member):
    network, training = members[member], random_rows(500)
    assert (network.bits, network.rounding_bits) == MEMBERS[member]
    assert max(layer.accumulator_bits for layer in network.layers) > network.rounding_bits  # the rounding is at work
    rows = random_rows(3000, seed=2)
    widths = [np.full((len(MEMBERS), 1, 1), layer.accumulator_bits) for layer in network.layers[:-1]]
    trained = ensemble.forward(rows, widths)[0].numpy()[member]
    reference, accumulators = network.run(rows)
    graph = configuration.without_sigmoid(q.to_onnx(network, 14)).SerializeToString()
    calibration = configuration.calibration_rows(network, training, 100)
    setting = configuration.Setting(6, 2.0**-40, 0.0)
    module = circuit.compile_circuit(
        configuration.Configuration("m", network.bits, graph, network.rounding_bits, True, setting, calibration, {})
    )
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
        assert network.layers[-1].weight_bits <= qat.LAST_WEIGHT_BITS


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
        back = qat.centred(odd, training)
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
        lambda f: f["quantized/4"].attrs.__setitem__("input_bits", 10**6),
        lambda f: f["quantized/4"].attrs.__setitem__("input_step", np.nan),
        lambda f: f["quantized/4/0/accumulator_bits"].__setitem__((), 10**6),
        lambda f: f["quantized/4/0/output_step"].__setitem__((), np.inf),
        lambda f: f["quantized/4/1/weights"].__setitem__((0, 0), -(2**31)),
        lambda f: stored_anew(f, "quantized/4/0/output_step", "x"),
        lambda f: stored_anew(f, "quantized/4/0/scale", dtype="f4", shape=(2**36,), chunks=(64,)),
        lambda f: stored_anew(f, "quantized/4/0/scale", dtype="f4", shape=(12,), external=[(str(path), 0, 48)]),
        lambda f: [f.__setitem__(f"quantized/4/{n}", f["quantized/4/0"]) for n in range(3, 99)],
    ):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            edit(file)
        with pytest.raises(cli.InputError, match=r"damaged .*; make it with: the command"):
            q.read_h5(path, "the command")
    first = "model_weights/hidden_1/hidden_1/kernel:0"
    deep = {"config": {"layers": [json.loads(json.dumps(LAYER).replace("NAME", f"n{k}")) for k in range(200)]}}
    for edit in (
        lambda f: f.attrs.__setitem__("model_config", "[" * 60_000),
        lambda f: f.attrs.__setitem__("model_config", json.dumps(deep)),  # 13 GB
        lambda f: stored_anew(f, first, dtype="f4", shape=(2**36,), chunks=(64,)),
        lambda f: stored_anew(f, first, dtype="f4", shape=(32, 12), external=[(str(path), 0, 1536)]),
    ):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            edit(file)
        with pytest.raises(cli.InputError, match=r"not a valid network .*; make it with: the command"):
            networks.load_mlp(path, "the command")


@pytest.mark.parametrize("item", [(0, 0), (0, 2**64 - 16), (1, 2**64 - 16)])
def test_a_heap_that_hdf5_would_walk_through_for_ever_is_refused(keras_once, tmp_path, item):
    path = tmp_path / "x.h5"
    content = bytearray(networks.mlp_bytes(networks.build(float_layers((32, 3, 1)))))
    struct.pack_into("<H6xQ", content, content.index(b"GCOL") + 16, *item)
    path.write_bytes(content)
    for read in (networks.load_mlp, q.read_h5):
        with pytest.raises(cli.InputError, match="heap of its texts is damaged"):
            read(path, "the command")


LAYER = {"class_name": "Dense", "config": {"name": "NAME", "units": 4096, "activation": "relu", "batch_shape": [0, 32]}}


def stored_anew(file, name, *args, **kwargs):
    """Another data set in place of that of an .h5 file."""
    del file[name]
    file.create_dataset(name, data=args[0]) if args else file.create_dataset(name, **kwargs)


def recursive(model):
    """A function that calls itself, on which ONNX's checker ends the process."""
    quant = model.functions[0]
    quant.node.add(op_type=quant.name, domain=quant.domain, input=quant.input, output=["again"])
    quant.opset_import.add(domain=quant.domain, version=1)


def put(values, **changed):
    """Change values of an ONNX graph's metadata."""
    for entry in values.metadata_props:
        entry.value = changed.get(entry.key, entry.value)


def elsewhere(model):
    """Move the first weights into another file."""
    onnx.external_data_helper.set_external_data(model.graph.initializer[-1], "weights.bin")


def without_nodes(model):
    """The output is a constant."""
    model.graph.ClearField("node")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 1), np.float32), "probability"))


def set_initializer(model, name, value):
    """Change one constant of an ONNX graph."""
    one = next(v for v in model.graph.initializer if v.name == name)
    one.CopyFrom(onnx.numpy_helper.from_array(np.float32(value), name))


@pytest.mark.parametrize(
    "edit",
    [
        recursive,
        elsewhere,
        lambda model: put(model, accumulator_bits="99999999999 9"),
        lambda model: set_initializer(model, "features.bits", 1e30),
        lambda model: set_initializer(model, "layer_0.output.bits", 1e30),
        lambda model: set_initializer(model, "layer_0.weights.step", 0),
        without_nodes,
    ],
)
def test_damaged_graphs_are_refused(members, tmp_path, monkeypatch, edit):
    model = q.to_onnx(members[1], 14)
    path = configuration.quantized_path(tmp_path / "x.onnx", 4)
    path.parent.mkdir()
    onnx.save(model, path)
    setting, rows = configuration.Setting(6, 2.0**-13, 0.0), random_rows(50)
    options = (tmp_path / "x.onnx", 4, setting, {"train": (rows, None)}, rows, {})
    assert configuration.load_configuration(*options).trained
    edit(model)
    onnx.save(model, path)
    (tmp_path / "weights.bin").write_bytes(bytes(10_000))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.InputError, match="not a valid quantized network"):
        configuration.load_configuration(*options)


def test_a_network_without_hidden_layer_is_refused(members):
    with pytest.raises(ValueError, match="hidden"):
        q.check(dataclasses.replace(members[1], layers=members[1].layers[-1:]))


@pytest.mark.parametrize("part", ["node", "output"])
def test_a_graph_without_nodes_or_output_is_no_network(tmp_path, part):
    path = small_network(tmp_path / "x.onnx")
    model = onnx.load(path)
    if part == "node":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 1), np.float32), "y"))
    else:
        model.graph.input.append(model.graph.output[0])
        model.graph.input[1].name = "other"
    model.graph.ClearField(part)
    onnx.save(model, path)
    with pytest.raises(cli.InputError, match="sigmoid|MLP"):
        configuration.load_network(path, 32)


def test_training_gains_what_quantization_lost(arrays, keras_once):
    data = load_arrays(arrays)
    model = networks.build(float_layers((32, 16, 1)))
    even = np.full(len(data["train"][1]), 1 / len(data["train"][1]))
    step3.fine_tune(model, data["train"], even, 5, 0)
    ensemble = qat.Ensemble(networks.dense_layers(model), [(2, 4), (3, 4)], data["train"][0])
    before = [n.balanced_accuracy(*data["val"]) for n in ensemble.networks(data["train"][0])]
    ensemble.train(data, data["train"][1], even, 0.1, 8, 42)
    after = [n.balanced_accuracy(*data["val"]) for n in ensemble.networks(data["train"][0])]
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


def test_rank_is_by_cost_among_the_accurate_and_by_accuracy_among_the_rest():
    table = pd.DataFrame(
        {
            "rate_percent": [25, 50, 75, 90, 95],
            "val_balanced_accuracy": [0.99, 0.98, 0.98, 0.97, 0.9],
            "quantized_val_balanced_accuracy": [np.nan, 0.985, 0.981, 0.97, 0.975],
            "predicted_complexity": [np.nan, 9e9, 4e9, 2e9, 1e9],
        }
    )
    assert step3.rank(table, 0.98) == [2, 1, 4, 3, 0]
    assert step3.rank(table.drop(columns="quantized_val_balanced_accuracy"), 0.98) == [0, 2, 1, 3, 4]
    assert (
        step3.lowest_cost(table[1:].rename(columns={"quantized_val_balanced_accuracy": "x"}), 0.98)["rate_percent"]
        == 75
    )
    assert step3.lowest_cost(table, 1.0)["rate_percent"] == 25
