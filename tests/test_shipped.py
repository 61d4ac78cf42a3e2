"""The repository as a newcomer meets it: shipped data, help texts, imports that do no work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import preprocess_mitbih as pre
from fhe_mlp.arrays import SPLITS, expected_leads, load_arrays

SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))
MODULES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "fhe_mlp").rglob("*.py"))
MITDB = Path(os.environ.get("MITDB_DIR", ROOT / "data" / "mitdb"))


def test_shipped_arrays_are_the_default_data_set():
    data = load_arrays(ROOT / "data")
    beats = pd.read_csv(ROOT / "data" / "beats.csv", dtype=str)
    assert sum(len(y) for _, y in data.values()) == len(beats) == 24_148
    assert expected_leads(ROOT / "data")["ch0"] == ["MLII"]
    assert not beats.duplicated(["record", "sample"]).any()
    assert beats["record"].nunique() == 48
    assert (beats["aami"] != "N").sum() == 12_074
    assert {s: len(y) for s, (_, y) in data.items()} == {"train": 13_522, "val": 3_381, "test": 7_245}


@pytest.mark.skipif(not (MITDB / "100.dat").exists(), reason="the MIT-BIH records are not here")
def test_shipped_arrays_come_from_the_records(tmp_path):
    pre.main(["--records-dir", str(MITDB), "--data-dir", str(tmp_path), "--no-download"])
    assert (tmp_path / "beats.csv").read_text() == (ROOT / "data" / "beats.csv").read_text()
    for split in SPLITS:
        for kind in "Xy":
            name = f"Arryth_MITBIH_{split}_{kind}.npy"
            made, shipped = np.load(tmp_path / name), np.load(ROOT / "data" / name)
            assert np.isclose(made, shipped, atol=1e-5, rtol=0).mean() > 0.999
            np.testing.assert_allclose(made, shipped, atol=1e-4, rtol=0)  # float32 sums; 6e-5 on another processor


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default_and_importing_does_no_work(script, tmp_path):
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stderr == ""
    for option in ("--data-dir", "--workdir", "--seed", "default: 42", f"python {script}"):
        assert option in shown.stdout
    code = f"import sys, {Path(script).stem}; assert 'tensorflow' not in sys.modules and 'concrete' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert not list(tmp_path.iterdir())


def test_a_refusal_on_the_command_line_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "MLP_model_0.py", "--data-dir", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Arryth_MITBIH_train_X.npy: not found; make it with: python preprocess_mitbih.py" in done.stderr


def test_tensorflow_starts_silently_but_its_warnings_stay(tmp_path):
    code = (
        "import os, sys\nfrom fhe_mlp import networks as p\n"
        "p.start_tensorflow(1)\n"
        "with p.quiet_tensorflow():\n"
        "    os.write(2, b'I0000 00:00 noise.cc:1] start-up\\n')\n"
        "    os.write(2, b'W tensorflow/core/x.cc:1] a real warning\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "W tensorflow/core/x.cc:1] a real warning\n"


PRODUCTS = ["MLP_model_0.h5", "tf_pruned_model.h5", "dynamic_pruning_results.xlsx", ".onnx.stamp", ".fhe.stamp"]
STEPS = ["MLP_model_0.py", "TF_pruning.py", "dynamic_pruning_eval.py", "h5_onnx_converter.py", "fhe_experiments.py"]


def test_make_reruns_the_edited_stage_and_what_follows_and_nothing_else(tmp_path):
    others = ("Makefile", "requirements.txt", "constraints.txt", "fhe_mlp/pbs_complexity.csv")
    for name in (*others, *SCRIPTS, *MODULES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    for age, name in enumerate([".venv/.ready", *PRODUCTS]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (2e9 + age, 2e9 + age))

    def would_run(*edited, target="all", demo="patients"):
        argv = ["make", "-n", target, f"DEMO={demo}", *(word for name in edited for word in ("-W", name))]
        shown = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        return [line.split()[1] for line in shown.stdout.splitlines() if line.startswith(".venv/bin/python ")]

    assert would_run() == []
    for number, step in enumerate(STEPS):
        assert would_run(step) == STEPS[number:]
    for numbers in ("data/dataset.json", "fhe_mlp/arrays.py", "fhe_mlp/networks.py"):
        assert would_run(numbers) == STEPS
    for numbers in ("candidates", "quantized", "qat", "tables", "neuron_removal"):
        assert would_run(f"fhe_mlp/{numbers}.py") == STEPS[2:]
    assert would_run("fhe_mlp/graphs.py") == STEPS[3:]
    assert would_run(target="patients") == ["preprocess_mitbih.py", *STEPS]
    assert would_run(target="packed") == STEPS
    shown = would_run(target="demo")
    assert shown == ["preprocess_mitbih.py", *STEPS, "fhe_experiments.py", "tests/compare.py"]
    shown = would_run(target="demo", demo="patients-packed")
    assert shown[-7:] == [*STEPS, "fhe_experiments.py", "tests/compare.py"]
    for looks in ("report", "steps", "store", "cluster", "circuit", "configuration", "packed", "packing", "plan"):
        assert would_run(f"fhe_mlp/{looks}.py") == STEPS[4:]  # which computes only what its database does not have
    for nothing in ("cli", "physionet", "ecg_features", "published_features", "records"):
        assert would_run(f"fhe_mlp/{nothing}.py") == []
    assert would_run("preprocess_mitbih.py") == []


def test_the_library_imports_no_script_and_no_step_imports_another():
    stems = "|".join(Path(name).stem for name in SCRIPTS)
    for name in [*MODULES, *SCRIPTS]:
        assert not re.search(rf"^\s*(from|import) ({stems})\b", (ROOT / name).read_text(), re.M), name


def test_every_installed_version_is_pinned():
    pins = (ROOT / "constraints.txt").read_text()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name = re.match(r"([\w-]*)", line)[1]
        assert not name or re.search(rf"^{name}==", pins, re.M), line
