"""Step 5: runs that are cut short, go on, and are never mixed with another's results."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import PLAIN_BITS, ROOT, refusal, small_network

import fhe_experiments as step5
from fhe_mlp import experiment, results

# What differs from run to run: times, and what the noise of encryption may touch.
NOISY = re.compile(r"_time$|seconds|accuracy_simulated|outputs_equal|decisions_equal|_fhe|ciphertext|predicted_")


def steady(path):
    """The columns of a results sheet that every run must repeat."""
    rows = pd.read_excel(path)
    return rows[[name for name in rows if not NOISY.search(name)]]


def options(arrays, folder, *more):
    model = folder / "small.onnx"
    if not model.exists():
        small_network(model, widths=(32, 3, 1))
    common = ["--data-dir", arrays, "--workdir", folder, "--models", model, "--samples", "2", "--batches", "2", *more]
    return [str(word) for word in common]


def command(*argv):
    """Step 5 in a process of its own, with the plain way's prices cut short as in the other tests."""
    code = (
        "import sys, fhe_experiments as s\nfrom fhe_mlp.common import run_in_child\n"
        f"s.PLAIN_BITS, s.SIMULATED_ROWS = {PLAIN_BITS}, {step5.SIMULATED_ROWS}\n"
        f"s.ROUNDING_BITS = {step5.ROUNDING_BITS}\n"
        "sys.argv[0] = 'fhe_experiments.py'\nrun_in_child(lambda: s.main(sys.argv[1:]), s.GO_ON)\n"
    )
    return [sys.executable, "-c", code, *argv]


@pytest.fixture(scope="module")
def whole(arrays, tmp_path_factory):
    """A run of two bit widths and two batches that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    step5.main(options(arrays, folder, "--bits", "2", "3"))
    return folder


@pytest.fixture
def counted(monkeypatch):
    """Labels of the configurations that are compiled, and samples that are run, from here on."""
    compiled, ran = [], []
    compile_job, run_encrypted = experiment.compile_job, experiment.run_encrypted

    def counting_compile(job):
        compiled.append((job.bits, job.setting.trained))
        return compile_job(job)

    def counting_run(module, row):
        ran.append(row)
        return run_encrypted(module, row)

    monkeypatch.setattr(experiment, "compile_job", counting_compile)
    monkeypatch.setattr(experiment, "run_encrypted", counting_run)
    return compiled, ran


def test_a_killed_run_leaves_whole_workbooks_and_the_same_command_does_only_the_rest(whole, arrays, tmp_path, counted):
    argv = options(arrays, tmp_path, "--bits", "2", "3")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(*argv), cwd=ROOT, stdout=log, stderr=log)
        first = tmp_path / "results_batch_1.xlsx"  # of the first configuration; the second one is still to come
        until = time.monotonic() + 120
        while not first.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    time.sleep(0.5)  # what it started ends with it, but not before it
    before = {b: pd.read_excel(tmp_path / f"results_batch_{b}.xlsx") for b in (0, 1)}
    assert all(rows["q_bits"].iloc[0] == 2 and len(rows) <= 2 for rows in before.values())
    finished = sum(map(len, before.values()))
    step5.main(argv)
    compiled, ran = counted
    assert {bits for bits, trained in compiled if trained} <= {3}
    assert len(ran) == (0 if finished == 4 else 1 + 2 * (4 - finished))  # a warm-up and two rows a batch
    for batch in (0, 1):
        path = tmp_path / f"results_batch_{batch}.xlsx"
        after = pd.read_excel(path)
        pd.testing.assert_frame_equal(
            after[: len(before[batch])][list(before[batch])], before[batch], check_dtype=False
        )
        pd.testing.assert_frame_equal(steady(path), steady(whole / path.name))
        predictions = pd.read_excel(path, sheet_name="predictions")
        assert list(predictions["q_bits"]) == [2, 2, 3, 3]
    assert list(pd.read_excel(tmp_path / "fhe_summary.xlsx")["n"]) == [4, 4]


def test_a_finished_run_is_not_done_again(whole, arrays, capsys, counted):
    kept = {path.name: pd.read_excel(path) for path in whole.glob("results_*.xlsx")}
    step5.main(options(arrays, whole, "--bits", "2", "3"))
    assert counted == ([], [])
    assert "2 configurations are finished" in capsys.readouterr().out
    for name, rows in kept.items():
        pd.testing.assert_frame_equal(pd.read_excel(whole / name), rows)


def test_more_of_the_same_experiment_joins_it(whole, arrays, tmp_path, counted):
    for path in whole.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    step5.main(options(arrays, tmp_path, "--bits", "4"))
    assert {bits for bits, trained in counted[0] if trained} == {4}
    for batch in (0, 1):
        assert list(pd.read_excel(tmp_path / f"results_batch_{batch}.xlsx")["q_bits"]) == [2, 3, 4]
    assert sorted(pd.read_excel(tmp_path / "fhe_summary.xlsx")["q_bits"]) == [2, 3, 4]


@pytest.mark.parametrize("what", ["setting", "network", "data", "code"])
def test_results_of_something_else_are_kept_apart(whole, arrays, tmp_path, monkeypatch, capsys, what):
    for path in whole.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    old = (tmp_path / "results_batch_0.xlsx").read_bytes()
    more = ["--p-error", "0.001"] if what == "setting" else []
    data = arrays
    if what == "network":
        small_network(tmp_path / "small.onnx", widths=(32, 3, 1), seed=1)
    if what == "data":
        data = tmp_path / "data"
        data.mkdir()
        for path in arrays.iterdir():
            np.save(data / path.name, np.load(path)[1:])
    if what == "code":
        monkeypatch.setattr(step5, "CODE_SHA256", "0" * 16)
    step5.main(options(data, tmp_path, "--bits", "2", *more))
    assert (tmp_path / "results_batch_0_earlier_1.xlsx").read_bytes() == old
    assert "kept as results_batch_0_earlier_1.xlsx" in capsys.readouterr().out
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx")
    assert len(rows) == 1
    assert rows.loc[0, "identity"] not in set(pd.read_excel(whole / "results_batch_0.xlsx")["identity"])


@pytest.mark.parametrize("name", ["results_batch_0.xlsx", "results_batch_7.xlsx", "fhe_summary.xlsx"])
def test_an_unreadable_workbook_is_one_line_and_nothing_is_overwritten(whole, arrays, tmp_path, capsys, name):
    for path in whole.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((whole / "results_batch_0.xlsx").read_bytes()[:2000])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    line = refusal(step5.main, options(arrays, tmp_path, "--bits", "2", "3"), capsys)
    assert name in line
    assert "delete it" in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


CHANGES = {  # by hand, to the sheets of a results workbook
    "a column renamed": lambda rows, runs: (rows.rename(columns={"status": "state"}), runs),
    "text in a number": lambda rows, runs: (rows.assign(complexity="about 3e9"), runs),
    "a row twice": lambda rows, runs: (pd.concat([rows, rows[:1]]), runs),
    "another batch": lambda rows, runs: (rows.assign(batch=1), runs.assign(batch=1)),
    "a machine missing": lambda rows, runs: (rows.assign(processor=None), runs),
    "a prediction missing": lambda rows, runs: (rows, runs[1:]),
    "no predictions": lambda rows, runs: (rows, runs[:0]),
    "a label missing": lambda rows, runs: (rows, runs.drop(columns="label")),
    "text in a prediction": lambda rows, runs: (rows, runs.assign(run_seconds="fast")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_workbook_changed_by_hand_is_one_line_and_stays(whole, arrays, tmp_path, capsys, what):
    for path in whole.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "results_batch_0.xlsx"
    sheets = CHANGES[what](*(pd.read_excel(path, sheet_name=name) for name in ("results", "predictions")))
    with pd.ExcelWriter(path) as writer:
        for name, table in zip(("results", "predictions"), sheets):
            table.to_excel(writer, sheet_name=name, index=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    line = refusal(step5.main, options(arrays, tmp_path, "--bits", "2", "3"), capsys)
    assert "results_batch_0.xlsx: was changed since it was written" in line
    assert "delete it" in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_changed_price_of_the_plain_way_is_computed_again(whole, tmp_path):
    assert len(results.read_plain(whole)) == len(PLAIN_BITS)
    plain = pd.read_excel(whole / "fhe_summary.xlsx", sheet_name="plain way")
    for changed in (plain.drop(columns="compared"), plain.assign(complexity="dear"), plain.assign(compared="yes")):
        with pd.ExcelWriter(tmp_path / "fhe_summary.xlsx") as writer:
            changed.to_excel(writer, sheet_name="plain way", index=False)
        assert results.read_plain(tmp_path).empty


def test_a_configuration_that_failed_everywhere_is_in_the_summary(whole):
    job = experiment.Job("m", 2, b"", None, None, None, {"identity": "a"})
    task = experiment.Task(job, {"status": "ok", "complexity": 1e9}, {0: np.arange(2)}, 1.0)
    rows = pd.DataFrame([result.row for result in experiment.failed_results(task, "its workers died")])
    summary = results.summarize(rows, pd.DataFrame({"identity": []}), results.read_plain(whole))
    assert summary[["model_name", "status", "reason"]].to_numpy().tolist() == [["m", "failed", "its workers died"]]


def test_a_dry_run_tells_the_plan_and_writes_nothing(arrays, tmp_path, capsys):
    argv = options(arrays, tmp_path, "--bits", "2", "3", "--dry-run")
    before = sorted(tmp_path.iterdir())
    step5.main(argv)
    shown = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    for word in ("complexity", "predicted_seconds", "evaluation_keys_MB", "predicted_memory_MB", "minutes"):
        assert word in shown
    assert re.search(r"2 configurations to do, 2 of them encrypted, on 8 rows in all: about [\d.]+ min", shown)


def test_a_plan_tells_what_would_not_fit_into_this_machine(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "MEMORY_PER_KEY_BYTE", 1e9)
    for scheduler, told in (([], True), (["--scheduler", "tcp://elsewhere:1"], False)):
        step5.main(options(arrays, tmp_path, "--bits", "2", "--dry-run", *scheduler))
        assert ("too large" in capsys.readouterr().out) == told


def test_a_folder_that_cannot_be_written_is_one_line(arrays, tmp_path, capsys):
    options(arrays, tmp_path)  # makes the network
    argv = options(arrays, tmp_path, "--bits", "2", "--workdir", str(tmp_path / "small.onnx"))
    assert "small.onnx: cannot be written" in refusal(step5.main, argv, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx"]


WAITS = {  # what a run is doing when it is interrupted
    "in Python": "time.sleep(60)",
    "in a C call that never gives the interpreter back": (
        "m = ctypes.create_string_buffer(64); [ctypes.PyDLL(None).pthread_mutex_lock(m) for _ in range(2)]"
    ),
    "in Concrete, which answers with SIGKILL of its own process": (
        "module = experiment.compile_job(job); circuit.make_keys(module); "
        "[circuit.run_encrypted(module, job.calibration[0]) for _ in range(10_000)]"
    ),
    "killed for want of memory": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("waits", WAITS)
def test_an_interrupt_ends_within_seconds_and_says_how_to_go_on(arrays, tmp_path, waits):
    code = (
        "import ctypes, os, sys, time, fhe_experiments as s\nfrom fhe_mlp import circuit, experiment, plan\n"
        "from fhe_mlp.common import run_in_child\n"
        f"def wait(job):\n    print('waiting', os.getpid(), flush=True)\n    {WAITS[waits]}\n"
        "plan.price = wait\nsys.argv[0] = 'fhe_experiments.py'\n"
        "run_in_child(lambda: s.main(sys.argv[1:]), s.GO_ON)\n"
    )
    argv = [sys.executable, "-c", code, *options(arrays, tmp_path, "--bits", "2")]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (line := process.stdout.readline()).startswith("waiting"):
        assert process.poll() is None
    time.sleep(3)  # until it is in the call that it announced
    started = time.monotonic()
    what, status = ("ended by SIGKILL", 137) if waits.startswith("killed") else ("interrupted", 130)
    if status == 130:
        os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 6
    assert process.returncode == status
    lines = [line for line in errors.splitlines() if line.startswith("fhe_experiments.py: ")]
    assert lines == [f"fhe_experiments.py: {what}; {step5.GO_ON}"]
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):  # nothing that it started is left
        os.kill(int(line.split()[1]), 0)


def test_times_of_unlike_machines_are_not_averaged():
    base = {"model_name": "m", "q_bits": 3, "identity": "a", "status": "ok", "complexity": 1e9, "cores": 2}
    base |= {"accuracy_clear_validation": 0.9, "accuracy_clear_test_set": 0.9, "test_set_rows": 10}
    rows = pd.DataFrame(
        [
            {**base, "batch": 0, "host": "x", "processor": "fast"},
            {**base, "batch": 1, "host": "y", "processor": "fast"},
            {**base, "batch": 2, "host": "z", "processor": "slow"},
        ]
    )
    runs = {"identity": "a", "label": 1, "decision_fhe": 1, "decision_clear": 1, "output_fhe": 1.0, "output_clear": 1.0}
    runs |= {"encrypt_seconds": 0.0, "decrypt_seconds": 0.0, "input_bytes": 1, "output_bytes": 1}
    predictions = pd.DataFrame([{**runs, "batch": b, "run_seconds": s} for b, s in ((0, 1.0), (1, 2.0), (2, 9.0))])
    plain = pd.DataFrame({"compared": [True], "complexity": [1e12]})
    summary = results.summarize(rows, predictions, plain).set_index("processor")
    assert summary.loc["fast", "run_seconds"] == 1.5
    assert summary.loc["slow", "run_seconds"] == 9
    assert list(summary["n"]) == [2, 1]
    assert summary["on_front"].all()
    seconds = results.pivots(summary.reset_index())["seconds by bits"]
    assert list(seconds["processor"]) == ["fast", "slow"]
    assert list(seconds["3 bits"]) == [1.5, 9]
