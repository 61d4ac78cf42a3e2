"""The repository as a newcomer meets it: shipped data, help texts, imports, make, another scheme of encryption."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, small_network
from test_encrypted import random_network

import preprocess_mitbih
from fhe_mlp.dataset import SPLITS, array_name, load_dataset
from fhe_mlp.quantized import to_onnx

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FLOORS = (  # of fhe_mlp/, each imports from those before it
    {"cli"}, {"workers"}, {"scaling"}, {"ecg"}, {"dataset"}, {"networks"}, {"quantized"}, {"encrypted"},
    {"experiments", "deployment"},
)  # fmt: skip
ASIDE = [["encrypted", "post_training"]]  # a module of its own, which no export has
HEAVY = ("tensorflow", "tf_keras", "concrete", "onnx", "matplotlib", "wfdb", "sklearn", "distributed")
MITDB = Path(os.environ.get("MITDB_DIR", ROOT / "data" / "mitdb"))


def test_shipped_arrays_are_the_default_data_set():
    data, beats = load_dataset(ROOT / "data"), pd.read_csv(ROOT / "data" / "beats.csv", dtype=str)
    assert [len(part.y) for part in data.parts.values()] == [13_522, 3_381, 7_245] and len(beats) == 24_148
    assert (data.patients, data.leads["ch0"]) == ("known patients", ["MLII"])
    assert not beats.duplicated(["record", "sample"]).any() and (beats["aami"] != "N").sum() == 12_074
    assert (beats["record"].nunique(), beats["patient"].nunique()) == (48, 47)  # 201 and 202 are one person


@pytest.mark.skipif(not (MITDB / "100.dat").exists(), reason="the MIT-BIH records are not here")
def test_shipped_arrays_come_from_the_records(tmp_path):
    preprocess_mitbih.main(["--records-dir", str(MITDB), "--data-dir", str(tmp_path), "--no-download"])
    assert (tmp_path / "beats.csv").read_text() == (ROOT / "data" / "beats.csv").read_text()
    for name in (array_name(split, kind) for split in SPLITS for kind in "Xy"):
        made, shipped = np.load(tmp_path / name), np.load(ROOT / "data" / name)
        assert np.isclose(made, shipped, atol=1e-5, rtol=0).mean() > 0.999
        np.testing.assert_allclose(made, shipped, atol=1e-4, rtol=0)  # float32 sums; 6e-5 on another processor


def python(*argv, cwd=ROOT, status=0, **options):
    """Output of a Python process in a folder, of a refusal its one line."""
    command = [sys.executable, *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default_once_and_importing_does_no_work(script, tmp_path):
    code = f"import sys, {script}; print(set(sys.modules) & set({HEAVY})); {script}.main(['--help'])"
    loaded, shown = python("-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}).split("\n", 1)
    options = re.split(r"\n  (?=-)", shown)[2:]
    assert f"python {script}" in shown and {"--data-dir", "--workdir", "--seed"} <= {one.split()[0] for one in options}
    assert all(one.count("(default:") <= 1 for one in options) and "(default: 42)" in shown
    assert loaded == "set()" and not list(tmp_path.iterdir())


def test_a_refusal_on_the_command_line_is_one_line_and_status_2(tmp_path):
    line = python("MLP_model_0.py", "--data-dir", tmp_path, status=2)
    assert "Arryth_MITBIH_train_X.npy: not found; make it with: python preprocess_mitbih.py" in line
    assert line.count("\n") == 1


def test_tensorflow_starts_silently_and_what_comes_later_is_shown():
    start = "import os, sys; from fhe_mlp import networks; networks.start_tensorflow(1)"
    assert python("-c", f"{start}; os.write(2, b'a warning\\n'); sys.exit(1)", status=1) == "a warning\n"


def imported(path):
    """Names, divided at their dots, of the modules and scripts that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parent = getattr(node, "module", None)
            assert not getattr(node, "level", 0), f"{path} has relative imports"
            names = [parent] if parent not in (None, "fhe_mlp") else [alias.name for alias in node.names]
            yield from (["fhe_mlp", name] if parent == "fhe_mlp" else name.split(".") for name in names)


def test_imports_go_one_way_and_enter_a_package_by_its_front_door():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert {path.stem for path in (ROOT / "fhe_mlp").glob("[!_]*")} == set(floor)
    for path in [*ROOT.glob("*.py"), *(ROOT / "fhe_mlp").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        own = path.relative_to(ROOT / "fhe_mlp").parts[0].removesuffix(".py") if "fhe_mlp" in path.parts else None
        for first, *inner in imported(path):
            assert first not in SCRIPTS or path.parent.name == "benchmarks", f"{path} imports {first}"
            if first == "fhe_mlp" and inner[0] != own:
                assert own is None or floor[inner[0]] < floor[own], f"{path} imports {inner[0]}"
                assert len(inner) == 1 or inner in ASIDE, f"{path} reaches past {inner[0]}"


def test_every_installed_version_is_pinned():
    pins = (ROOT / "constraints.txt").read_text()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name = re.match(r"([\w-]*)", line)[1]
        assert not name or re.search(rf"^{name}==", pins, re.M), line


PRODUCTS = ["MLP_model_0.h5", "tf_pruned_model.h5", "dynamic_pruning_results.xlsx", ".onnx.stamp", ".fhe.stamp"]
STEPS = ["MLP_model_0.py", "TF_pruning.py", "dynamic_pruning_eval.py", "h5_onnx_converter.py", "fhe_experiments.py"]


def test_make_reruns_the_edited_stage_and_what_follows_and_nothing_else(tmp_path):
    shutil.copytree(ROOT / "fhe_mlp", tmp_path / "fhe_mlp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.txt", "constraints.txt", *(f"{script}.py" for script in SCRIPTS)):
        shutil.copy(ROOT / name, tmp_path)
    for age, name in enumerate(["data/dataset.json", ".venv/.ready", *PRODUCTS]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (2e9 + age, 2e9 + age))

    def would_run(*edited, target="all", demo="patients"):
        argv = ["make", "-n", target, f"DEMO={demo}", *(word for name in edited for word in ("-W", name))]
        shown = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        return [line.split()[1] for line in shown.stdout.splitlines() if line.startswith(".venv/bin/python ")]

    assert would_run() == []
    for first, files in (
        (0, ("data/dataset.json", "dataset.py", "scaling.py", "networks/mlp.py", "networks/fitting.py")),
        (2, ("networks/pruning.py", "quantized/network.py", "quantized/training.py", "quantized/selection.py")),
        (4, ("workers.py", "encrypted/tfhe.py", "encrypted/packed.py", "experiments/report.py")),
        (5, ("cli.py", "ecg/physionet.py", "ecg/features.py", "deployment/client.py")),
    ):
        for name in files:
            assert would_run(name if name.startswith("data/") else f"fhe_mlp/{name}") == STEPS[first:], name
    for number, step in enumerate(STEPS):
        assert would_run(step) == STEPS[number:]
    assert would_run("preprocess_mitbih.py") == []
    assert would_run(target="patients") == ["preprocess_mitbih.py", *STEPS]
    assert would_run(target="packed") == STEPS
    argv = ["make", "-n", "demo", "MITDB_DIR=/my dir/mitdb"]
    assert (
        '"/my dir/mitdb/233"' in subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    )
    demo = ["fhe_experiments.py", "benchmarks/compare.py"]
    assert would_run(target="demo") == ["preprocess_mitbih.py", *STEPS, *demo]
    assert would_run(target="demo", demo="patients-packed")[-7:] == [*STEPS, *demo]


def test_another_scheme_is_one_file_that_step_5_export_client_and_server_run(arrays, tmp_path):
    shutil.copytree(ROOT / "fhe_mlp", tmp_path / "fhe_mlp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "fhe_experiments.py", tmp_path)
    shutil.copy(ROOT / "tests" / "schemes" / "cleartext.py", tmp_path / "fhe_mlp" / "encrypted")
    small_network(tmp_path / "x.onnx", (32, 1))
    (tmp_path / "quantized").mkdir()
    network = random_network(0)
    (tmp_path / "quantized" / "x_4bits.onnx").write_bytes(to_onnx(network).SerializeToString())
    step5 = ("fhe_experiments.py", "--data-dir", arrays, "--models", "x.onnx", "--bits", "4", "--scheme", "cleartext")
    python(*step5, "--samples", "3", cwd=tmp_path)
    row = pd.read_excel(tmp_path / "results_batch_0.xlsx").iloc[0]
    assert (row["scheme"], row["status"], row["decisions_equal_clear"]) == ("cleartext", "ok", 3)
    python(*step5, "--export", "deployed", cwd=tmp_path)
    hospital, server = tmp_path / "deployed" / "client", tmp_path / "deployed" / "server"
    python("client.py", "keys", cwd=hospital)
    python("client.py", "encrypt", "example_beats.csv", cwd=hospital)
    python("server.py", hospital / "encrypted_beats.zip", hospital / "evaluation_keys.zip", cwd=server)
    answers = pd.read_csv(StringIO(python("client.py", "decrypt", server / "encrypted_answers.zip", cwd=hospital)))
    np.testing.assert_allclose(answers["output"], network.logits(load_dataset(arrays).train.X[: len(answers)]))
    assert len(answers) == 5
