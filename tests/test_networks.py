"""Steps 1 to 4: what their files hold, and the functions that shape the networks."""

from __future__ import annotations

import itertools
import json
import shutil

import h5py
import numpy as np
import onnx
import onnxruntime
import openpyxl
import pandas as pd
import pytest
from conftest import RATES, refusal

import dynamic_pruning_eval as step3
import h5_onnx_converter as step4
import MLP_model_0 as step1
import preprocess_mitbih
import TF_pruning as step2
from fhe_mlp import candidates, cli, networks, neuron_removal
from fhe_mlp import quantized as q
from fhe_mlp.arrays import load_arrays


@pytest.fixture(scope="module")
def keras():
    return networks.start_tensorflow(0)


def forward(layers, X):
    for kernel, bias in layers[:-1]:
        X = np.maximum(X @ kernel + bias, 0)
    return X @ layers[-1][0] + layers[-1][1]


def random_layers(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(a, b)).astype(np.float32), rng.normal(size=b).astype(np.float32))
        for a, b in itertools.pairwise(widths)
    ]


# Step 1


def test_balanced_weights_give_both_labels_the_same_say():
    y = np.array([0, 0, 0, 1])
    weights = networks.balanced_weights(y)
    assert weights[y == 0].sum() == weights[y == 1].sum() == 2


def test_baseline_is_the_published_network_and_its_report_is_of_the_saved_file(workdir, arrays, keras):
    model = networks.load_mlp(workdir / "MLP_model_0.h5", "")
    assert [layer.units for layer in model.layers if hasattr(layer, "units")] == [64, 64, 32, 16, 1]
    assert networks.input_noise(model) == step1.NOISE
    metrics = json.loads((workdir / "MLP_model_0_metrics.json").read_text())
    X, y = load_arrays(arrays)["test"]
    assert metrics["test"] == step1.figures(model, (X, y), None, named=False)
    assert metrics["test"]["balanced_accuracy"] > 0.9
    assert "interval95" not in metrics["test"]  # these arrays name no records
    for name in ("training", "roc"):
        assert (workdir / f"MLP_model_0_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_threshold_is_moved_to_one_half_and_later_steps_obey_it(arrays, workdir, tmp_path, keras):
    common = ["--data-dir", str(arrays), "--workdir", str(tmp_path), "--epochs", "1"]
    step1.main(common)
    plain = networks.load_mlp(tmp_path / "MLP_model_0.h5", "")
    metrics = json.loads((tmp_path / "MLP_model_0_metrics.json").read_text())
    step1.main([*common, "--threshold", "0.9"])
    shifted = networks.load_mlp(tmp_path / "MLP_model_0.h5", "")
    own = np.log(metrics["threshold"] / (1 - metrics["threshold"]))
    X = load_arrays(arrays)["test"][0]
    logits = [forward(networks.dense_layers(model), X) for model in (plain, shifted)]
    np.testing.assert_allclose(logits[0] + own - np.log(9), logits[1], atol=1e-4)
    assert networks.logit_shift(tmp_path) == pytest.approx(-np.log(9))
    found = [np.mean(logits[1] > 0)]
    step2.main(common)
    step3.main([*common[:4], "--rates", "90", "--fine-tune-epochs", "1", "--quantization-epochs", "1"])
    for path in (tmp_path / "tf_pruned_model.h5", *networks.by_rank(tmp_path, ".h5")):
        found.append(np.mean(networks.decisions(networks.load_mlp(path, ""), X)))
    found += [np.mean(network.run(X)[0] > 0) for network in q.read_h5(path, "")]
    usual = np.mean(networks.decisions(networks.load_mlp(workdir / "tf_pruned_model.h5", ""), X))
    assert max(found) < usual - 0.02, (found, usual)  # fewer beats are called abnormal


def inter_patient(records, folder):
    """Arrays of small records, DS1 against DS2."""
    preprocess_mitbih.main(
        ["--records-dir", str(records), "--data-dir", str(folder), "--split", "inter-patient", "--abnormal", "S", "V"]
    )
    return folder


def test_unseen_patients_get_more_noise_and_figures_by_record(records, tmp_path, keras):
    data = inter_patient(records, tmp_path / "data")
    step1.main(["--data-dir", str(data), "--workdir", str(tmp_path), "--epochs", "2"])
    metrics = json.loads((tmp_path / "MLP_model_0_metrics.json").read_text())
    assert metrics["unseen_patients"]
    assert metrics["noise"] == networks.input_noise(networks.load_mlp(tmp_path / "MLP_model_0.h5", "")) == 0.75
    table = pd.DataFrame(metrics["test_by_record"]).set_index("record")
    assert list(table.index) == ["100", "103"]
    assert table["beats"].sum() == metrics["test"]["beats"]
    assert metrics["test"]["average"]["specificity"] == pytest.approx(table["specificity"].mean())
    assert (tmp_path / "MLP_model_0_records.png").read_bytes().startswith(b"\x89PNG")


def test_folds_hold_out_whole_patients_with_their_copies(monkeypatch):
    import tensorflow as tf

    names = [f"1{k:02}" for k in range(6)]
    beats = pd.DataFrame({"record": [n for n in names for _ in range(4)], "aami": list("NNVS") * 6})
    copies = beats[beats["record"] == "102"].assign(record="102-S0.3")
    beats = {"train": pd.concat([beats[:16], copies], ignore_index=True), "val": beats[16:].reset_index(drop=True)}
    data = {
        part: (b["record"].str[1:3].astype(int).to_numpy()[:, None], (b["aami"] != "N").to_numpy().astype(int))
        for part, b in beats.items()
    }
    seen = []

    def train(rows, probability, recipe):
        seen.append({names[k] for k in rows[0][:, 0].astype(int)})
        assert probability.sum() == pytest.approx(1)
        likely = 0.5 + 0.2 * (
            len(seen) % 2
        )  # of an abnormal beat, all the same: over the threshold in every other fold
        return (lambda X: tf.fill((len(X), 1), likely)), {}

    monkeypatch.setattr(step1, "train", train)
    recipe = step1.Recipe((4,), 0.5, 1, 2, 0.1, 0.6, 0)
    found = step1.cross_validate(data, beats, 3, recipe)
    assert all(len(patients) == 4 for patients in seen)
    held_out = [set(names) - patients for patients in seen]
    assert set.union(*held_out) == set(names)
    for row in found["by_record"]:
        decided = next(k for k, out in enumerate(held_out, 1) if row["record"] in out) % 2
        assert (row["tp"], row["fp"]) == (2 * decided, 2 * decided)
    assert found["patients"]["beats"] == 24
    assert found["copies in which S is frequent"]["beats"] == 4
    with pytest.raises(cli.InputError, match="6 known patients"):
        step1.cross_validate(data, beats, 7, recipe)


def test_draws_follow_their_probabilities_anew_in_each_epoch(keras):
    y = np.array([0] * 90 + [1] * 10)
    probability = np.where(y, 0.05, 0.5 / 90)
    draws = networks.training_draws(np.arange(100)[:, None], y, probability, 8, 0)
    assert len(draws) == 3  # 20 rows, as many as a balanced part would hold
    first = np.concatenate([draws[k][0] for k in range(3)])
    draws.on_epoch_end()
    assert (first != np.concatenate([draws[k][0] for k in range(3)])).any()
    labels = []
    for _ in range(200):
        labels += [draws[k][1] for k in range(3)]
        draws.on_epoch_end()
    assert np.mean(np.concatenate(labels)) == pytest.approx(0.5, abs=0.03)


def test_same_seed_same_network_other_seed_another(arrays, tmp_path, keras):
    weights = []
    for run, seed in enumerate((1, 1, 2)):
        folder = str(tmp_path / str(run))
        step1.main(["--data-dir", str(arrays), "--workdir", folder, "--seed", str(seed), "--epochs", "1"])
        weights.append(
            np.concatenate(
                [w.ravel() for w in networks.load_mlp(tmp_path / folder / "MLP_model_0.h5", "").get_weights()]
            )
        )
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[0] - weights[2]).max() > 1e-3


# Step 2


@pytest.mark.parametrize("rows", [1, 4, 5, 32])
def test_block_mask_zeroes_whole_blocks_of_the_least_mean(rows):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(32, 6)).astype(np.float32)

    def keep_better_half(means):
        return 0, np.asarray(means) >= np.median(means)

    _, mask = step2.block_mask(weights, rows, keep_better_half)
    mask = np.asarray(mask)
    assert mask.shape == weights.shape
    blocks = [(slice(r, r + rows), c) for r in range(0, 32, rows) for c in range(6)]
    means = np.array([np.abs(weights[b]).mean() for b in blocks])
    for block, mean in zip(blocks, means):
        assert (mask[block] == (mean >= np.median(means))).all()


@pytest.mark.parametrize(("option", "rows"), [("neuron", None), ("4", 4), ("1", 1)])
def test_pruned_file_is_three_quarters_zero_in_whole_blocks(workdir, arrays, tmp_path, keras, option, rows):
    for name in ("MLP_model_0.h5", "MLP_model_0_metrics.json"):
        shutil.copy(workdir / name, tmp_path)
    step2.main(["--data-dir", str(arrays), "--workdir", str(tmp_path), "--epochs", "1", "--block-rows", option])
    model = networks.load_mlp(tmp_path / "tf_pruned_model.h5", "")
    report = json.loads((tmp_path / "tf_pruned_model_metrics.json").read_text())
    *hidden, output = networks.dense_layers(model)
    assert (output[0] != 0).all()
    for kernel, _ in hidden:
        assert np.mean(kernel == 0) == pytest.approx(0.75, abs=0.01)
        blocks = (kernel == 0).reshape(-1, rows or len(kernel), kernel.shape[1])
        assert (blocks.all(axis=1) == blocks.any(axis=1)).all()
    assert report["figures"]["after"] == report["figures"]["reloaded"]
    assert report["figures"]["before"]["val"]["balanced_accuracy"] == networks.balanced_accuracy(
        networks.load_mlp(tmp_path / "MLP_model_0.h5", ""), *load_arrays(arrays)["val"]
    )


def test_sparsity_follows_the_polynomial_decay(workdir, arrays, keras):
    data = load_arrays(arrays)
    model = networks.load_mlp(workdir / "MLP_model_0.h5", "")
    wrapped = step2.wrap_for_pruning(model, 1, 201, (0.25, 0.75))
    for old, new in zip(model.layers, wrapped.layers):
        for a, b in zip(old.get_weights(), getattr(new, "layer", new).get_weights()):
            np.testing.assert_array_equal(a, b)
    wrapped.compile("adam", "binary_crossentropy")
    from tensorflow_model_optimization.sparsity.keras import UpdatePruningStep

    wrapped.fit(
        data["train"][0][:2929], data["train"][1][:2929], batch_size=29, verbose=0, callbacks=[UpdatePruningStep()]
    )
    expected = 0.75 - 0.5 * (1 - 100 / 200) ** 3  # the masks were last set at step 100 of 200
    shares = list(step2.layer_sparsity(wrapped).values())
    assert shares[:-1] == pytest.approx([expected] * 4, abs=0.01)
    assert shares[-1] == 0


# Step 3


def test_removing_dead_neurons_changes_nothing():
    layers = random_layers((32, 8, 6, 1))
    layers[0][0][:, [1, 5]] = 0  # two neurons that give relu(bias) whatever comes in
    layers[0][1][:] = [1, 2, -1, 1, 1, -3, 1, 1]
    X = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    smaller = neuron_removal.remove_neurons(
        layers, 0, np.array([0, 2, 3, 4, 6, 7]), np.maximum(X @ layers[0][0] + layers[0][1], 0)
    )
    assert smaller[0][0].shape == (32, 6)
    assert smaller[1][0].shape == (6, 6)
    np.testing.assert_allclose(forward(smaller, X), forward(layers, X), atol=1e-4, rtol=1e-5)
    other = np.random.default_rng(2).normal(size=(50, 32)).astype(np.float32)
    np.testing.assert_allclose(forward(smaller, other), forward(layers, other), atol=1e-4, rtol=1e-5)


def test_the_neuron_of_least_error_is_removed_from_a_sum():
    """Against least squares on the weighted rows with each neuron left out, and one that the others can replace."""
    rng = np.random.default_rng(5)
    X, weights = rng.normal(size=(400, 3)), rng.uniform(0.1, 1, 400)
    outputs = np.maximum(X @ rng.normal(size=(3, 6)) + rng.normal(size=6), 0) * rng.uniform(1, 3, 6)
    total = outputs.sum(axis=1)

    def error(left):
        columns = np.sqrt(weights)[:, None] * np.column_stack([X, np.ones(400), outputs[:, left]])
        return np.linalg.lstsq(columns, np.sqrt(weights) * total, rcond=None)[1].item()

    before = list(range(6))
    for keep in (5, 4):  # one at a time; for the second, what the first has left
        kept, factor, linear, constant = neuron_removal.replace_neurons(X, outputs, weights, keep)
        errors = {gone: error([n for n in before if n != gone]) for gone in before}
        assert set(before) - set(kept) == {min(errors, key=errors.get)}
        replaced = outputs @ factor + X @ linear + constant
        assert weights @ (replaced - total) ** 2 == pytest.approx(min(errors.values()), rel=0.05)
        assert (factor != 0).sum() == keep
        before = list(kept)
    outputs[:, 2] = X @ [1, -2, 0.5] + 0.5 * outputs[:, 4] + 7
    kept, factor, linear, constant = neuron_removal.replace_neurons(X, outputs, weights, 5)
    assert list(kept) == [0, 1, 3, 4, 5]
    np.testing.assert_allclose(factor, [1, 1, 0, 1, 1.5, 1], atol=0.02)
    np.testing.assert_allclose([*linear, constant], [1, -2, 0.5, 7], atol=0.05)


def test_shrink_takes_neurons_with_most_zeros_then_least_saliency():
    layers = random_layers((32, 4, 3, 1))
    layers[0][0][:20, 2] = 0
    layers[0][0][:, 1] *= 1e-3
    X = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    one_less = neuron_removal.shrink(layers, (3, 3), X)
    np.testing.assert_array_equal(one_less[0][0], layers[0][0][:, [0, 1, 3]])
    two_less = neuron_removal.shrink(layers, (2, 3), X)
    np.testing.assert_array_equal(two_less[0][0], layers[0][0][:, [0, 3]])


def test_saliency_does_not_change_when_a_neuron_is_rescaled():
    layers = random_layers((32, 4, 1))
    before = neuron_removal.saliency(layers, 0)
    layers[0][0][:, 2] *= 10
    layers[1][0][2] /= 10
    np.testing.assert_allclose(neuron_removal.saliency(layers, 0), before, rtol=1e-5)


def test_revive_fills_empty_neurons_without_changing_the_network():
    layers = random_layers((32, 6, 4, 1))
    layers[0][0][:, 3] = 0
    layers[1][0][:, 1] = 0
    X = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    revived = neuron_removal.revive(layers, np.random.default_rng(0))
    assert all(kernel.any(axis=0).all() for kernel, _ in revived[:-1])
    np.testing.assert_allclose(forward(revived, X), forward(layers, X), atol=1e-4, rtol=1e-5)
    assert not layers[0][0][:, 3].any()  # the input is left alone


def test_step3_files_hold_what_the_workbook_says(workdir, arrays, keras):
    data = load_arrays(arrays)
    table = pd.read_excel(workdir / "dynamic_pruning_results.xlsx", sheet_name="results")
    assert list(table["rate_percent"]) == list(map(int, RATES[1:]))
    quantized = pd.read_excel(workdir / "dynamic_pruning_results.xlsx", sheet_name="quantized")
    kept = table.dropna(subset="file")
    assert len(kept) == len(RATES) - 1
    sheet = openpyxl.load_workbook(workdir / "dynamic_pruning_results.xlsx")["results"]
    formats = {
        sheet.cell(1, c).value: sheet.cell(sheet.max_row, c).number_format for c in range(1, sheet.max_column + 1)
    }
    assert {f for name, f in formats.items() if "accuracy" in name} == {"0.0000"}
    files = networks.by_rank(workdir, ".h5")
    assert {p.name for p in files} == set(kept["file"])
    for rank, path in enumerate(files, 1):
        row = kept[kept["file"] == path.name].iloc[0]
        model = networks.load_mlp(path, "")
        widths = [layer.units for layer in model.layers[:-1] if hasattr(layer, "units")]
        assert (
            path.name
            == f"pruned_model_top_{rank}_prune_{row['rate_percent']}_acc_{row['val_balanced_accuracy']:.4f}.h5"
        )
        total = round(176 * (1 - row["rate_percent"] / 100))
        assert widths == [n for n in neuron_removal.share_neurons(total, (64, 64, 32, 16), step3.MIN_WIDTH) if n]
        assert row["hidden_neurons"] == sum(widths)
        assert row["parameters"] == model.count_params()
        assert networks.balanced_accuracy(model, *data["val"]) == pytest.approx(row["val_balanced_accuracy"], abs=1e-12)
        assert networks.balanced_accuracy(model, *data["test"]) == pytest.approx(
            row["test_balanced_accuracy"], abs=1e-12
        )
        assert 0 < row["latency_row_ms"] < row["latency_set_ms"] * 50
        chosen = {n.bits: n for n in q.read_h5(path, "")}
        said = quantized[(quantized["rate_percent"] == row["rate_percent"]) & quantized["chosen"]].set_index("bits")
        assert list(chosen) == list(said.index) == (list(q.BITS) if sum(widths) <= step3.TABLES else [])
        for bits, network in chosen.items():
            assert network.balanced_accuracy(*data["val"]) == pytest.approx(
                said.loc[bits, "val_balanced_accuracy"], abs=1e-12
            )
            assert network.balanced_accuracy(*data["test"]) == pytest.approx(
                said.loc[bits, "test_balanced_accuracy"], abs=1e-12
            )
            assert (network.rounding_bits, network.p_error) == tuple(said.loc[bits, ["rounding_bits", "p_error"]])
            assert network.pbs() == said.loc[bits, "pbs"] == sum(widths)
            trials = quantized[(quantized["rate_percent"] == row["rate_percent"]) & (quantized["bits"] == bits)]
            assert len(trials) == (step3.TRIALS if row["pbs"] else 2)
            assert said.loc[bits, candidates.RANKING] == trials[candidates.RANKING].max()
        if chosen:
            best = said.loc[row["quantized_bits"]]
            assert row["quantized_test_balanced_accuracy"] == best["test_balanced_accuracy"]
            assert row["predicted_complexity"] == best["predicted_complexity"]
    for name in ("accuracy", "cost", "latency"):
        assert (workdir / f"dynamic_pruning_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_shot_pruning_only_removes_and_an_earlier_run_does_not_linger(workdir, arrays, tmp_path, keras):
    for name in ("MLP_model_0.h5", "MLP_model_0_metrics.json", "tf_pruned_model.h5"):
        shutil.copy(workdir / name, tmp_path)
    (tmp_path / "quantized").mkdir()
    stale = "pruned_model_top_1_prune_25_acc_0.1234"
    for name in (f"{stale}.h5", f"{stale}.onnx", f"quantized/{stale}_2bits.onnx"):
        (tmp_path / name).write_bytes(b"an earlier run's")
    common = ["--data-dir", str(arrays), "--workdir", str(tmp_path), "--fine-tune-epochs", "0"]
    step3.main([*common, "--quantization-epochs", "0", "--min-width", "1", "--rates", "25", "50"])
    files = networks.by_rank(tmp_path, ".h5")
    assert len(files) == 2
    assert not networks.by_rank(tmp_path, ".onnx")
    assert not list((tmp_path / "quantized").iterdir())
    assert (tmp_path / "pruned_model_top_1_prune_25_acc_0.1234.h5") not in files
    full = {
        w
        for kernel, _ in networks.dense_layers(networks.load_mlp(workdir / "tf_pruned_model.h5", ""))
        for w in kernel.ravel()
    }
    for path in files:
        layers = networks.dense_layers(networks.load_mlp(path, ""))
        assert {w for kernel, _ in layers for w in kernel.ravel()} <= full


def test_same_seed_same_pruned_networks(workdir, arrays, tmp_path, keras):
    weights = []
    for run in ("a", "b"):
        folder = tmp_path / run
        folder.mkdir()
        for name in ("MLP_model_0.h5", "MLP_model_0_metrics.json"):
            shutil.copy(workdir / name, folder)
        common = ["--data-dir", str(arrays), "--workdir", str(folder)]
        step2.main([*common, "--epochs", "1"])
        step3.main([*common, "--rates", "80", "--fine-tune-epochs", "1", "--quantization-epochs", "1"])
        files = [folder / "tf_pruned_model.h5", *networks.by_rank(folder, ".h5")]
        weights.append([w for path in files for w in networks.load_mlp(path, "").get_weights()])
        weights[-1] += [layer.table for path in files for n in q.read_h5(path, "") for layer in n.hidden]
        names = [path.name for path in files]
    assert [path.name for path in files] == names
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


# Step 4


def test_onnx_files_are_checked_and_equal_keras(workdir, arrays, keras):
    X = load_arrays(arrays)["test"][0]
    files = networks.by_rank(workdir, ".onnx")
    assert [p.stem for p in files] == [p.stem for p in networks.by_rank(workdir, ".h5")]
    for path in files:
        graph = onnx.load(path)
        onnx.checker.check_model(graph, full_check=True)
        assert [o.version for o in graph.opset_import if o.domain == ""] == [14]
        session = onnxruntime.InferenceSession(path)
        got = session.run(None, {session.get_inputs()[0].name: X})[0]
        expected = networks.load_mlp(path.with_suffix(".h5"), "")(X).numpy()
        assert np.abs(got - expected).max() < 1e-5


def test_a_conversion_that_differs_is_an_error_and_leaves_no_file(workdir, arrays, tmp_path, keras, monkeypatch):
    def wrong(model):
        layers = networks.dense_layers(model)
        layers[-1][1][:] += 0.01
        return convert(networks.build(layers))

    convert = step4.convert
    monkeypatch.setattr(step4, "convert", wrong)
    source = networks.by_rank(workdir, ".h5")[0]
    with pytest.raises(SystemExit, match="ONNX Runtime differs"):
        step4.main(["--data-dir", str(arrays), "--workdir", str(tmp_path), "--models", str(source)])
    assert not list(tmp_path.iterdir())


# Bad input to any of them


def corrupt(path, how, tmp_path):
    """A copy of a good .h5 file in tmp_path, damaged."""
    target = tmp_path / path.name
    shutil.copy(path, target)
    if how == "missing":
        target.unlink()
    elif how == "truncated":
        target.write_bytes(target.read_bytes()[:3000])
    elif how == "foreign":
        target.write_text("not a network")
    else:
        with h5py.File(target, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            layers = config["config"]["layers"]
            if how == "nan":
                file["model_weights/hidden_1/hidden_1/kernel:0"][0, 0] = np.nan
            elif how == "code":
                code = {"class_name": "Lambda", "config": {"name": "x", "function": ["evil", None, None]}}
                layers.insert(1, code)
            elif how == "wrong shape":
                del file["model_weights/hidden_1/hidden_1/kernel:0"]
                file["model_weights/hidden_1/hidden_1/kernel:0"] = np.zeros((31, 64), np.float32)
            elif how == "linear":
                layers[1]["config"]["activation"] = "linear"
            elif how == "huge":
                layers[1]["config"]["units"] = float("inf")
            elif how == "no sigmoid":
                layers[-1]["config"]["activation"] = "linear"
            file.attrs["model_config"] = json.dumps(config)
    return target


@pytest.mark.parametrize(
    "how", ["missing", "truncated", "foreign", "nan", "code", "wrong shape", "no sigmoid", "linear", "huge"]
)
def test_bad_networks_are_refused_in_one_line(workdir, arrays, tmp_path, capsys, how):
    common = ["--data-dir", arrays, "--workdir", tmp_path]
    shutil.copy(workdir / "MLP_model_0_metrics.json", tmp_path)
    for step, source, command in (
        (step2, "MLP_model_0.h5", "python MLP_model_0.py"),
        (step3, "tf_pruned_model.h5", "python TF_pruning.py"),
    ):
        target = corrupt(workdir / source, how, tmp_path)
        line = refusal(step.main, common, capsys)
        assert source in line
        assert command in line
        target.unlink(missing_ok=True)
    first = networks.by_rank(workdir, ".h5")[0]
    target = corrupt(first, how, tmp_path)
    good = tmp_path / "pruned_model_top_2_prune_30_acc_0.9.h5"
    shutil.copy(networks.by_rank(workdir, ".h5")[1], good)
    if how != "missing":
        line = refusal(step4.main, common, capsys)
        assert target.name in line
        assert "python dynamic_pruning_eval.py" in line
    assert not list(tmp_path.glob("*.onnx"))  # not even of the good one


def test_bad_options_and_missing_inputs_are_refused(workdir, arrays, tmp_path, capsys):
    common = ["--data-dir", arrays, "--workdir", tmp_path]
    assert "python dynamic_pruning_eval.py" in refusal(step4.main, common, capsys)
    missing = [*common, "--models", tmp_path / "MLP_model_0.h5"]
    assert "MLP_model_0.h5: not found; make it with: python MLP_model_0.py" in refusal(step4.main, missing, capsys)
    for rate in ("0", "-1", "nan", "inf", "x"):
        assert "--learning-rate" in refusal(step1.main, [*common, f"--learning-rate={rate}"], capsys)
    assert "--seed" in refusal(step1.main, [*common, "--seed=-1"], capsys)
    assert "--rates" in refusal(step3.main, [*common, "--rates", "50", "25"], capsys)
    assert "neuron" in refusal(step2.main, [*common, "--block-rows", "0"], capsys)
    assert "--epochs" in refusal(step1.main, [*common, "--epochs", "0"], capsys)
    for step in (step1, step2, step3, step4):
        line = refusal(step.main, ["--data-dir", tmp_path / "none", "--workdir", workdir], capsys)
        assert "preprocess_mitbih.py" in line
    (tmp_path / "d").mkdir()
    assert "same name" in refusal(step4.main, [*common, "--models", "a/x.h5", "b/x.h5"], capsys)
    (tmp_path / "file").write_text("x")
    assert "file" in refusal(
        step1.main, ["--data-dir", arrays, "--workdir", tmp_path / "file", "--epochs", "1"], capsys
    )


def test_a_training_that_ends_in_nan_keeps_the_network_that_was_there(workdir, arrays, tmp_path, capsys, keras):
    shutil.copy(workdir / "MLP_model_0.h5", tmp_path)
    before = (tmp_path / "MLP_model_0.h5").read_bytes()
    common = ["--data-dir", arrays, "--workdir", tmp_path, "--epochs", "2", "--learning-rate", "1e30"]
    assert "--learning-rate" in refusal(step1.main, common, capsys)
    assert (tmp_path / "MLP_model_0.h5").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("step", [step1, step3])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(workdir, arrays, tmp_path, capsys, keras, monkeypatch, step):
    """The third file that is written finds no room."""
    for path in (*workdir.glob("*.h5"), workdir / "MLP_model_0_metrics.json"):
        shutil.copy(path, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_bytes, calls = cli.Path.write_bytes, []

    def no_room(path, content):
        calls.append(path)
        if len(calls) == (1 if step is step1 else 3):
            write_bytes(path, content[:100])
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(cli.Path, "write_bytes", no_room)
    options = ["--epochs", "1"] if step is step1 else ["--fine-tune-epochs", "0", "--quantization-epochs", "0"]
    assert "No space left" in refusal(step.main, ["--data-dir", arrays, "--workdir", tmp_path, *options], capsys)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
