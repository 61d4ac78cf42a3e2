"""Quantized networks: training, integers, ONNX and the imported graph must be one and the same."""

from __future__ import annotations

import dataclasses
import functools
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
from fhe_mlp import candidates, circuit, cli, configuration, graphs, networks, neuron_removal, qat, tables
from fhe_mlp import quantized as q
from fhe_mlp.arrays import load_arrays
from fhe_mlp.packed import PackedNetwork

BITS = [2, 4, 7]


def float_layers(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        ((rng.normal(size=(a, b)) / np.sqrt(a)).astype(np.float32), (rng.normal(size=b) / 4).astype(np.float32))
        for a, b in itertools.pairwise(widths)
    ]


def random_rows(rows, seed=1):
    return np.clip(np.random.default_rng(seed).normal(0, 1.2, (rows, 32)), -3, 3).astype(np.float32)


@pytest.fixture(scope="module")
def keras_once():
    return networks.start_tensorflow(42)


@pytest.fixture(scope="module", params=["relu", "table", "linear"])
def ensemble(keras_once, request):
    """Of two hidden layers of ReLUs, of one of tables, or of the linear path alone."""
    form = {"bits": BITS, "rounding_bits": 4, "p_error": 2.0**-13, "X": random_rows(500), "dtype": "float64"}
    if request.param == "relu":
        return qat.ReluEnsemble(float_layers((32, 12, 7, 1)), **form)
    if request.param == "linear":
        return tables.LinearEnsemble(float_layers((32, 1)), **form)
    made, rng = tables.TableEnsemble(float_layers((32, 9, 1)), **form), np.random.default_rng(7)
    for name, size in (("linear", 0.1), ("table", 0.4)):  # tables that no ReLU has
        made.parts[name].assign_add(rng.normal(0, size, made.parts[name].shape))
    made.remove(5, random_rows(300))
    made.fit_ranges(random_rows(500))
    return made


@pytest.fixture(scope="module")
def members(ensemble):
    return ensemble.networks(random_rows(500))


@pytest.mark.parametrize("member", range(len(BITS)))
def test_training_integers_and_the_circuit_agree_exactly(ensemble, members, member):
    network, training = members[member], random_rows(500)
    assert (network.bits, network.rounding_bits, network.p_error) == (BITS[member], 4, 2.0**-13)
    if network.hidden:  # the rounding is at work
        assert max(layer.accumulator_bits for layer in network.hidden) > network.rounding_bits
    rows = random_rows(3000, seed=2)
    for index, layer in enumerate(network.hidden):  # training aims at these bits, and need not reach them
        if isinstance(ensemble, qat.ReluEnsemble):
            ensemble.range_bits[index][member] = layer.accumulator_bits
    trained = ensemble.forward(rows)[0].numpy()[member]
    reference, sums = network.run(rows)
    graph = configuration.encrypted_part(graphs.to_onnx(network, 14)).SerializeToString()
    calibration = configuration.calibration_rows(network, training)
    setting = configuration.Setting(6, 2.0**-40, 0.0)
    module = circuit.compile_circuit(
        configuration.Configuration("m", network.bits, graph, 4, 2.0**-40, True, setting, calibration, {})
    )
    imported = circuit.outputs(module, rows, "disable")
    # A logit is an integer or two times a step each, plus a constant: equal to the last bits is equal integers.
    inside = np.ones(len(rows), bool)  # of the ranges; beyond, a table is flat and a ReLU is not
    for layer, accumulator in zip(network.hidden, sums):
        inside &= (np.abs(accumulator) < 2 ** (layer.accumulator_bits - 1) - network.rounding_unit(layer)).all(axis=1)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(trained[inside], reference[inside], atol=1e-6)
    np.testing.assert_allclose(imported, reference, atol=1e-6)
    assert len(np.unique(reference)) > 4
    neurons = {qat.ReluEnsemble: [12, 7], tables.TableEnsemble: [5], tables.LinearEnsemble: []}[type(ensemble)]
    assert [total.shape[1] for total in sums[: len(neurons)]] == neurons
    assert network.pbs() == sum(neurons)
    if neurons:
        assert module.fhe_circuit.programmable_bootstrap_count == network.pbs()
        parts = module.forward(rows[:1].astype(np.float64), fhe="disable")
        assert isinstance(parts, tuple) == (len(neurons) == 1)  # the linear path beside the tables
    else:
        assert isinstance(module, PackedNetwork)


def test_integers_are_as_narrow_as_they_say(members):
    for network in members:
        sums = network.run(random_rows(500))[1]
        for layer, accumulator in zip(network.hidden, sums):
            assert np.abs(layer.weights).max() <= 2 ** (network.bits - 1) - 1
            assert q.signed_bits(accumulator) == layer.accumulator_bits
            middle = (accumulator.max(axis=0) + accumulator.min(axis=0)) / 2
            assert np.abs(middle).max() <= 2 * network.rounding_unit(layer)
        assert np.abs(network.last.weights).max(initial=0) <= 2 ** (min(network.bits, qat.LAST_WEIGHT_BITS) - 1) - 1
        assert np.abs(network.last.linear).max() <= 2 ** (network.bits - 1) - 1


def test_a_range_is_moved_to_the_middle_and_the_function_stays(keras_once):
    rng = np.random.default_rng(0)
    x, weights = rng.integers(-15, 16, (400, 32)), rng.integers(-3, 4, (32, 6)).astype(np.int32)
    for away in (0, 64, -100, 1000):
        bias = np.full(6, away, np.int32)
        function = functools.partial(qat.quantized_relu, scale=0.1, offset=-0.1 * away, step=1.0, bits=4)
        outputs, layer = qat.hidden_layer(x, weights, bias, function, 1.0, 9, 5)
        assert np.abs(layer.bias).max() <= 64
        network = q.QuantizedNetwork(4, 5, 0.1, 5, 1.0, (layer,), None)
        unit = network.rounding_unit(layer)
        index = np.floor((x @ weights + layer.bias) / unit + 0.5).astype(int) + 16
        np.testing.assert_array_equal(outputs, np.take_along_axis(layer.table, index.clip(0, 31), 0))
        want = qat.quantized_relu(x @ weights, 0.1, 0.0, 1.0, 4)
        assert np.abs(outputs - want).max() <= 0.05 * unit + 1


def test_of_tables_those_are_removed_whose_place_others_can_take(keras_once):
    """In one member neuron 2 gives the same for every row, in the other neuron 4 half of what neuron 1 gives."""
    ensemble = tables.TableEnsemble(float_layers((32, 6, 1)), [4, 7], 5, 2.0**-6, random_rows(500), "float64")
    values = {name: variable.numpy() for name, variable in ensemble.parts.items()}
    values["table"] = 4 * values["table"]
    values["table"][0, 2] = 3.0
    for name in ("kernel", "scale", "bias"):
        values[name][1, :, 4] = values[name][1, :, 1]
    values["table"][1, 4] = values["table"][1, 1] / 2
    for name, value in values.items():
        ensemble.parts[name].assign(value)
    rows = random_rows(300, seed=3)
    before, table = ensemble.forward(rows)[0].numpy(), ensemble.parts["table"].numpy()
    ensemble.remove(5, rows)
    assert ensemble.neurons == 5
    after = ensemble.forward(rows)[0].numpy()
    np.testing.assert_allclose(after[0], before[0], atol=1e-9)
    np.testing.assert_allclose(ensemble.parts["table"].numpy()[0], np.delete(table[0], 2, axis=0), atol=1e-9)
    assert np.abs(after[1] - before[1]).max() <= 2 * tables.SUM_STEP  # entries are rounded to steps
    assert np.std(before[1]) > 10 * tables.SUM_STEP


def test_hopeless_rows_have_a_bounded_loss_and_soft_labels_keep_their_side(keras_once):
    logits = np.linspace(-30, 30, 601)
    loss = {label: qat.generalized_cross_entropy(label, logits).numpy() for label in (0.0, 0.3, 1.0)}
    p = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(loss[1.0], (1 - p**0.4) / 0.4, atol=1e-9)
    np.testing.assert_allclose(loss[0.0], loss[1.0][::-1], atol=1e-12)
    assert loss[1.0].max() <= 1 / qat.LOSS_POWER
    assert -5 < logits[loss[0.3].argmin()] < 0


@pytest.mark.parametrize("kind", [qat.ReluEnsemble, tables.TableEnsemble])
def test_a_neuron_without_incoming_weights_breaks_nothing(keras_once, kind):
    layers, X = float_layers((32, 6, 1)), random_rows(300)
    layers[0][0][:, [1, 4]] = 0
    ensemble = kind(layers, [2, 7], 5, 2.0**-6, X)
    even, y = np.full(300, 1 / 300), (X[:, 0] > 0).astype(np.int64)
    ensemble.train({"train": (X, y), "val": (X, y)}, y.astype(float), even, 0.0, 1, 0)
    for network in ensemble.networks(X):
        assert np.isfinite(network.run(X)[0]).all()


def test_all_accumulators_lie_in_the_range_after_fitting(keras_once):
    X = random_rows(500)
    ensemble = tables.TableEnsemble(float_layers((32, 6, 1)), [4, 7], 5, 2.0**-6, X, "float64")
    aim = ensemble.range_bits.ravel()
    ensemble.parts["bias"].assign_add(np.full(ensemble.parts["bias"].shape, 0.7))
    wide = 1.5 * random_rows(500, seed=8).clip(-2, 2)
    assert max(n.hidden[0].accumulator_bits for n in ensemble.networks(wide)) > aim.min()
    ensemble.fit_ranges(wide)
    for network, bits in zip(ensemble.networks(wide), aim):
        assert network.hidden[0].accumulator_bits <= bits


def test_sums_of_tables_keep_to_their_bits_and_the_function_nearly_stays(keras_once):
    X = random_rows(500)
    ensemble = tables.TableEnsemble(float_layers((32, 6, 1)), [4, 7], 5, 2.0**-6, X, "float64")
    ensemble.parts["table"].assign(60 * ensemble.parts["table"])
    wide = ensemble.outputs(ensemble.inputs(X))[0].numpy().sum(axis=2)
    assert (np.abs(wide).max(axis=1) > 1.1 * tables.MOST).all()
    for network, tf_sum in zip(ensemble.networks(X), wide):
        layer, total = network.hidden[0], network.run(X)[1][1]
        assert q.signed_bits(total) <= tables.SUM_BITS and q.signed_bits(layer.table) <= tables.SUM_BITS
        np.testing.assert_allclose(total[:, 0] * layer.step, tf_sum, atol=6 * layer.step)
        assert network.predicted_complexity(X) == 6 * q.pbs_complexity(2.0**-6, 5, tables.SUM_BITS)


def test_signed_bits_are_those_of_concrete():
    from concrete.ml.common.utils import compute_bits_precision

    for low, high in ((-1, 0), (-8, 7), (-9, 7), (-8, 8), (-3, 31), (-32, 32), (-5, 1)):
        assert q.signed_bits(np.array([low, high])) == compute_bits_precision(np.array([low, high]))


def test_onnx_runtime_gives_the_same_and_the_graph_reads_back_as_it_was(members):
    rows = random_rows(2000, seed=3)
    for network in members:
        graph = graphs.to_onnx(network, 14)
        onnx.checker.check_model(graph, full_check=True)
        session = onnxruntime.InferenceSession(graph.SerializeToString())
        (probability,) = session.run(None, {"features": rows})
        np.testing.assert_allclose(probability, step4.probabilities(network, rows), atol=1e-5)
        same_network(graphs.from_onnx(graph), network)


def same_network(one, other):
    """All numbers are equal, those that ONNX holds as float32 but for that."""
    for a, b in zip((one, *one.hidden, one.last), (other, *other.hidden, other.last), strict=True):
        for field in dataclasses.fields(a):
            if field.name not in ("hidden", "last"):
                np.testing.assert_allclose(getattr(a, field.name), getattr(b, field.name), rtol=1e-7)


def test_h5_holds_the_networks_beside_the_float_one_and_damage_is_refused(members, keras_once, tmp_path):
    import h5py

    layers = float_layers((32, 12, 7, 1))
    path = tmp_path / "x.h5"
    path.write_bytes(q.add_to_h5(networks.mlp_bytes(networks.build(layers)), members))
    rows = random_rows(200, seed=4)
    for network, back in zip(members, q.read_h5(path, ""), strict=True):
        np.testing.assert_array_equal(back.run(rows)[0], network.run(rows)[0])
        same_network(back, network)
    if not members[0].hidden:
        return
    np.testing.assert_array_equal(networks.dense_layers(networks.load_mlp(path, ""))[0][0], layers[0][0])
    whole = path.read_bytes()
    for edit in (
        lambda f: f["quantized/4/0"].pop("weights"),
        lambda f: f["quantized/4/0/weights"].__setitem__((0, 0), 99),
        lambda f: f["quantized/4/0/table"].__setitem__((0, 0), 10**6),
        lambda f: f["quantized/4/last/scale"].__setitem__((), np.nan),
        lambda f: f["quantized/4"].attrs.__setitem__("bits", 9),
        lambda f: f["quantized/4"].attrs.__setitem__("input_bits", 10**6),
        lambda f: f["quantized/4"].attrs.__setitem__("input_step", np.nan),
        lambda f: f["quantized/4/0/accumulator_bits"].__setitem__((), 10**6),
        lambda f: f["quantized/4/0/step"].__setitem__((), np.inf),
        lambda f: f["quantized/4/0/weights"].__setitem__((0, 0), -(2**31)),
        lambda f: stored_anew(f, "quantized/4/0/step", "x"),
        lambda f: stored_anew(f, "quantized/4/0/bias", dtype="i4", shape=(2**36,), chunks=(64,)),
        lambda f: stored_anew(f, "quantized/4/0/bias", dtype="i4", shape=(12,), external=[(str(path), 0, 48)]),
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
        lambda model: put(model, p_error="2"),
        lambda model: put(model, rounding_bits="40"),
        lambda model: set_initializer(model, "features.bits", 1e30),
        lambda model: set_initializer(model, "layer_0.start", 1e30),
        lambda model: set_initializer(model, "layer_0.weights.step", 0),
        without_nodes,
    ],
)
def test_damaged_graphs_are_refused(members, tmp_path, monkeypatch, edit):
    if not members[1].hidden:
        pytest.skip("has no layer to damage")
    model = graphs.to_onnx(members[1], 14)
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
    form = {"bits": [2, 3], "rounding_bits": 4, "p_error": 2.0**-6, "X": data["train"][0]}
    layers = networks.dense_layers(model)
    for ensemble in (qat.ReluEnsemble(layers, **form), tables.TableEnsemble(layers, **form)):
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
    assert neuron_removal.share_neurons(0, full, 32) == [0, 0, 0, 0]


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


def test_networks_are_ranked_on_validation_rows_and_where_these_have_few_patients_on_the_trained_ones_too():
    data = {"train": (np.arange(4.0)[:, None], np.array([0, 1, 0, 1])), "val": (np.array([[9.0]]), np.array([1]))}
    beats = {
        "train": pd.DataFrame({"record": ["101", "106", "106-S0.3", "106"]}),
        "val": pd.DataFrame({"record": ["7"]}),
    }
    X, y = candidates.ranking_rows(data, beats)
    assert (X[:, 0].tolist(), y.tolist()) == ([0.0, 1.0, 3.0, 9.0], [0, 1, 1, 1])
    beats["val"]["record"] = "101"  # whom training has seen
    assert candidates.ranking_rows(data, beats) is data["val"]


def test_rank_is_by_cost_among_the_accurate_and_by_accuracy_among_the_rest():
    table = pd.DataFrame(
        {
            "rate_percent": [25, 50, 75, 90, 95],
            "val_balanced_accuracy": [0.99, 0.98, 0.98, 0.97, 0.9],
            f"quantized_{candidates.RANKING}": [np.nan, 0.985, 0.981, 0.97, 0.975],
            "predicted_complexity": [np.nan, 9e9, 4e9, 2e9, 1e9],
        }
    )
    small = table.assign(bits=[2, 5, 3, 4, 7], **{candidates.RANKING: table["val_balanced_accuracy"]})
    assert step3.rank(table, 0.98) == [2, 1, 4, 3, 0]
    assert step3.rank(table.drop(columns=f"quantized_{candidates.RANKING}"), 0.98) == [0, 2, 1, 3, 4]
    assert candidates.lowest_cost(small[1:], 0.98)["rate_percent"] == 75
    assert candidates.lowest_cost(small, 1.0)["rate_percent"] == 25
    assert (
        candidates.lowest_cost(small[1:].assign(predicted_complexity=[4e9, 4.01e9, 1, 1]), 0.98)["rate_percent"] == 50
    )


def linear_data(noise):
    """Two classes that differ along one of 40 features, in three parts."""
    rng, data = np.random.default_rng(4), {}
    for part, n in (("train", 300), ("val", 400), ("test", 400)):
        y = rng.integers(0, 2, n)
        X = rng.normal(0, noise, (n, 40)).clip(-3, 3)
        X[:, 3] += y - 0.5
        data[part] = X.astype(np.float32), y
    return data, np.full(300, 1 / 300)


def test_the_penalty_of_a_linear_network_is_the_best_on_validation_rows(keras_once):
    data, even = linear_data(1.0)
    found = {}
    for penalty in (1e-4, 1e-2, 1e3):
        layers = candidates.fit_linear(data, even, 0.0, 0, (penalty,))
        assert [(kernel.shape, bias.shape) for kernel, bias in layers] == [((40, 1), (1,))]
        found[networks.balanced_accuracy(networks.build(layers), *data["val"])] = layers
    assert len(found) > 1
    chosen = candidates.fit_linear(data, even, 0.0, 0, (1e-4, 1e-2, 1e3))
    assert networks.balanced_accuracy(networks.build(chosen), *data["val"]) == pytest.approx(max(found), abs=0.005)


def test_a_linear_network_is_rounded_or_trained_whichever_is_better_on_validation_rows(keras_once):
    data, even = linear_data(0.7)
    layers = candidates.fit_linear(data, even, 0.0, 0)
    form = {"bits": [2, 2, 7, 7], "rounding_bits": 5, "p_error": 2.0**-6, "X": data["train"][0]}
    found = candidates.quantize_linear(
        layers, form, candidates.Lesson(data, data["train"][1], even, 0.0, 2, 0), 100, "linear"
    )
    assert list(zip(found["bits"], found["trial"])) == [(2, 0), (2, 1), (7, 0), (7, 1)]
    assert found["chosen"].sum() == 2 and (found["pbs"] == 0).all()
    for _, pair in found.groupby("bits"):
        best = pair.loc[pair["chosen"], candidates.RANKING].item()
        assert best == pair[candidates.RANKING].max()
    kernel, bias = layers[0]
    rounded = found.loc[2, "network"].run(data["test"][0])[0]
    exact = (data["test"][0] @ kernel + bias)[:, 0]
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()
