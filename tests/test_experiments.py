"""Step 5: encrypted runs of small networks, resumed and interrupted ones, and the choice of what is deployed."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess

import numpy as np
import openpyxl
import pandas as pd
import pytest
from conftest import ROOT, SMALL, command, refusal, small_network

import dynamic_pruning_eval as step3
import fhe_experiments as step5
import h5_onnx_converter as step4
from fhe_mlp import circuit, configuration, ec57, networks, report
from fhe_mlp import quantized as q
from fhe_mlp.arrays import load_arrays
from fhe_mlp.store import Store

EXACT = str(2.0**-40)  # p_error of default PTQ: what differs then comes from approximate rounding
# Settings of a run in which nothing differs: the outputs of the rows that are drawn from these batches lie 2.6 times as
# far from the threshold as approximate rounding to 6 bits moved any output of this network (simulated).
WHOLE = ["--bits", "2", "5", "--batches", "2", "--start-batch", "7", "--rounding-bits", "6", "--p-error", EXACT]
# What differs from run to run: times, and what the noise of encryption may touch.
NOISY = re.compile(r"_time$|seconds|accuracy_simulated|outputs_equal|decisions_equal|_fhe|ciphertext")


def steady(folder):
    """The results of a folder's database, less the columns that no run repeats."""
    rows = [json.loads(r) for (r,) in sqlite3.connect(folder / step5.DATABASE).execute("SELECT facts FROM results")]
    rows = pd.DataFrame(rows).sort_values(["model_name", "q_bits", "batch"], ignore_index=True)
    return rows[sorted(name for name in rows if not NOISY.search(name))]


def options(arrays, folder, *more, **network):
    if not (folder / "small.onnx").exists():
        small_network(folder / "small.onnx", **{"widths": (32, 3, 1), **network})
    common = ["--data-dir", arrays, "--workdir", folder, "--models", folder / "small.onnx", "--samples", "2", *more]
    return [str(word) for word in common]


@pytest.fixture(scope="module")
def whole(arrays, tmp_path_factory):
    """A run of two bit widths and two batches that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    step5.main(options(arrays, folder, *WHOLE))
    return folder


@pytest.fixture
def counted(monkeypatch):
    """Labels of what is compiled, and rows that are run encrypted, from here on."""
    made, ran = [], []
    compile_circuit, run_encrypted = circuit.compile_circuit, circuit.run_encrypted
    monkeypatch.setattr(circuit, "compile_circuit", lambda c: made.append(c.label) or compile_circuit(c))
    monkeypatch.setattr(circuit, "run_encrypted", lambda m, row: ran.append(row) or run_encrypted(m, row))
    return made, ran


def test_encrypted_decisions_equal_the_quantized_cleartext_ones(whole, arrays):
    labels = load_arrays(arrays)["test"][1]
    order = step5.describe(step5.parse_arguments(["--data-dir", str(arrays)])).order
    for batch in (7, 8):
        sheets = pd.read_excel(whole / f"results_batch_{batch}.xlsx", sheet_name=None)
        rows, predictions = sheets["results"], sheets["predictions"]
        assert list(rows.columns[:15]) == report.PUBLISHED_COLUMNS
        assert list(rows["q_bits"]) == [2, 5]
        assert (rows["status"] == "ok").all()
        assert (rows["pbs"] == 3).all()
        assert (rows["decisions_equal_clear"] == 2).all()
        assert (rows["num_items"] == 2).all()
        positive = ["compile_time", "keygen_time", "encrypt_seconds", "run_seconds", "decrypt_seconds", "complexity"]
        positive += ["evaluation_keys_MB", "secret_keys_kB", "input_ciphertext_kB", "output_ciphertext_kB"]
        assert (rows[positive] > 0).all(axis=None)
        assert (predictions["decision_fhe"] == predictions["decision_clear"]).all()
        assert set(predictions["test_row"]) <= set(order[50 * batch : 50 * batch + 50])
        np.testing.assert_array_equal(predictions["label"], labels[predictions["test_row"]])
        for _, row in rows.iterrows():
            mine = predictions[predictions["q_bits"] == row["q_bits"]]
            assert row["accuracy_fhe"] == pytest.approx((mine["decision_fhe"] == mine["label"]).mean())
            assert row["perc_ones_pred_fhe"] == pytest.approx(100 * mine["decision_fhe"].mean())
            assert row["perc_ones_gt"] == pytest.approx(100 * mine["label"].mean())
            parts = mine[["encrypt_seconds", "run_seconds", "decrypt_seconds"]]
            assert row["fhe_time"] == pytest.approx(parts.to_numpy().sum(), rel=1e-4)
            assert row["accuracy_fhe_low95"] - 1e-9 < row["accuracy_fhe"] < row["accuracy_fhe_high95"] + 1e-9
        settings = dict(sheets["settings"].to_numpy())
        assert (rows["p_error"] == float(EXACT)).all()
        assert settings["concrete-ml"] == "1.9.0"
        assert (rows["security_bits"] == 128).all()
    summary = pd.read_excel(whole / "fhe_summary.xlsx", sheet_name=None)
    assert (summary["summary"]["n"] == 4).all()
    assert summary["summary"]["on_front"].any()
    compared = summary["comparison"].query("compared == True")
    assert list(compared["pbs"]) == [4]  # three ReLU and the sigmoid
    ratio = compared["complexity"].iloc[0] / summary["summary"]["complexity"]
    np.testing.assert_allclose(summary["summary"]["complexity_ratio_default_ptq"], ratio)
    sheet = openpyxl.load_workbook(whole / "results_batch_7.xlsx")["results"]
    assert (sheet.freeze_panes, sheet["G2"].number_format) == ("B2", "0.0000")
    assert (whole / "fhe_frontier.png").read_bytes().startswith(b"\x89PNG")


def test_cleartext_accuracy_is_that_of_the_quantized_network_on_the_whole_test_set(whole, arrays):
    data = load_arrays(arrays)
    calibration = step5.describe(step5.parse_arguments(["--data-dir", str(arrays)])).calibration
    setting = configuration.Setting(6, float(EXACT), 0.0)
    module = circuit.quantize(configuration.load_configuration(whole / "small.onnx", 5, setting, data, calibration, {}))
    accuracy = ec57.balanced_accuracy(circuit.outputs(module, data["test"][0], "disable") > 0, data["test"][1])
    rows = steady(whole).query("q_bits == 5")
    assert list(rows["balanced_accuracy_test_set"]) == pytest.approx([accuracy] * 2, abs=1e-9)
    assert (rows["test_set_rows"] == len(data["test"][1])).all()


def test_what_costs_too_much_or_cannot_compile_is_a_row_and_a_line(arrays, tmp_path, monkeypatch, capsys):
    quantize = circuit.quantize

    def fails(c):
        if c.bits in (3, 5):
            raise RuntimeError("NoParametersFound\nsecond line") if c.bits == 3 else AssertionError
        return quantize(c)

    monkeypatch.setattr(circuit, "quantize", fails)
    step5.main(options(arrays, tmp_path, "--bits", "2", "3", "5", "--max-seconds", "0.0001"))
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx").set_index("q_bits")
    assert list(rows["status"]) == ["too slow", "cannot compile", "cannot compile"]
    assert "--max-seconds" in rows.loc[2, "reason"]
    assert rows.loc[5, "reason"] == "AssertionError"
    assert rows["accuracy_fhe"].isna().all()
    assert rows.loc[2, "balanced_accuracy_test_set"] > 0
    assert "small at 3 bits: cannot compile, NoParametersFound" in capsys.readouterr().out


def test_where_nothing_compiles_no_picture_is_claimed(arrays, tmp_path, monkeypatch, capsys):
    quantize = circuit.quantize

    def fails(c):
        if c.model_name == "small":  # not the layer that measures the machine
            raise RuntimeError("NoParametersFound")
        return quantize(c)

    monkeypatch.setattr(circuit, "quantize", fails)
    step5.main(options(arrays, tmp_path, "--bits", "2"))
    printed = capsys.readouterr().out
    assert "NoParametersFound" in printed
    assert not (tmp_path / "fhe_frontier.png").exists()
    assert "fhe_frontier.png" not in printed


def test_keys_that_memory_cannot_hold_are_not_made(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(circuit, "MEMORY_PER_KEY_BYTE", 1e9)
    step5.main(options(arrays, tmp_path, "--bits", "2"))
    assert "too large" in capsys.readouterr().out
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx")
    assert rows.loc[0, "reason"].startswith("needs about")
    assert "keygen_time" not in rows


def test_what_breaks_while_running_is_a_row_and_what_was_finished_stays(arrays, tmp_path, monkeypatch):
    run_encrypted, calls = circuit.run_encrypted, []

    def breaks(module, row):
        calls.append(row)
        if len(calls) == 4 + 3 + 2:  # the machine's speed, the first configuration, and a sample of the second
            raise MemoryError
        if len(calls) == 4 + 3 + 3:
            raise KeyboardInterrupt
        return run_encrypted(module, row)

    monkeypatch.setattr(circuit, "run_encrypted", breaks)
    with pytest.raises(KeyboardInterrupt):
        step5.main(options(arrays, tmp_path, "--bits", "2", "3", "4"))
    monkeypatch.undo()
    monkeypatch.setattr(step5, "SIMULATED_ROWS", SMALL["SIMULATED_ROWS"])
    monkeypatch.setattr(step5, "ROUNDING_BITS", SMALL["ROUNDING_BITS"])
    step5.main(options(arrays, tmp_path, "--report"))
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx").set_index("q_bits")
    assert rows["status"].to_dict() == {2: "ok", 3: "failed"}
    assert rows.loc[3, "reason"] == "MemoryError"


def test_the_reference_evaluates_the_sigmoid_and_does_not_round(arrays, tmp_path):
    step5.main(options(arrays, tmp_path, "--bits", "2", "--reference", widths=(32, 2, 1)))
    sheets = pd.read_excel(tmp_path / "results_batch_0.xlsx", sheet_name=None)
    row = sheets["results"].iloc[0]
    assert row["pbs"] == 3  # two ReLU and the sigmoid
    assert sheets["predictions"]["output_clear"].between(0, 1).all()
    assert row["outputs_equal_clear"] == 2  # without rounding the encrypted output is exact
    assert (row["quantization"], row["p_error"]) == ("default PTQ", 2.0**-40)
    assert pd.isna(row["rounding_bits"])


def test_rows_are_drawn_by_class_and_record_whatever_else_is_run():
    """Of 1,000 beats of ten records, 30 are S, 60 V, 6 F; the ten rows of the first batch have all classes."""
    aami = np.array(["S"] * 30 + ["V"] * 60 + ["F"] * 6 + ["N"] * 904)
    beats = pd.DataFrame({"record": [str(k % 10) for k in range(1000)], "aami": aami})
    order = step5.stratified_order(beats, 42)
    assert sorted(order) == list(range(1000))
    assert (order != step5.stratified_order(beats, 43)).any()
    first = step5.drawn_rows(0, 50, 10, order)
    assert beats["aami"][first].value_counts().to_dict() == {"N": 5, "S": 2, "V": 2, "F": 1}
    normal = [k for k in order[:100] if aami[k] == "N"]
    assert len(normal) == 52  # half, and what F leaves when it has run out
    assert set(beats["record"][normal].value_counts()) <= {5, 6}  # of each of the ten records
    assert set(step5.drawn_rows(7, 50, 10, order)) < set(order[350:400])
    assert len(step5.drawn_rows(2, 50, 10, order[:105])) == 5


# Resumed and interrupted runs


def test_a_killed_run_is_resumed_and_gives_what_an_undisturbed_one_gives(whole, arrays, tmp_path, counted):
    argv = options(arrays, tmp_path, *WHOLE)
    told = "add = s.Store.add\ns.Store.add = lambda *a: (add(*a), print('stored', flush=True))"
    process = subprocess.Popen(
        command(*argv, prelude=told), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert any(line == "stored\n" for line in process.stdout)
    process.kill()
    process.stdout.read()  # until its child, which has the database, has ended too
    process.wait()
    with Store(tmp_path / step5.DATABASE) as store:
        (done,) = store.connection.execute("SELECT count(*) FROM results").fetchone()
    step5.main(argv)
    made, ran = counted
    assert 1 <= done <= 4
    left = [2 - min(done, 2), 4 - max(done, 2)]  # batches of each of the two configurations
    assert sum("small" in label for label in made) == (left[0] > 0) + (left[1] > 0)
    assert len(ran) == (4 if any(left) else 0) + sum(1 + 2 * batches for batches in left if batches)
    pd.testing.assert_frame_equal(steady(tmp_path), steady(whole), check_dtype=False)


def test_a_finished_run_computes_nothing_and_its_workbooks_can_be_written_anew(
    whole, arrays, tmp_path, counted, capsys
):
    (tmp_path / step5.DATABASE).write_bytes((whole / step5.DATABASE).read_bytes())
    argv = options(arrays, tmp_path, *WHOLE, "--bits", "2", "5", "5")
    for more in ([], ["--report"]):
        step5.main([*argv, *more])
        for name in ("results_batch_7.xlsx", "results_batch_8.xlsx", "fhe_summary.xlsx"):
            pd.testing.assert_frame_equal(pd.read_excel(tmp_path / name), pd.read_excel(whole / name))
            (tmp_path / name).unlink()
    assert counted == ([], [])
    assert "all 2 configurations are finished" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["more bits", "setting", "network", "data", "program"])
def test_rows_of_another_experiment_stay_apart_and_more_of_the_same_joins(
    whole, arrays, tmp_path, monkeypatch, counted, what
):
    (tmp_path / step5.DATABASE).write_bytes((whole / step5.DATABASE).read_bytes())
    data, bits, p_error = arrays, "2", EXACT
    if what == "network":
        small_network(tmp_path / "small.onnx", widths=(32, 3, 1), seed=1)
    if what == "data":
        data = tmp_path / "data"
        data.mkdir()
        for path in arrays.iterdir():
            np.save(data / path.name, np.load(path)[1:])
    if what == "program":
        monkeypatch.setattr(configuration, "RESULT_VERSION", configuration.RESULT_VERSION + 1)
    if what == "more bits":
        bits = "4"
    if what == "setting":
        p_error = "0.001"
    step5.main(options(data, tmp_path, *WHOLE, "--bits", bits, "--batches", "1", "--p-error", p_error))
    assert next(label for label in counted[0] if "small" in label) == f"small at {bits} bits"
    rows = pd.read_excel(tmp_path / "results_batch_7.xlsx")
    assert list(rows["q_bits"]) == ([2, 4, 5] if what == "more bits" else [2])
    assert len(steady(tmp_path)) == 5  # the four that were there, and the new one


def test_a_dry_run_prints_the_plan_and_writes_nothing(arrays, tmp_path, capsys):
    argv = options(arrays, tmp_path, "--bits", "2", "3", "--batches", "2", "--dry-run")
    before = sorted(tmp_path.iterdir())
    step5.main(argv)
    printed = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    for word in ("complexity", "predicted_seconds", "evaluation_keys_MB", "predicted_memory_MB", "minutes"):
        assert word in printed
    assert re.search(r"2 configurations to do, 2 of them encrypted, on 8 rows in all: about [\d.]+ min", printed)


WAITS = {  # what a run is doing when it is interrupted, once it has printed a line
    "in Python": "print('waiting', os.getpid(), flush=True); signal.pause()",
    "in Concrete, which answers with SIGKILL of its own process": (
        "m = circuit.compile_circuit(c); circuit.make_keys(m); circuit.run_encrypted(m, c.calibration[0]); "
        "print('waiting', os.getpid(), flush=True); [circuit.run_encrypted(m, c.calibration[0]) for _ in range(10_000)]"
    ),
    "killed for want of memory": "print('waiting', os.getpid(), flush=True); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("waits", WAITS)
def test_an_interrupt_ends_the_run_says_how_to_resume_and_shows_what_is_finished(arrays, tmp_path, waits):
    prelude = (
        "import os, signal\nfrom fhe_mlp import circuit\nprepare = circuit.prepare\n"
        f"def wait(c, *rest):\n    if c.bits == 2: return prepare(c, *rest)\n    {WAITS[waits]}\n"
        "circuit.prepare = wait"
    )
    argv = command(*options(arrays, tmp_path, "--bits", "2", "3"), prelude=prelude)
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = next(int(line.split()[1]) for line in process.stdout if line.startswith("waiting"))
    what, status = ("ended by SIGKILL", 137) if waits.startswith("killed") else ("interrupted", 130)
    if status == 130:
        os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == status
    lines = [line for line in errors.splitlines() if line.startswith("fhe_experiments.py: ")]
    assert lines == [f"fhe_experiments.py: {what}; {step5.RESUME}"]
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):  # nothing that it started is left
        os.kill(child, 0)
    assert list(pd.read_excel(tmp_path / "results_batch_0.xlsx")["q_bits"]) == [2]
    assert list(pd.read_excel(tmp_path / "fhe_summary.xlsx")["q_bits"]) == [2]


# Networks that step 3 has quantized


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
    lesson = step3.Lesson(data, data["train"][1], even, 0.0, 2, 42)
    layers = networks.dense_layers(model)
    found = step3.quantize_tables({90: layers}, layers, form, lesson)[90]
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


# What is deployed, and what is refused


def test_of_configurations_that_cost_the_same_the_one_of_the_most_bits_is_exported():
    found = [(1.9e9, 0.971, 5), (2.870e9, 0.986, 5), (2.871e9, 0.980, 6), (2.871e9, 0.983, 6), (5e9, 0.987, 7)]
    facts = [{"complexity": c, "balanced_accuracy_validation": a, "q_bits": b} for c, a, b in found]
    assert step5.best_for_export(facts, 0.01) == 3
    assert step5.best_for_export(facts, 0.02) == 0
    assert step5.best_for_export(facts, 0.0005) == 4


def test_export_considers_all_named_networks_and_compiles_each_once(arrays, tmp_path, counted, capsys):
    other = small_network(tmp_path / "other.onnx", widths=(32, 3, 1), seed=1)
    argv = options(arrays, tmp_path, "--bits", "3", "4", "--export", str(tmp_path / "deployed"))
    argv[argv.index("--models") + 2 : argv.index("--models") + 2] = [str(other)]
    step5.main(argv)
    labels = [f"{name} at {bits} bits" for name in ("small", "other") for bits in (3, 4)]
    assert counted[0] == labels
    model = json.loads((tmp_path / "deployed" / "client" / "model.json").read_text())
    assert model["name"] in labels
    assert model["leads"] is None  # these arrays come without dataset.json
    assert [feature["name"] for feature in model["features"]] == [f"feature_{k}" for k in range(32)]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert "is there already" in refusal(step5.main, argv, capsys)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_bad_input_is_refused_before_anything_is_written(arrays, tmp_path, capsys):
    common = ["--data-dir", arrays, "--workdir", tmp_path]

    def refused(*more):
        return refusal(step5.main, [*common, *more], capsys)

    assert "h5_onnx_converter.py" in refused()
    good = small_network(tmp_path / "good.onnx")
    assert "not found" in refused("--models", good, tmp_path / "none.onnx")
    content = good.read_bytes()
    for name, damaged in (("cut", content[: len(content) // 2]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / f"{name}.onnx").write_bytes(damaged)
        assert f"{name}.onnx" in refused("--models", good, tmp_path / f"{name}.onnx")
    assert "32 features" in refused("--models", small_network(tmp_path / "narrow.onnx", widths=(31, 2, 1)))
    assert "MLP" in refused("--models", small_network(tmp_path / "two.onnx", widths=(32, 2, 2)))
    assert "sigmoid" in refused("--models", small_network(tmp_path / "tanh.onnx", last="Tanh"))
    holes = small_network(tmp_path / "nan.onnx", edit=lambda w: {**w, "w0": w["w0"] * np.nan})
    assert "NaN" in refused("--models", holes)
    assert "batch 99 does not exist" in refused("--models", good, "--start-batch", "99")
    for option, value in (("--bits", "1"), ("--rounding-bits", "9"), ("--max-seconds", "nan"), ("--p-error", "1.5")):
        assert option in refused("--models", good, option, value)
    assert "same name" in refused("--models", good, good)
    for other in (["--p-error", str(step5.P_ERROR)], ["--rounding-bits", "4"], ["--post-training"]):
        assert "--reference fixes" in refused("--models", good, "--reference", *other)
    for other in (["--dry-run"], ["--scheduler", "local:1"], ["--report"]):
        assert "--export" in refused("--models", good, "--export", tmp_path / "new", *other)
    assert "no result" in refused("--models", good, "--report")
    assert "none.onnx" in refused("--models", tmp_path / "none.onnx", "--workdir", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "preprocess_mitbih.py" in refused("--data-dir", tmp_path)
    assert "good.onnx: cannot be written" in refused("--models", good, "--workdir", good)
    assert not list(tmp_path.glob("*.xlsx")) + list(tmp_path.glob("*.png"))
