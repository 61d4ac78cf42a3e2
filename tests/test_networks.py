"""Float networks: their files, training, removal of neurons, and the commands of steps 1 to 4."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, random_layers, random_rows, refusal, small_data

import dynamic_pruning_eval as step3
import h5_onnx_converter as step4
import MLP_model_0 as step1
import preprocess_mitbih
import TF_pruning as step2
from fhe_mlp import cli, networks, quantized
from fhe_mlp.dataset import Dataset, Part, load_dataset
from fhe_mlp.networks.pruning import remove_neurons, saliency

ROWS = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
RATES = (57, 90, 100)  # of step 3
SHORT = ("--fine-tune-epochs", 1, "--quantization-epochs", 1, "--min-width", 16)
ONE_SHOT = ("--fine-tune-epochs", 0, "--quantization-epochs", 0, "--min-width", 1, "--rates", 25, 50)
MADE = ("MLP_model_0.h5", "tf_pruned_model.h5")  # by steps 1 and 2


@pytest.fixture(scope="module")
def run(arrays, keras):
    """Runs a step in a folder."""

    def run(step, folder, *argv):
        keras.backend.clear_session()  # Keras numbers the models of a process
        step.main(list(map(str, ("--data-dir", arrays, "--workdir", folder, *argv))))

    return run


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """A folder in which steps 1 to 4 have run on small settings."""
    folder = tmp_path_factory.mktemp("work")
    run(step1, folder, "--epochs", 8)
    run(step2, folder, "--epochs", 1)
    run(step3, folder, "--rates", *RATES, *SHORT)
    run(step4, folder)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Has step 3 train its float networks in this process, which does not start TensorFlow anew."""

    @contextmanager
    def crew(shared, *_):
        submit = lambda function, argv: SimpleNamespace(result=lambda: function(shared, *argv))  # noqa: E731
        yield SimpleNamespace(submit=submit, death=())

    monkeypatch.setattr(step3.workers, "open_workers", crew)


def weights(mlp):
    return [array.tolist() for layer in mlp.layers for array in layer]


def copied(workdir, folder, names=MADE):
    """Copy the files of earlier steps into a folder and return the content of each."""
    return {Path(shutil.copy(workdir / name, folder)): (workdir / name).read_bytes() for name in names}


# ------------------------------------------------------------------------------------------------------------ .h5 files
def test_a_network_comes_back_from_its_file_whole_and_keras_computes_the_same(keras, tmp_path):
    mlp = networks.MLP(random_layers((32, 6, 4, 1)), 0.75, 0.5, "fourier:32").decided_at(0.7)
    networks.save_mlp(mlp, tmp_path / "x.h5")
    back = networks.load_mlp(tmp_path / "x.h5", "")
    assert weights(back) == weights(mlp)
    assert (back.noise, back.threshold, back.map) == (0.75, 0.7, "fourier:32")
    assert (back.features, back.widths, back.parameters) == (32, [6, 4], 33 * 6 + 7 * 4 + 5)
    expected = keras.models.load_model(tmp_path / "x.h5").predict(ROWS, verbose=0)[:, 0]
    np.testing.assert_allclose(back.probabilities(ROWS), expected, atol=1e-6)
    np.testing.assert_array_equal(back.decisions(ROWS), expected > 0.5)


def swap(old, new):
    """Return a change of a file's bytes."""
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


SMALL = networks.MLP(random_layers((32, 6, 1)))
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "NaN": swap(SMALL.layers[0][1].tobytes(), np.full(6, np.nan, np.float32).tobytes()),
    "another kind of layer": swap(b'"class_name": "Dense"', b'"class_name": "Conv1"'),
    "another activation": swap(b'"activation": "relu"', b'"activation": "tanh"'),
    "no sigmoid": swap(b'"sigmoid"', b'"softmax"'),
    "other units": swap(b'"units": 6', b'"units": 9'),
    "no probability": lambda path: networks.save_mlp(replace(SMALL, threshold=1.0), path),
    "no map": lambda path: networks.save_mlp(replace(SMALL, map="squares"), path),
}


@pytest.mark.parametrize("version", ["tf_keras", "keras"])
def test_only_a_plain_chain_of_layers_is_rebuilt_and_it_computes_what_keras_does(version, keras, tmp_path):
    keras, X = importlib.import_module(version), random_rows(50)
    path = tmp_path / "x.h5"

    def save(way):
        start, hidden = keras.layers.Input((32,)), keras.layers.Dense(32, activation="relu")
        last = keras.layers.Dense(1, activation="sigmoid")
        keras.Model(start, way(start, hidden, last)).save(path)

    save(lambda start, hidden, last: last(hidden(start)))
    mlp = networks.load_mlp(path, "the command")
    expected = networks.probabilities_in_keras(path, X, "the command")
    np.testing.assert_allclose(expected, mlp.probabilities(X), atol=1e-6)
    with pytest.raises(SystemExit, match="ONNX Runtime differs by"):
        step4.write_float(mlp.moved(0.01), expected, tmp_path / "x.onnx", X)  # as if it had been rebuilt wrong
    for way in (
        lambda start, hidden, last: last(hidden(hidden(start))),
        lambda start, hidden, last: [last(hidden(start)), hidden(start)],
        lambda start, hidden, last: last(keras.layers.Dropout(0.1)(keras.layers.Add()([hidden(start), start]))),
    ):
        save(way)
        with pytest.raises(cli.InputError, match=r"x\.h5: is not a valid network .*(plain chain|list|layer Add)"):
            networks.load_mlp(path, "the command")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_refused_in_one_line_that_says_how_to_make_it(keras, tmp_path, damage):
    path = tmp_path / "x.h5"
    networks.save_mlp(SMALL, path)
    networks.load_mlp(path, "the command")
    DAMAGES[damage](path)
    with pytest.raises(cli.InputError, match=r"x\.h5: .*; (move it away, then )?make it with: the command") as refused:
        networks.load_mlp(path, "the command")
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------------- training
def test_the_threshold_moves_the_decision_and_training_sees_the_labels(keras):
    moved = SMALL.decided_at(0.9)
    np.testing.assert_array_equal(moved.decisions(ROWS), SMALL.probabilities(ROWS) > 0.9)
    model = networks.to_train(moved, 0)
    np.testing.assert_allclose(model(ROWS)[:, 0], SMALL.probabilities(ROWS), atol=1e-5)
    model.layers[0].set_weights([2 * array for array in model.layers[0].get_weights()])
    back = networks.trained(model, moved)
    assert back.threshold == 0.9 and np.array_equal(back.layers[0][0], 2 * SMALL.layers[0][0])
    np.testing.assert_array_equal(back.decisions(ROWS), model(ROWS)[:, 0] > 0.9)


def test_draws_have_their_shares_anew_in_each_epoch_and_repeat_with_the_seed(keras):
    y = np.array([0] * 90 + [1] * 10)
    data = small_data((np.arange(100)[:, None], y, ["1", "2"] * 50), (np.zeros((2, 1)), np.array([0, 1]), "3"))
    draws, same, other = (networks.training_draws(data, 8, seed) for seed in (0, 0, 1))
    assert data.unseen and 8 * len(draws) == 4096  # the least; a balanced part would hold 20
    assert networks.epoch_rows(np.repeat([0, 1], [9000, 5000])) == 10_000

    def epoch(of):
        rows = np.concatenate([of[k][0] for k in range(len(of))])
        of.on_epoch_end()
        return rows[:, 0].astype(int).tolist()

    epochs = [epoch(draws) for _ in range(3)]
    assert epochs[:2] == [epoch(same), epoch(same)] and epochs[0] not in (epochs[1], epoch(other))
    assert y[np.concatenate(epochs)].mean() == pytest.approx(0.5, abs=0.03)
    weight = networks.balanced_weights(y)
    assert weight[y == 0].sum() == pytest.approx(weight[y == 1].sum()) == pytest.approx(50)


def test_folds_hold_out_whole_patients_with_their_copies(monkeypatch):
    names = np.repeat([f"1{k:02}" for k in range(6)], 4)
    beats = pd.DataFrame({"record": names, "patient": names, "aami": list("NNVS") * 6})
    copies = beats[beats["record"] == "102"].assign(record="102-S0.3")
    beats = [pd.concat([beats[:16], copies], ignore_index=True), beats[16:].reset_index(drop=True)]
    parts = [Part(b[["patient"]].to_numpy(int), (b["aami"] != "N").to_numpy(int), b, True) for b in beats]
    data, held_out = Dataset(*parts, parts[1], {}, [], None, "none"), []

    def train(fold, recipe):
        held_out.append(set(names) - set(fold.train.X[:, 0].astype(str)))
        logit = np.float32([1.0 if len(held_out) % 2 else 0.1])  # over the threshold in every other fold
        return networks.MLP([(np.zeros((1, 1), np.float32), logit)]), {}

    monkeypatch.setattr(step1, "train", train)
    found = step1.cross_validate(data, 3, step1.Recipe((4,), 0.5, 1, 2, 0.1, 0.6, 0.0, 0))
    assert [len(patients) for patients in held_out] == [2, 2, 2] and set.union(*held_out) == set(names)
    for row in found["by_record"]:
        decided = next(k for k, out in enumerate(held_out, 1) if row["record"] in out) % 2
        assert (row["tp"], row["fp"]) == (2 * decided, 2 * decided)
    assert found["patients"]["beats"] == 24 and found["copies in which S is frequent"]["beats"] == 4


# --------------------------------------------------------------------------------------------------- removal of neurons
def test_neurons_without_incoming_weights_go_without_a_trace_or_start_anew():
    full = random_layers((32, 8, 6, 1))
    full[0][0][:, [1, 5]] = 0  # two neurons that are relu(bias) whatever comes in
    full[0][1][[1, 5]] = [2, -3]
    activation = np.maximum(ROWS @ full[0][0] + full[0][1], 0)
    smaller = remove_neurons(full, 0, np.array([0, 2, 3, 4, 6, 7]), activation)
    revived = networks.revive(full, np.random.default_rng(0))
    assert [k.shape for k, _ in smaller] == [(32, 6), (6, 6), (6, 1)]
    assert all(k.any(axis=0).all() for k, _ in revived) and not full[0][0][:, 1].any()  # the original is left alone
    for changed in map(networks.MLP, (smaller, revived)):
        np.testing.assert_allclose(changed.logits(2 - ROWS), networks.MLP(full).logits(2 - ROWS), atol=1e-5)


def test_a_layer_that_is_linear_goes_without_a_trace():
    full = random_layers((32, 6, 5, 1))
    full[1][1][:] = 50  # no sum of the second layer is ever negative
    smaller = networks.shrink(full, (6, 0), ROWS)
    assert [k.shape for k, _ in smaller] == [(32, 6), (6, 1)]
    np.testing.assert_allclose(networks.MLP(smaller).logits(ROWS), networks.MLP(full).logits(ROWS), atol=1e-3)


def test_neurons_with_most_zeros_go_first_then_those_of_least_saliency():
    full = random_layers((32, 4, 3, 1))
    full[0][0][:20, 2] = 0
    full[0][0][:, 1] *= 1e-3
    for widths, left in (((3, 3), [0, 1, 3]), ((2, 3), [0, 3])):
        np.testing.assert_array_equal(networks.shrink(full, widths, ROWS)[0][0], full[0][0][:, left])
    before = saliency(full, 0)
    full[0][0][:, 2] *= 10
    full[1][0][2] /= 10  # the same function
    np.testing.assert_allclose(saliency(full, 0), before, rtol=1e-5)


def test_neurons_are_shared_and_narrow_layers_go():
    full = (64, 64, 32, 16)
    assert networks.share_neurons(88, full, 1) == [32, 32, 16, 8]
    assert networks.share_neurons(88, full, 16) == [35, 35, 18, 0]
    assert networks.share_neurons(132, full, 32) == [64, 64, 0, 0]  # no wider than it was
    assert networks.share_neurons(0, full, 32) == [0, 0, 0, 0]


def test_the_neuron_that_others_replace_best_goes():
    """Against least squares on the weighted rows with each neuron left out."""
    rng = np.random.default_rng(5)
    X, weight = rng.normal(size=(400, 3)), rng.uniform(0.1, 1, 400)
    outputs = np.maximum(X @ rng.normal(size=(3, 6)) + rng.normal(size=6), 0) * rng.uniform(1, 3, 6)
    total, left = outputs.sum(axis=1), list(range(6))

    def error(neurons):
        columns = np.sqrt(weight)[:, None] * np.column_stack([X, np.ones(400), outputs[:, neurons]])
        return np.linalg.lstsq(columns, np.sqrt(weight) * total, rcond=None)[1].item()

    for keep in (5, 4):  # one at a time; for the second, what the first has left
        kept, factor, linear, constant = networks.replace_neurons(X, outputs, weight, keep)
        errors = {gone: error([n for n in left if n != gone]) for gone in left}
        assert set(left) - set(kept) == {min(errors, key=errors.get)} and (factor != 0).sum() == keep
        difference = outputs @ factor + X @ linear + constant - total
        assert weight @ difference**2 == pytest.approx(min(errors.values()), rel=0.05)
        left = list(kept)


# --------------------------------------------------------------------------------------------------------- steps 1 to 4
def check_zeros(folder, rows):
    """Check that step 2's network has exactly its zeros, in blocks of `rows` weights of a neuron (None: all)."""
    *hidden, (output, _) = networks.load_mlp(folder / MADE[1], "").layers
    assert (output != 0).all()
    for zero in (k == 0 for k, _ in hidden):
        blocks = zero.reshape(-1, rows or len(zero), zero.shape[1])
        assert zero.mean() == step2.FINAL_SPARSITY and (blocks.all(axis=1) == blocks.any(axis=1)).all()


def test_all_steps_follow_threshold_map_and_seed_of_the_baseline_and_whole_neurons_go(arrays, run, here, tmp_path):
    options = ("--epochs", 1, "--expand", "fourier:40", "--hidden", 32, "--threshold", 0.99)
    baselines = []
    for seed in (1, 42):
        run(step1, tmp_path, *options, "--seed", seed)
        baselines.append(weights(networks.load_mlp(tmp_path / MADE[0], "")))
    assert baselines[0] != baselines[1]
    run(step2, tmp_path, "--epochs", 1, "--block-rows", "neuron")
    check_zeros(tmp_path, None)
    run(step3, tmp_path, "--rates", 90, 100, *SHORT)
    run(step4, tmp_path)
    X, y = load_dataset(arrays, "fourier:40").test.X, load_dataset(arrays).test.y
    paths = sorted(tmp_path.glob("*.h5"))
    assert len(paths) == 4
    for path in paths:
        mlp = networks.load_mlp(path, "")
        assert (mlp.threshold, mlp.map, mlp.features) == (0.99, "fourier:40", 40)
        assert mlp.decisions(X).mean() < y.mean() - 0.1  # fewer beats are called abnormal than are
        for network in quantized.read_networks(path, ""):
            converted = quantized.load_onnx(tmp_path / "quantized" / f"{path.stem}_{network.bits}bits.onnx", 40)
            np.testing.assert_array_equal(converted.logits(X), network.logits(X))
            assert network.bits < 4 or (network.logits(X) > 0).mean() < y.mean() - 0.1


def test_the_same_seed_makes_the_same_networks_beside_another_rate_too(workdir, run, here, tmp_path):
    run(step1, tmp_path, "--epochs", 8)
    run(step2, tmp_path, "--epochs", 1)
    assert [(tmp_path / name).read_bytes() for name in MADE] == [(workdir / name).read_bytes() for name in MADE]
    stale = "pruned_model_top_1_prune_25_acc_0.1234"
    (tmp_path / "quantized").mkdir()
    for name in (f"{stale}.h5", f"{stale}.onnx", f"quantized/{stale}_2bits.onnx"):
        (tmp_path / name).write_bytes(b"an earlier run's")
    run(step3, tmp_path, "--rates", 50, *RATES, *SHORT)  # 50's layers are narrower: 57 starts elsewhere
    assert not list(tmp_path.rglob(f"{stale}*")) and len(networks.by_rank(tmp_path, ".h5")) == len(RATES) + 1
    for one in networks.by_rank(workdir, ".h5"):
        (same,) = tmp_path.glob(f"*_prune_{one.name.split('_prune_')[1]}")
        assert weights(networks.load_mlp(one, "")) == weights(networks.load_mlp(same, ""))
        for network, again in zip(*(quantized.read_networks(path, "") for path in (one, same)), strict=True):
            for field in fields(network):
                np.testing.assert_array_equal(getattr(network, field.name), getattr(again, field.name))


def test_the_files_of_steps_1_to_3_hold_what_their_reports_say(workdir, arrays):
    check_zeros(workdir, int(step2.BLOCK_ROWS))
    figures = json.loads((workdir / "tf_pruned_model_metrics.json").read_text())["figures"]
    assert figures["before"] != figures["after"] == figures["reloaded"]
    data, mlp = load_dataset(arrays), networks.load_mlp(workdir / "MLP_model_0.h5", "")
    metrics = json.loads((workdir / "MLP_model_0_metrics.json").read_text())
    assert (mlp.widths, mlp.noise, mlp.threshold) == ([64, 64, 32, 16], step1.NOISE, metrics["threshold"])
    assert metrics["test"] == step1.figures(mlp, data.test) and metrics["test"]["balanced_accuracy"] > 0.9
    assert len(list(workdir.glob("*.png"))) == 6
    book = workdir / "dynamic_pruning_results.xlsx"
    table, trials = (pd.read_excel(book, sheet_name=name) for name in ("results", "quantized"))
    assert tuple(table["rate_percent"]) == RATES
    assert not [name for name in (*table, *trials) if "encrypted" in name]  # all its noise is simulated
    files = networks.by_rank(workdir, ".h5")
    assert {path.name for path in files} == set(table["file"])
    for rank, path in enumerate(files, 1):
        row, mlp = table[table["file"] == path.name].iloc[0], networks.load_mlp(path, "")
        rate, accuracy = row["rate_percent"], row["val_balanced_accuracy"]
        assert path.name == f"pruned_model_top_{rank}_prune_{rate}_acc_{accuracy:.4f}.h5"
        shared = networks.share_neurons(round(176 * (1 - rate / 100)), (64, 64, 32, 16), 16)
        assert mlp.widths == [width for width in shared if width] and row["hidden_neurons"] == sum(mlp.widths)
        found = (mlp.balanced_accuracy(data.val), mlp.balanced_accuracy(data.test))
        assert found == pytest.approx((accuracy, row["test_balanced_accuracy"]), abs=1e-12)
        own, chosen = trials[trials["rate_percent"] == rate], quantized.read_networks(path, "")
        assert [n.bits for n in chosen] == (list(quantized.BITS) if sum(mlp.widths) <= step3.TABLES else [])
        for network in chosen:
            of_bits = own[own["bits"] == network.bits]
            (said,) = of_bits[of_bits["chosen"]].to_dict("records")
            assert said[quantized.RANKING] == of_bits[quantized.RANKING].max()
            assert len(of_bits) == (step3.TRIALS if network.neurons else 2)
            assert network.neurons == said["pbs"] == sum(mlp.widths)
            found = (network.balanced_accuracy(data.test), network.noisy_balanced_accuracy(data.test))
            expected = [said[f"test_balanced_accuracy{kind}"] for kind in ("", "_simulated")]
            assert found == pytest.approx(expected, abs=1e-12)


def test_unseen_patients_get_noise_another_threshold_and_figures_by_record(records, tmp_path, keras):
    arrays = ["--data-dir", str(tmp_path / "data")]
    ds1 = ["--records-dir", str(records), "--split", "inter-patient", "--abnormal", "S", "V"]
    preprocess_mitbih.main([*arrays, *ds1])
    step1.main([*arrays, "--workdir", str(tmp_path), "--epochs", "1"])
    metrics = json.loads((tmp_path / "MLP_model_0_metrics.json").read_text())
    noise, table = networks.load_mlp(tmp_path / "MLP_model_0.h5", "").noise, pd.DataFrame(metrics["test_by_record"])
    assert metrics["noise"] == noise == step1.NOISE_UNSEEN and metrics["usual_threshold"] == step1.THRESHOLD_UNSEEN
    assert list(table["record"]) == ["100", "103"] and table["beats"].sum() == metrics["test"]["beats"]
    assert metrics["test"]["average"]["specificity"] == pytest.approx(table["specificity"].mean())
    assert (tmp_path / "MLP_model_0_records.png").exists()


def test_the_picture_of_a_training_mentions_noise_where_there_was_some(monkeypatch):
    figures, names = [], ("loss", "accuracy", "val_loss", "val_accuracy")
    monkeypatch.setattr(step1, "save_figure", lambda figure, path: figures.append(figure))
    for noise, label in ((0.0, "training"), (0.5, "training, with noise")):
        step1.plot_training({name: [0.5, 0.4] for name in names}, noise, None)
        assert {line.get_label() for axis in figures[-1].axes for line in axis.lines} == {label, "validation"}


def test_one_shot_pruning_only_removes(workdir, run, here, tmp_path):
    copied(workdir, tmp_path)
    run(step3, tmp_path, *ONE_SHOT)
    full, paths = networks.load_mlp(tmp_path / MADE[1], "").layers, networks.by_rank(tmp_path, ".h5")
    assert len(paths) == 2
    for path in paths:
        assert all(np.isin(k, old).all() for (k, _), (old, _) in zip(networks.load_mlp(path, "").layers, full))


def test_no_two_trainings_share_random_numbers_not_even_of_neighbouring_seeds(workdir, arrays, keras, monkeypatch):
    shared = networks.load_with_data(workdir / "tf_pruned_model.h5", "", arrays)
    fine_tuned, aware, train = [], [], "fhe_mlp.quantized.training.Ensemble.train"
    monkeypatch.setattr(step3, "fine_tune", lambda mlp, data, epochs, seed: fine_tuned.append(seed) or mlp)
    monkeypatch.setattr(train, lambda self, lesson, seed, title: aware.append(seed))
    form, lesson = quantized.Form([7], 6, 2.0**-6), quantized.Lesson(shared[1], shared[1].train.y, 0.0, 1)
    for seed in (1, 2):
        args = argparse.Namespace(rates=(90, 91), seed=seed, min_width=32, fine_tune_epochs=1)
        step3.remove_at_rates(shared, args)
        widest = networks.MLP(random_layers((32, 26, 1)))
        quantized.quantize_tables({90: 18, 91: 16}, widest, form, lesson, seed)
    assert len(set(fine_tuned)) == len(fine_tuned) == 4
    assert len(set(aware)) == len(aware) == 6  # with the 26 tables that each run starts from


def die(*_):
    os._exit(1)


def test_a_killed_process_of_float_networks_is_one_line(workdir, arrays, tmp_path):
    copied(workdir, tmp_path)
    code = (  # in a process of its own: where Concrete is loaded, the death of a child can end its parent
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import test_networks, fhe_mlp.cli; "
        "step = test_networks.step3; step.remove_at_rates = test_networks.die; fhe_mlp.cli.run(step.main)"
    )
    argv = [sys.executable, "-c", code, "--data-dir", arrays, "--workdir", tmp_path, *ONE_SHOT]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "process of the float networks was killed" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("step", "options", "fits"), [(step1, ("--epochs", 1), 0), (step3, ONE_SHOT, 1)])
def test_a_full_disk_leaves_what_was_there(workdir, arrays, here, tmp_path, capsys, monkeypatch, step, options, fits):
    before = copied(workdir, tmp_path, [path.name for path in workdir.glob("*.h5")])
    write_bytes, calls = Path.write_bytes, []

    def no_room(path, content):
        calls.append(path)
        write_bytes(path, content if len(calls) <= fits else content[:100])
        if len(calls) > fits:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", no_room)
    assert "free space" in refusal(step.main, ["--data-dir", arrays, "--workdir", tmp_path, *options], capsys)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_training_that_ends_in_nan_keeps_the_network_that_was_there(workdir, arrays, tmp_path, capsys, keras):
    before = copied(workdir, tmp_path, MADE[:1])
    common = ["--data-dir", arrays, "--workdir", tmp_path, "--epochs", "2", "--learning-rate", "1e30"]
    assert "lower --learning-rate" in refusal(step1.main, common, capsys)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_conversion_that_differs_leaves_no_file(workdir, arrays, run, tmp_path, monkeypatch):
    source = networks.by_rank(workdir, ".h5")[0]
    other, convert = networks.load_mlp(source, "").moved(0.1), step4.convert
    monkeypatch.setattr(step4, "convert", lambda mlp: convert(other))
    with pytest.raises(SystemExit, match="ONNX Runtime differs"):
        run(step4, tmp_path, "--models", source)
    true, network = quantized.to_onnx, quantized.read_networks(source, "")[0]
    monkeypatch.setattr(quantized, "to_onnx", lambda one: true(replace(one, linear=-one.linear)))
    with pytest.raises(SystemExit, match="other integers than the network"):
        step4.write_quantized(network, tmp_path / "x.onnx", load_dataset(arrays).test.X)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [(b"Relu", b"Tanh"), (b"Sigmoid", b"Softmax"), (b"MatMul", b"MatSum")])
def test_a_graph_that_is_no_mlp_is_refused(workdir, tmp_path, change):
    path = Path(shutil.copy(next(workdir.glob("*_prune_57_*.onnx")), tmp_path))
    assert networks.load_onnx_mlp(path, 32).graph.node
    swap(*change)(path)
    with pytest.raises(cli.InputError, match="is not a valid ONNX network"):
        networks.load_onnx_mlp(path, 32)


def test_bad_options_and_files_are_refused_before_anything_is_written(workdir, arrays, tmp_path, capsys):
    common = ["--data-dir", arrays, "--workdir", tmp_path]
    assert "make them with: python dynamic_pruning_eval.py" in refusal(step4.main, common, capsys)
    bad, good = networks.by_rank(workdir, ".h5")[:2]
    shutil.copy(good, tmp_path)
    for path in (workdir / "MLP_model_0.h5", workdir / "tf_pruned_model.h5", bad):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:3000])
    before = sorted(tmp_path.iterdir())
    for step, argv, reason in (
        (step1, "--learning-rate nan", "--learning-rate"),
        (step1, "--folds 1", "--folds"),
        (step1, "--expand fourier:4097", "N from 1 to 4096"),
        (step2, "--block-rows 0", "neuron"),
        (step2, "--initial-sparsity 0.8", "--initial-sparsity"),
        (step2, "", "make it with: python MLP_model_0.py"),
        (step3, "--rates 50 25", "--rates"),
        (step3, "", "make it with: python TF_pruning.py"),
        (step4, "--models a/x.h5 b/x.h5", "same name"),
        (step4, "--models x.h5", "not found; make it with"),
        (step4, "", "make it with: python dynamic_pruning_eval.py"),
        *((step, f"--data-dir {tmp_path}", "preprocess_mitbih.py") for step in (step1, step4)),
    ):
        workdir_of_step = ["--workdir", workdir] if "--data-dir" in argv else []
        assert reason in refusal(step.main, [*common, *argv.split(), *workdir_of_step], capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_a_rare_label_is_learned_and_what_learns_nothing_of_it_is_said(keras, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, rare in (("train", 20), ("val", 20), ("test", 200)):
        y = np.repeat([0, 1], [2000, rare])
        np.save(tmp_path / f"Arryth_MITBIH_{split}_y.npy", y)
        np.save(tmp_path / f"Arryth_MITBIH_{split}_X.npy", rng.normal(size=(len(y), 8)) + 1.2 * y[:, None])
    argv = ["--data-dir", str(tmp_path), "--workdir", str(tmp_path), "--hidden", "8", "--epochs", "12"]
    for more, warned in (([], False), (["--threshold", "0.9999"], True)):
        step1.main([*argv, *more])
        assert ("warning: sensitivity 0.0" in capsys.readouterr().err) == warned
        metrics = json.loads((tmp_path / "MLP_model_0_metrics.json").read_text())
        found = metrics["test"]
        assert metrics["noise"] == pytest.approx((300 / 20) ** (1 / 6))
        assert (found["balanced_accuracy"] > 0.85) != warned
