"""Step 5, --export: the hospital's process and the server's, with nothing in common but the files that travel."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import refusal, small_network

import fhe_experiments as step5
import preprocess_mitbih as pre
from fhe_mlp import circuit, deployment, encrypted_beats, experiment


def call(folder, *argv):
    """Run encrypted_beats.py of one side in its own folder."""
    command = [sys.executable, "-I", "encrypted_beats.py", *map(str, argv)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def side(folder, *argv, status=0):
    """What `call` printed, of a refusal the one line."""
    done = call(folder, *argv)
    assert done.returncode == status, done.stderr
    if status:
        lines = [line for line in done.stderr.splitlines() if not re.search("CUDA|KeySetCache", line)]
        assert len(lines) == 1, lines
        return lines[0]
    return done.stdout


@pytest.fixture(scope="module")
def exported(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = small_network(folder / "small.onnx", widths=(32, 3, 1))
    common = ["--data-dir", str(arrays), "--workdir", str(folder), "--models", str(model), "--p-error", str(2.0**-40)]
    step5.main([*common, "--bits", "4", "--export", str(folder / "deployed")])
    small_network(folder / "other.onnx", widths=(32, 3, 1), seed=1)
    common[5] = str(folder / "other.onnx")
    step5.main([*common, "--bits", "4", "--export", str(folder / "other")])
    return folder


@pytest.fixture(scope="module")
def hospital(exported):
    """The client's folder after keys and encryption of the example beats, and the server's with what was sent."""
    client, server = exported / "deployed" / "client", exported / "deployed" / "server"
    side(client, "keys")
    side(client, "encrypt", "example_beats.csv")
    for name in ("encrypted_beats.zip", "evaluation_keys.zip"):
        shutil.copy(client / name, server)
    return client, server


def test_two_processes_decide_as_the_quantized_network_in_clear(exported, hospital, arrays):
    client, server = hospital
    side(server, "run", "encrypted_beats.zip", "evaluation_keys.zip")
    shutil.copy(server / "encrypted_answers.zip", client)
    answers = list(csv.DictReader(io.StringIO(side(client, "decrypt", "encrypted_answers.zip"))))
    data = pre.load_arrays(arrays)
    calibration = data["train"][0][np.random.default_rng(42).permutation(3000)[: step5.CALIBRATION_ROWS]]
    graph = circuit.without_sigmoid(circuit.load_network(exported / "small.onnx"))
    module = circuit.compile_network(graph, 4, calibration, circuit.Setting(step5.ROUNDING_BITS, 2.0**-40, 0.0))
    clear = circuit.outputs(module, data["train"][0][: len(answers)], "disable")
    assert len(answers) == 5
    assert [int(a["abnormal"]) for a in answers] == list((clear > 0).astype(int))
    for answer in answers:
        assert float(answer["probability"]) == pytest.approx(1 / (1 + np.exp(-float(answer["output"]))))


def test_the_servers_folder_never_holds_a_secret_key(exported, hospital):
    client, server = hospital
    assert {p.name for p in server.iterdir()} <= {
        "server.zip",
        "encrypted_beats.py",
        "README.md",
        "requirements.txt",
        "encrypted_beats.zip",
        "evaluation_keys.zip",
        "encrypted_answers.zip",
    }
    secret = list((client / "keys").rglob("secretKey_*"))
    assert secret
    sent = b"".join(path.read_bytes() for path in server.iterdir())
    with zipfile.ZipFile(server / "evaluation_keys.zip") as box:
        assert sorted(box.namelist()) == ["000000.bin", "header.json"]
        sent += box.read("000000.bin")
    for path in secret:
        content = path.read_bytes()
        middle = len(content) // 2
        assert content[middle : middle + 64] not in sent  # no 64 bytes of it, whatever is around them


def test_secret_keys_are_their_owners_only(hospital):
    client, _ = hospital
    paths = [client / "keys", *(client / "keys").rglob("*")]
    assert any(path.is_file() for path in paths)
    for path in paths:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_a_damaged_key_is_refused_and_left_as_it_is(hospital, tmp_path):
    client, _ = hospital
    copy = tmp_path / "keys"
    shutil.copytree(client / "keys", copy)
    key = next(copy.rglob("secretKey_0"))
    key.write_bytes(key.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = side(client, "--keys", copy, "encrypt", "example_beats.csv", "--output", tmp_path / "out.zip", status=2)
    assert "secretKey_0: is missing or damaged" in line
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out.zip").exists()


def test_keys_and_what_the_server_needs_are_made_together_or_not_at_all(hospital, tmp_path):
    client, _ = hospital
    (tmp_path / "file").write_text("")
    keys, target = tmp_path / "new", tmp_path / "file" / "evaluation_keys.zip"
    side(client, "--keys", keys, "keys", "--output", target, status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_travels_cannot_be_overwritten_by_its_own_result(hospital):
    client, _ = hospital
    before = (client / "example_beats.csv").read_bytes()
    done = call(client, "encrypt", "example_beats.csv", "--output", "example_beats.csv")
    assert done.returncode == 2
    assert "would overwrite" in done.stderr
    assert (client / "example_beats.csv").read_bytes() == before


def test_a_beats_file_as_excel_writes_it_is_read(hospital, tmp_path):
    client, _ = hospital
    (tmp_path / "beats.csv").write_bytes(b"\xef\xbb\xbf" + (client / "example_beats.csv").read_bytes())
    side(client, "encrypt", tmp_path / "beats.csv", "--output", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as box:
        assert len(box.namelist()) == 6


def test_an_answer_that_is_none_is_refused(hospital, tmp_path):
    client, _ = hospital
    with zipfile.ZipFile(client / "encrypted_beats.zip") as box:
        header = json.loads(box.read("header.json")) | {"kind": "encrypted answers", "count": 1}
    encrypted_beats.write_box(tmp_path / "answers.zip", header, [b"garbage"])
    done = call(client, "decrypt", tmp_path / "answers.zip")
    assert done.returncode == 2
    assert "answers.zip: holds no answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    encrypted_beats.write_box(tmp_path / "answers.zip", header, [])
    with pytest.raises(encrypted_beats.Refusal, match="nothing in it"):
        encrypted_beats.read_box(tmp_path / "answers.zip", "encrypted answers")


def test_wrong_keys_truncated_files_and_another_model_are_refused(exported, hospital, tmp_path):
    client, server = hospital
    again = tmp_path / "client"
    shutil.copytree(client, again, ignore=shutil.ignore_patterns("keys", "*.zip"))
    shutil.copy(client / "client.zip", again)
    assert "make them with" in side(again, "encrypt", "example_beats.csv", status=2)
    side(again, "keys")
    assert "is there already" in side(again, "keys", status=2)

    wrong = tmp_path / "server"
    shutil.copytree(server, wrong, ignore=shutil.ignore_patterns("encrypted_answers.zip"))
    shutil.copy(again / "evaluation_keys.zip", wrong)
    line = side(wrong, "run", "encrypted_beats.zip", "evaluation_keys.zip", status=2)
    assert "beats and evaluation keys must come from the same keys" in line
    shutil.copy(server / "evaluation_keys.zip", wrong)

    whole = (server / "encrypted_beats.zip").read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], whole[:10], b"", bytes(broken)):
        (wrong / "encrypted_beats.zip").write_bytes(content)
        line = side(wrong, "run", "encrypted_beats.zip", "evaluation_keys.zip", status=2)
        assert "encrypted_beats.zip: is truncated or damaged" in line
    (wrong / "encrypted_beats.zip").write_bytes(whole)
    line = side(wrong, "run", "evaluation_keys.zip", "evaluation_keys.zip", status=2)
    assert "holds evaluation keys" in line

    shutil.copy(exported / "other" / "server" / "server.zip", wrong)
    line = side(wrong, "run", "encrypted_beats.zip", "evaluation_keys.zip", status=2)
    assert "server.zip and client.zip must come from one export" in line
    assert not (wrong / "encrypted_answers.zip").exists()

    side(server, "run", "encrypted_beats.zip", "evaluation_keys.zip")
    line = side(again, "decrypt", server / "encrypted_answers.zip", status=2)
    assert "the keys it was encrypted with" in line


@pytest.mark.parametrize("edit", ["missing column", "nan", "text", "empty"])
def test_bad_beats_are_refused(hospital, tmp_path, edit):
    client, _ = hospital
    with (client / "example_beats.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if edit == "missing column":
        rows = [{k: v for k, v in row.items() if k != "ch0_R_peak"} for row in rows]
    elif edit == "empty":
        rows = []
    else:
        rows[1]["ch0_R_peak"] = "nan" if edit == "nan" else "x"
    with (tmp_path / "beats.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["ch0_R_peak"])
        writer.writeheader()
        writer.writerows(rows)
    before = (client / "encrypted_beats.zip").read_bytes()
    assert "beats.csv" in side(client, "encrypt", tmp_path / "beats.csv", status=2)
    assert (client / "encrypted_beats.zip").read_bytes() == before


def test_the_export_describes_itself_and_overwrites_nothing(exported, arrays, capsys):
    deployed = exported / "deployed"
    model = json.loads((deployed / "client" / "model.json").read_text())
    assert [feature["name"] for feature in model["features"]] == [feature["name"] for feature in pre.FEATURES]
    assert model["security_bits"] == 128
    assert model["scaler"] == pre.load_scaler(arrays)
    readme = (deployed / "README.md").read_text()
    for word in ("128 bits", "p_error", "python encrypted_beats.py run", "readable by its owner only"):
        assert word in readme
    common = ["--data-dir", arrays, "--workdir", exported, "--models", exported / "small.onnx", "--bits", "4"]
    before = {p: p.read_bytes() for p in deployed.rglob("*") if p.is_file()}
    assert "is there already" in refusal(step5.main, [*common, "--export", deployed], capsys)
    assert {p: p.read_bytes() for p in deployed.rglob("*") if p.is_file()} == before


def test_of_equally_dear_bit_widths_the_most_accurate_is_chosen(monkeypatch):
    prices = {2: (1.9e9, 0.971), 3: (2.870e9, 0.980), 4: (2.871e9, 0.986), 5: (5e9, 0.987)}

    class Module:
        def __init__(self, bits):
            self.bits = bits
            self.fhe_circuit = type("Circuit", (), {"complexity": prices[bits][0]})

    monkeypatch.setattr(deployment, "compile_job", lambda job: Module(job.bits))
    monkeypatch.setattr(
        deployment, "accuracies", lambda module, *_: {"accuracy_clear_validation": prices[module.bits][1]}
    )
    jobs = [experiment.Job("m", bits, b"", None, None, None, {}) for bits in prices]
    assert deployment.choose(jobs, {}, 0.01).bits == 4


def test_example_beats_scale_back_to_the_arrays(exported, arrays):
    with (exported / "deployed" / "client" / "example_beats.csv").open(newline="") as file:
        raw = np.array([[float(v) for v in row.values()] for row in csv.DictReader(file)])
    scaled = pre.apply_scaler(raw, pre.load_scaler(arrays))
    np.testing.assert_allclose(scaled, pre.load_arrays(arrays)["train"][0][: len(raw)], atol=1e-5)
