"""Step 5: encrypted runs of small networks, resumed ones, and the choice of what is deployed."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import openpyxl
import pandas as pd
import pytest
from conftest import ROOT, SMALL_LAYER, SPEED, command, options, refusal, small_network, three_inputs

import fhe_experiments as step5
from fhe_mlp import circuit, configuration, ec57, report
from fhe_mlp.arrays import load_arrays, stratified_order
from fhe_mlp.store import Store

EXACT = str(2.0**-40)  # p_error of default PTQ: what differs then comes from approximate rounding
WHOLE = ["--bits", "2", "3", "--batches", "2", "--rounding-bits", "5", "--p-error", EXACT]  # rounds nothing
POLL_SECONDS = 0.05
# What differs from run to run: times, and what the noise of encryption may touch.
NOISY = re.compile(r"_time$|seconds|accuracy_simulated|outputs_equal|decisions_equal|_fhe|ciphertext")


def steady(folder):
    """The results of a folder's database, less the columns that no run repeats."""
    rows = [json.loads(r) for (r,) in sqlite3.connect(folder / step5.DATABASE).execute("SELECT facts FROM results")]
    rows = pd.DataFrame(rows).sort_values(["model_name", "q_bits", "batch"], ignore_index=True)
    return rows[sorted(name for name in rows if not NOISY.search(name))]


@pytest.fixture(scope="module")
def whole(arrays, tmp_path_factory):
    """A run of two bit widths and two batches that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    step5.main(options(arrays, folder, *WHOLE))
    return folder


@pytest.fixture
def counted(monkeypatch):
    """Labels of what is compiled, and of a machine that is measured, and rows that are run encrypted, from here on."""
    made, ran = [], []
    monkeypatch.setattr(circuit, "measure_speed", lambda *_: made.append("the machine") or circuit.Speed(**SPEED))
    compile_circuit, run_encrypted = circuit.compile_circuit, circuit.run_encrypted
    monkeypatch.setattr(circuit, "compile_circuit", lambda c: made.append(c.label) or compile_circuit(c))
    monkeypatch.setattr(circuit, "run_encrypted", lambda m, row: ran.append(row) or run_encrypted(m, row))
    return made, ran


def test_encrypted_decisions_equal_the_quantized_cleartext_ones(whole, arrays):
    labels = load_arrays(arrays)["test"][1]
    order = step5.describe(step5.parse_arguments(["--data-dir", str(arrays)])).order
    for batch in (0, 1):
        sheets = pd.read_excel(whole / f"results_batch_{batch}.xlsx", sheet_name=None)
        rows, predictions = sheets["results"], sheets["predictions"]
        assert list(rows.columns[:15]) == report.PUBLISHED_COLUMNS
        assert list(rows["q_bits"]) == [2, 3]
        assert (rows["status"] == "ok").all()
        assert (rows["pbs"] == 3).all()
        assert (rows[["decisions_equal_clear", "outputs_equal_clear"]] == 2).all(axis=None)
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
    sheet = openpyxl.load_workbook(whole / "results_batch_0.xlsx")["results"]
    assert (sheet.freeze_panes, sheet["G2"].number_format) == ("B2", "0.0000")
    assert (whole / "fhe_frontier.png").read_bytes().startswith(b"\x89PNG")


def test_cleartext_accuracy_is_that_of_the_quantized_network_on_the_whole_test_set(whole, arrays):
    data = load_arrays(arrays)
    calibration = step5.describe(step5.parse_arguments(["--data-dir", str(arrays)])).calibration
    setting = configuration.Setting(5, float(EXACT), 0.0)
    module = circuit.quantize(configuration.load_configuration(whole / "small.onnx", 3, setting, data, calibration, {}))
    accuracy = ec57.balanced_accuracy(circuit.outputs(module, data["test"][0], "disable") > 0, data["test"][1])
    rows = steady(whole).query("q_bits == 3")
    assert list(rows["balanced_accuracy_test_set"]) == pytest.approx([accuracy] * 2, abs=1e-9)
    assert (rows["test_set_rows"] == len(data["test"][1])).all()


def test_the_reference_evaluates_the_sigmoid_and_does_not_round(arrays, tmp_path):
    step5.main(options(arrays, tmp_path, "--bits", "2", "--reference"))
    sheets = pd.read_excel(tmp_path / "results_batch_0.xlsx", sheet_name=None)
    row = sheets["results"].iloc[0]
    assert row["pbs"] == 4  # three ReLU and the sigmoid
    assert sheets["predictions"]["output_clear"].between(0, 1).all()
    assert row["outputs_equal_clear"] == 2  # without rounding the encrypted output is exact
    assert (row["quantization"], row["p_error"]) == ("default PTQ", 2.0**-40)
    assert pd.isna(row["rounding_bits"])


def test_rows_are_drawn_by_class_and_record_whatever_else_is_run():
    """Of 1,000 beats of ten records, 30 are S, 60 V, 6 F; the ten rows of the first batch have all classes."""
    aami = np.array(["S"] * 30 + ["V"] * 60 + ["F"] * 6 + ["N"] * 904)
    beats = pd.DataFrame({"record": [str(k % 10) for k in range(1000)], "aami": aami})
    order = stratified_order(beats, 42)
    assert sorted(order) == list(range(1000))
    assert (order != stratified_order(beats, 43)).any()
    first = step5.drawn_rows(0, 50, 10, order)
    assert beats["aami"][first].value_counts().to_dict() == {"N": 5, "S": 2, "V": 2, "F": 1}
    normal = [k for k in order[:100] if aami[k] == "N"]
    assert len(normal) == 52  # half, and what F leaves when it has run out
    assert set(beats["record"][normal].value_counts()) <= {5, 6}  # of each of the ten records
    assert set(step5.drawn_rows(7, 50, 10, order)) < set(order[350:400])
    assert len(step5.drawn_rows(2, 50, 10, order[:105])) == 5


def test_a_machine_is_measured_on_one_small_layer_after_a_run_that_warms_up(small_settings, monkeypatch):
    seconds, ran = iter([9.0, 1.0, 2.0, 30.0]), []
    monkeypatch.setattr(circuit, "run_encrypted", lambda m, row: ran.append(m) or {"run_seconds": next(seconds)})
    monkeypatch.setattr(circuit, "make_keys", lambda m: 5.0)
    speed, layer = small_settings(configuration.Setting(4, float(EXACT), 0.0), 42), ran[0].fhe_circuit
    assert layer.programmable_bootstrap_count == SMALL_LAYER["MEASURED_NEURONS"]
    assert speed.unit == 2.0 / layer.complexity
    assert speed.key_byte == 5.0 / circuit.key_bytes(layer)
    assert speed.simulated_pbs > 0


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
    assert len(ran) == sum(1 + 2 * batches for batches in left if batches)
    pd.testing.assert_frame_equal(steady(tmp_path), steady(whole), check_dtype=False)


@pytest.fixture
def scheduler(tmp_path):
    """Address of a scheduler, and the processes of its two workers (without a nanny: a killed one stays dead)."""
    file = tmp_path / "scheduler.json"
    environment = {**os.environ, "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "0"}
    dask = [sys.executable, "-m", "dask"]
    started = [
        subprocess.Popen(
            [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
    ]
    try:
        while not file.exists():  # which the scheduler writes when it listens
            with pytest.raises(subprocess.TimeoutExpired):  # unless it ends
                started[0].wait(POLL_SECONDS)
        for name in ("first", "second"):
            flags = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name]
            worker = [*dask, "worker", "--scheduler-file", str(file), *flags, "--local-directory", str(tmp_path)]
            started.append(subprocess.Popen(worker, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL))
        yield json.loads(file.read_text())["address"], started[1:]
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def test_a_killed_worker_loses_only_its_own_configuration_which_is_done_elsewhere(
    whole, arrays, tmp_path, scheduler, monkeypatch
):
    from distributed import Client

    address, workers = scheduler
    lost, sent, submit = [], threading.Event(), Client.submit
    monkeypatch.setattr(Client, "submit", lambda *call, **options: (submit(*call, **options), sent.set())[0])

    def kill_a_busy_worker():
        sent.wait()
        with Client(address) as client:
            busy = {}
            while not busy:
                busy = {w: tasks for w, tasks in client.processing().items() if tasks}
            name = client.scheduler_info()["workers"][next(iter(busy))]["name"]
            lost.append(next(iter(busy.values())))
            os.kill(workers[["first", "second"].index(name)].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_busy_worker)
    killer.start()
    step5.main(options(arrays, tmp_path, *WHOLE, "--scheduler", address))
    killer.join()
    assert lost
    assert sum(worker.poll() is not None for worker in workers) == 1
    rows = steady(tmp_path)
    pd.testing.assert_frame_equal(rows, steady(whole), check_dtype=False)
    assert (rows["status"] == "ok").all()
    assert (rows["host"] == os.uname().nodename).all()
    assert (rows["cores"] == len(os.sched_getaffinity(0))).all()


def test_a_finished_run_computes_nothing_and_its_workbooks_can_be_written_anew(
    whole, arrays, tmp_path, counted, capsys
):
    (tmp_path / step5.DATABASE).write_bytes((whole / step5.DATABASE).read_bytes())
    argv = options(arrays, tmp_path, *WHOLE, "--bits", "2", "3", "3")
    for more in ([], ["--report"]):
        step5.main([*argv, *more])
        for name in ("results_batch_0.xlsx", "results_batch_1.xlsx", "fhe_summary.xlsx"):
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
        small_network(tmp_path / "small.onnx", widths=(32, 3, 1), edit=three_inputs, seed=1)
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
    more = ["--bits", bits, "--batches", "1", "--p-error", p_error, "--max-seconds", "1e-9"]  # a row all the same
    step5.main(options(data, tmp_path, *WHOLE, *more))
    assert next(label for label in counted[0] if "small" in label) == f"small at {bits} bits"
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx")
    assert list(rows["q_bits"]) == ([2, 3, 4] if what == "more bits" else [2])
    assert len(steady(tmp_path)) == 5  # the four that were there, and the new one


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
