"""Step 5: what is run, resumed and refused. Most tests encrypt nothing (tests/schemes/cleartext.py), one for real."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, random_layers, refusal, small_network, until
from test_encrypted import random_network
from test_workers import cluster  # noqa: F401

import fhe_experiments as step5
from fhe_mlp import encrypted, workers
from fhe_mlp.dataset import load_dataset, stratified_order
from fhe_mlp.experiments import configuration, jobs, report, tasks
from fhe_mlp.networks import MLP, h5_bytes
from fhe_mlp.quantized import add_networks, signed_bits, to_onnx

SCHEMES = ROOT / "tests" / "schemes"
# What a process of its own does first, and each of its workers, since both find it in their PYTHONPATH.
SITE = f"""
import fhe_mlp.encrypted
fhe_mlp.encrypted.__path__.append({str(SCHEMES)!r})
from fhe_mlp.experiments import jobs
jobs.post_training = lambda *_: fhe_mlp.encrypted.scheme_module("none")  # in place of what takes seconds to load
"""
# What the server does at every call: a network of 3 bits waits for ever or dies, once, where a file asks for it.
RUN = """
import pathlib, signal
for hook in pathlib.Path({folder!r}).glob("*.hook") if abs(self.weights).max() > 1 else ():
    hook.rename(hook.with_name(f"{{os.getpid()}}.done"))
    os.kill(os.getpid(), signal.SIGKILL) if hook.stem == "kill" else signal.pause()
"""


@pytest.fixture
def hooks(tmp_path_factory, monkeypatch):
    """The folder for hooks of RUN, with the scheme "cleartext" here and in processes that are started."""
    folder = tmp_path_factory.mktemp("hooks")
    (folder / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.setenv("CLEARTEXT_RUN", RUN.format(folder=str(folder)))
    monkeypatch.setattr(encrypted, "__path__", [*encrypted.__path__, str(SCHEMES)])
    monkeypatch.setattr(jobs, "post_training", lambda *_: encrypted.scheme_module("none"))  # which raises ValueError
    return folder


@pytest.fixture
def here(hooks, monkeypatch):
    """The same, and jobs run in this process; returns the rows of each call that ran encrypted from here on."""

    @contextmanager
    def in_this_process(shared, *_):
        def carry_out(function, jobs, waiting=None):
            return ((number, function(shared, *job)) for number, job in enumerate(jobs))

        yield SimpleNamespace(map=carry_out)

    monkeypatch.setattr(step5, "open_workers", in_this_process)
    for name in ("plot_frontier", "plot_steps"):  # which test_report.py looks at
        monkeypatch.setattr(report, name, lambda *_: None)
    ran, run_rows = [], jobs.run_rows
    monkeypatch.setattr(jobs, "run_rows", lambda *them: ran.append(list(them[-1])) or run_rows(*them))
    return ran


def quantized(X, bits, neurons=0, offset=0.3):
    """A network of random integers whose sums fit the rows X."""
    network, top = random_network(neurons), 2 ** (bits - 1) - 1
    small = {name: getattr(network, name).clip(-top, top) for name in ("weights", "linear")}
    network = replace(network, bits=bits, p_error=2.0**-6, offset=offset, **small)
    return replace(network, accumulator_bits=neurons and signed_bits(network.accumulators(X))).fitted(X)


def networks(arrays, folder, neurons=0, offset=0.3):
    """Write small.onnx, and what step 3 would have quantized from it to 2 and 3 bits; neurons: of that of 3 bits."""
    X = load_dataset(arrays).train.X
    small_network(folder / "small.onnx", widths=(32, 3, 1))
    (folder / "quantized").mkdir(exist_ok=True)
    for bits in (2, 3):
        content = to_onnx(quantized(X, bits, neurons if bits == 3 else 0, offset)).SerializeToString()
        (folder / "quantized" / f"small_{bits}bits.onnx").write_bytes(content)
    return folder


def options(arrays, folder, *more):
    """Arguments of step 5 for the networks in `folder`."""
    common = ["--data-dir", arrays, "--workdir", folder, "--models", folder / "small.onnx", "--bits", "2", "3"]
    return [str(word) for word in (*common, "--scheme", "cleartext", "--samples", "2", *more)]


def start(arrays, folder, *more):
    """Run step 5 in a process of its own."""
    command = [sys.executable, ROOT / "fhe_experiments.py", *options(arrays, folder, *more)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)


def stored(folder):
    """Encrypted outputs by identity and test row, from the database of a folder."""
    runs = sqlite3.connect(folder / step5.DATABASE).execute("SELECT identity, test_row, output_fhe FROM runs")
    return {(identity, row): output for identity, row, output in runs}


def shown(folder, name="results_batch_0.xlsx", sheet="results"):
    return pd.read_excel(folder / name, sheet_name=sheet)


def test_decisions_accuracies_and_costs_are_those_of_the_networks(arrays, tmp_path, here, capsys):
    data = load_dataset(arrays)
    step5.main(options(arrays, networks(arrays, tmp_path), "--samples", "12", "--batches", "2"))
    order = stratified_order(data.test.beats, 42)
    for batch in (0, 1):
        rows, runs = shown(tmp_path, f"results_batch_{batch}.xlsx"), shown(tmp_path, f"results_batch_{batch}.xlsx", 1)
        assert " ".join(rows.columns[:17]) == (
            "model_name num_items batch q_bits compile_time clear_time accuracy_clear perc_ones_gt perc_zeros_gt "
            "perc_ones_pred_clear perc_zeros_pred_clear fhe_time accuracy_fhe perc_ones_pred_fhe perc_zeros_pred_fhe "
            "status reason"
        )
        assert rows[["q_bits", "status", "num_items"]].to_numpy().tolist() == [[2, "ok", 12], [3, "ok", 12]]
        for bits, own in runs.groupby("q_bits"):
            index = own["test_row"].to_numpy()
            assert set(index) == set(order[50 * batch :][:12])
            logits = quantized(data.train.X, bits).logits(data.test.X)
            for column in ("output_clear", "output_fhe"):
                np.testing.assert_allclose(own[column], logits[index])
            row = rows[rows["q_bits"] == bits].iloc[0]
            decisions, y = logits > 0, data.test.y
            assert row["accuracy_fhe"] == row["accuracy_clear"] == pytest.approx(np.mean(decisions[index] == y[index]))
            assert row["perc_ones_gt"] == pytest.approx(100 * y[index].mean())
            assert row["accuracy_simulated"] == row["accuracy_clear_same_rows"]
            assert row["balanced_accuracy_test_set"] == pytest.approx(data.test.figures(decisions)["balanced_accuracy"])
            seconds = own[["encrypt_seconds", "run_seconds", "decrypt_seconds"]].to_numpy()
            assert row["fhe_time"] == pytest.approx(seconds.sum())
            assert (row["decisions_equal_clear"], row["agreement"], row["test_set_rows"]) == (12, 1, len(y))
    assert sorted(map(len, here)) == [1] * 6 + [3] * 2 + [9] * 4  # three of a configuration alone, then nine together
    assert "2 configurations to do, 2 of them encrypted, on 48 rows in all" in capsys.readouterr().out
    summary = shown(tmp_path, "fhe_summary.xlsx", "summary")
    assert summary["n"].tolist() == [24, 24]
    assert summary["on_front"].any()


def test_more_samples_run_only_the_new_rows_and_workbooks_are_a_view(arrays, tmp_path, here, capsys):
    argv = options(arrays, networks(arrays, tmp_path), "--samples", "10")
    step5.main(argv)
    first = stored(tmp_path)
    here.clear()
    step5.main([*argv, "--samples", "20"])
    assert sum(map(len, here)) == 2 * 10
    both, before = stored(tmp_path), shown(tmp_path)
    assert first.items() <= both.items()
    assert len(both) == 2 * 20
    here.clear()
    for more in (["--samples", "20"], ["--report"]):
        (tmp_path / "results_batch_0.xlsx").unlink()
        step5.main([*argv, *more])
        pd.testing.assert_frame_equal(shown(tmp_path), before)
    step5.main([*argv, "--batch-size", "10"])
    assert [shown(tmp_path, f"results_batch_{k}.xlsx")["num_items"].tolist() for k in (0, 1)] == [[10, 10]] * 2
    assert not here
    assert "all 2 configurations are finished" in capsys.readouterr().out


def test_a_network_of_workdir_that_is_named_by_another_path_too_is_one_network(arrays, tmp_path, monkeypatch):
    for path in [*networks(arrays, tmp_path).rglob("small*.onnx")]:
        path.rename(path.with_name(path.name.replace("small", "pruned_model_top_1_prune_90_acc_0.9")))
    monkeypatch.chdir(tmp_path)
    (model,) = tmp_path.glob("*.onnx")
    argv = ["--data-dir", str(arrays), "--models", str(model), "--bits", "2", "3"]
    assert len(set(keys := step5.describe(step5.parse_arguments(argv))[2])) == len(keys) >= 2


def test_results_of_another_experiment_stay_apart(arrays, tmp_path, here, monkeypatch):
    def keys(data, *more):
        return {*step5.describe(step5.parse_arguments(options(data, tmp_path, *more)))[0].configurations}

    networks(arrays, tmp_path)
    shifted = tmp_path / "data"
    shifted.mkdir()
    for path in arrays.iterdir():
        np.save(shifted / path.name, np.load(path)[1:])
    others = [["--seed", "43"], ["--scheme", "tfhe"], ["--post-training"], ["--post-training", "--rounding-bits", "5"]]
    found = [keys(arrays), keys(shifted), *(keys(arrays, *more) for more in others)]
    with monkeypatch.context() as patch:
        patch.setattr(configuration, "RESULT_VERSION", configuration.RESULT_VERSION + 1)
        found.append(keys(arrays))
    networks(arrays, tmp_path, offset=0.5)
    found.append(keys(arrays))
    assert len(set.union(*found)) == 2 * len(found)
    assert keys(arrays, "--rounding-bits", "5") == found[-1]  # which only networks that are quantized here have
    for more in ([], ["--seed", "43"]):
        step5.main(options(arrays, tmp_path, *more))
        assert len(shown(tmp_path)) == 2
    assert sum(map(len, here)) == len(stored(tmp_path)) == 8


@pytest.mark.parametrize(
    ("changed", "more", "status", "reason"),
    [
        ({"complexity": 1e15}, ["--max-seconds", "1"], "too slow", "predicted .* over --max-seconds 1"),
        ({"evaluation_keys_MB": 1e9}, [], "too large", "needs about 2200000.0 GB of memory"),
        ({"complexity": 0}, ["--max-seconds", "1e-9"], "too slow", "measured .* over --max-seconds 1e-09"),
        (RuntimeError("NoParametersFound\nsecond line"), [], "cannot compile", "NoParametersFound$"),
    ],
)
def test_a_refused_configuration_is_a_row_and_a_line(
    arrays, tmp_path, here, monkeypatch, capsys, changed, more, status, reason
):
    argv = options(arrays, networks(arrays, tmp_path))

    def cost(self):
        if self.network.bits == 3 and isinstance(changed, Exception):
            raise changed
        return {"complexity": 1e6, "evaluation_keys_MB": 1.0} | (changed if self.network.bits == 3 else {})

    with monkeypatch.context() as patch:
        patch.setattr(encrypted.scheme_module("cleartext").Scheme, "cost", cost)
        step5.main([*argv, *more])
    row = shown(tmp_path).set_index("q_bits").loc[3]
    assert row["status"] == status
    assert re.match(reason, row["reason"])
    assert (row["balanced_accuracy_test_set"] > 0) == (status != "cannot compile")
    assert pd.isna(row["accuracy_fhe"])
    assert f"small at 3 bits: {status}, {row['reason']}\n" in capsys.readouterr().out
    step5.main(argv)
    again = shown(tmp_path).set_index("q_bits").loc[3]
    assert again["status"] == ("ok" if status == "too slow" else status)  # the limit is gone, the memory is not larger


@pytest.mark.parametrize("reason", ["MemoryError", "its workers died, several in a row"])
def test_what_breaks_while_running_is_a_row_and_finished_rows_stay(arrays, tmp_path, here, monkeypatch, reason):
    def fails(*them):
        if len(here) == 3:
            raise MemoryError
        return run_rows(*them)

    def deadly(experiment, key, calls):
        return workers.LOST if experiment.configurations[key].bits == 3 else encrypt(experiment, key, calls)

    argv, run_rows, encrypt = options(arrays, networks(arrays, tmp_path)), jobs.run_rows, jobs.encrypt
    with monkeypatch.context() as patch:
        patch.setattr(jobs, *(("run_rows", fails) if reason == "MemoryError" else ("encrypt", deadly)))
        step5.main(argv)
    assert shown(tmp_path)[["status", "reason"]].fillna("").to_numpy().tolist() == [["ok", ""], ["failed", reason]]
    assert len(here) == len(stored(tmp_path)) == (3 if reason == "MemoryError" else 2)
    step5.main(argv)
    assert (shown(tmp_path)["status"] == "ok").all()
    assert len(here) == 4


def test_a_dry_run_prints_the_plan_and_writes_nothing(arrays, tmp_path, here, capsys):
    before = sorted(networks(arrays, tmp_path).iterdir())
    step5.main(options(arrays, tmp_path, "--dry-run"))
    printed = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    for word in ("complexity", "predicted_seconds", "evaluation_keys_MB", "predicted_memory_MB", "minutes"):
        assert word in printed
    assert "2 configurations to do, 2 of them encrypted, on 4 rows in all: about 0.0 min" in printed
    assert not here


def test_jobs_take_about_as_long_as_a_kill_may_lose():
    for seconds, jobs_of in ((30 * 12.0, [[1] * 3, *[[4]] * 6, [3]]), (1.0, [[1] * 3 + [4] * 6 + [3]])):
        task = tasks.Task(None, {"status": "ok"}, np.arange(30), beats=4, seconds=seconds)
        assert [[len(call) for call in job] for job in task.calls()] == jobs_of


# Processes that end


def run_until_it_waits(arrays, folder, hooks):
    """Start a run whose second configuration waits for ever; returns it once the first is stored."""
    (hooks / "wait.hook").touch()
    process = start(arrays, folder)
    until(lambda: (list(hooks.glob("*.done")) and len(stored(folder)) == 2) or process.poll() is not None)
    next(hooks.glob("*.done")).unlink()
    return process


def test_a_run_shows_what_is_finished_and_is_resumed_after_ctrl_c_or_a_kill(arrays, tmp_path, hooks, capsys):
    process = run_until_it_waits(arrays, networks(arrays, tmp_path), hooks)
    first = stored(tmp_path)
    step5.main(options(arrays, tmp_path, "--report"))
    assert shown(tmp_path)["status"].tolist() == ["ok", "unfinished"]
    assert "another run writes to it" in refusal(step5.main, options(arrays, tmp_path), capsys)
    process.kill()
    process.communicate()
    (tmp_path / "fhe_summary.xlsx").unlink()
    process = run_until_it_waits(arrays, tmp_path, hooks)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert process.returncode == 130
    lines = [line for line in errors.splitlines() if line.startswith("fhe_experiments.py: ")]
    assert lines == [f"fhe_experiments.py: interrupted; {step5.RESUME}"]
    assert "Traceback" not in errors
    assert shown(tmp_path, "fhe_summary.xlsx", "summary")["status"].tolist() == ["ok", "unfinished"]
    assert start(arrays, tmp_path).wait() == 0
    assert (shown(tmp_path)["status"] == "ok").all()
    assert first.items() < stored(tmp_path).items()
    assert len(stored(tmp_path)) == 4


def test_a_worker_of_a_cluster_that_is_killed_costs_one_job(arrays, tmp_path, hooks, cluster):  # noqa: F811
    dask = cluster()
    for _ in range(2):
        dask.worker()
    (hooks / "kill.hook").touch()
    process = start(arrays, networks(arrays, tmp_path), "--scheduler", dask.address)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(list(hooks.glob("*.done"))) == 1
    assert (shown(tmp_path)["status"] == "ok").all()
    assert len(stored(tmp_path)) == 4


# The schemes of the pipeline, and what is refused


def test_networks_run_by_the_schemes_that_accept_them_in_processes_of_their_own(arrays, tmp_path):
    folder = networks(arrays, tmp_path, neurons=2)
    argv = options(arrays, folder, "--bits", "2", "3", "4", "--rounding-bits", "4", "--p-error", "0.01")
    del argv[argv.index("--scheme") : argv.index("--scheme") + 2]
    code = (
        "import sys, fhe_experiments as step5\n"
        "step5.SIMULATED_ROWS = 40\nstep5.main(sys.argv[1:])\n"
        "assert not {'concrete', 'torch'} & {name.split('.')[0] for name in sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stderr
    rows = shown(folder).set_index("q_bits")
    assert rows["reason"].isna().all()
    assert rows["scheme"].to_dict() == {2: "packed", 3: "tfhe", 4: "concrete-ml"}
    assert rows["quantization"].to_dict() == {2: "quantization-aware", 3: "quantization-aware", 4: "post-training"}
    assert rows["pbs"].to_dict() == {2: 0, 3: 2, 4: 3}
    assert rows.loc[2, "agreement"] == 1  # bootstraps may be off by a step
    assert rows["noisy_balanced_accuracy_test_set"].notna().tolist() == [False, True, False]
    assert rows["post_training_balanced_accuracy_test_set"].notna().tolist() == [True, True, False]
    positive = ["compile_time", "keygen_time", "encrypt_seconds", "run_seconds", "decrypt_seconds"]
    positive += ["evaluation_keys_MB", "input_ciphertext_kB", "output_ciphertext_kB"]
    assert (rows[positive] > 0).all(axis=None)


def test_of_configurations_that_cost_the_same_the_one_of_the_most_bits_is_exported():
    found = [(1.9e9, 0.971, 5), (2.870e9, 0.986, 5), (2.871e9, 0.980, 6), (2.871e9, 0.983, 6), (5e9, 0.987, 7)]
    facts = [{"complexity": c, "balanced_accuracy_validation": a, "q_bits": b} for c, a, b in found]
    assert [step5.best_for_export(facts, loss) for loss in (0.01, 0.02, 0.0005)] == [3, 0, 4]


def test_bad_input_is_refused_before_anything_is_written(arrays, tmp_path, capsys):
    common = ["--data-dir", arrays, "--workdir", tmp_path]

    def refused(*more):
        return refusal(step5.main, [*common, *more], capsys)

    assert "h5_onnx_converter.py" in refused()
    good = networks(arrays, tmp_path) / "small.onnx"
    assert "none.onnx: not found" in refused("--models", good, tmp_path / "none.onnx")
    assert "32 features" in refused("--models", small_network(tmp_path / "narrow.onnx", widths=(31, 2, 1)))
    assert "batch 99 does not exist" in refused("--models", good, "--start-batch", "99")
    values = {"--bits": "1", "--rounding-bits": "9", "--max-seconds": "nan", "--p-error": "1.5", "--scheme": "rot13"}
    for option, value in {**values, "--scheduler": "local:0"}.items():
        assert option in refused("--models", good, option, value)
    assert "same name" in refused("--models", good, good)
    for more in (["--dry-run"], ["--report"], ["--scheduler", "local:1"], ["--post-training"]):
        assert "--export" in refused("--models", good, "--export", tmp_path / "new", *more)
    assert "no result" in refused("--models", good, "--report")
    assert "is the --workdir itself" in refused("--models", good, "--beside", tmp_path)
    assert "fhe_steps.csv: " in refused("--models", good, "--beside", tmp_path / "quantized")
    assert "small.onnx: cannot be written" in refused("--models", good, "--workdir", good)
    trained = [quantized(load_dataset(arrays).train.X, bits, 0, 0.3) for bits in (2, 4)]
    content = add_networks(h5_bytes(MLP(random_layers((32, 3, 1)))), trained)
    (tmp_path / "small.h5").write_bytes(content)
    assert "small_4bits.onnx: not found, and step 3 trained it" in refused("--models", good, "--dry-run")
    (tmp_path / "quantized" / "small_2bits.onnx").write_bytes(good.read_bytes())
    assert "is not a valid quantized network" in refused("--models", good)
    assert not list(tmp_path.glob("*.xlsx")) + list(tmp_path.glob("*.sqlite"))
