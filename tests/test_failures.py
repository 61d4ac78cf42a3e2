"""Step 5 where something is not as it should be: bad input, interrupts, what cannot be compiled or takes too much."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, RUN, command, options, refusal, small_network

import fhe_experiments as step5
from fhe_mlp import circuit


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
    calls = []

    def run_encrypted(module, row):
        calls.append(row)
        if len(calls) == 3 + 2:  # the first configuration, and a sample of the second
            raise MemoryError
        if len(calls) == 3 + 3:
            raise KeyboardInterrupt
        return RUN

    monkeypatch.setattr(circuit, "make_keys", lambda module: 1.0)
    monkeypatch.setattr(circuit, "run_encrypted", run_encrypted)
    with pytest.raises(KeyboardInterrupt):
        step5.main(options(arrays, tmp_path, "--bits", "2", "3", "4"))
    step5.main(options(arrays, tmp_path, "--report"))
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx").set_index("q_bits")
    assert rows["status"].to_dict() == {2: "ok", 3: "failed"}
    assert rows.loc[3, "reason"] == "MemoryError"


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
        "m = circuit.compile_circuit(c); make_keys(m); run_encrypted(m, c.calibration[0]); "
        "print('waiting', os.getpid(), flush=True); [run_encrypted(m, c.calibration[0]) for _ in range(10_000)]"
    ),
    "killed for want of memory": "print('waiting', os.getpid(), flush=True); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("waits", WAITS)
def test_an_interrupt_ends_the_run_says_how_to_resume_and_shows_what_is_finished(arrays, tmp_path, waits):
    prelude = (
        "import os, signal\nprepare = circuit.prepare\n"
        "make_keys, run_encrypted = circuit.make_keys, circuit.run_encrypted\n"
        f"circuit.make_keys, circuit.run_encrypted = lambda m: 1.0, lambda m, row: {RUN}\n"
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
