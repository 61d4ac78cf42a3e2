"""A network without neurons: one packed product, in step 5 and in the export."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct
import sys

import numpy as np
import pytest
from conftest import ROOT, call, describe, exchange

from fhe_mlp import circuit, deployment, expansion, packing
from fhe_mlp.configuration import Configuration, Setting
from fhe_mlp.graphs import to_onnx
from fhe_mlp.quantized import LastLayer, QuantizedNetwork

sys.path.insert(0, str(ROOT / "fhe_mlp" / "deployment"))
sys.path.append(str(ROOT / "fhe_mlp"))  # of which an export has packing.py
import boxes

RNG = np.random.default_rng(0)
ROWS = np.clip(RNG.normal(size=(300, 32)), -3, 3).astype(np.float32)
MAP = "products"
X = expansion.expand_scaled(ROWS, MAP, 3.0)
NOISE = 0.017  # of an output, in logits: the standard deviation, as measured


@pytest.fixture(scope="module")
def module():
    """As step 5 has it."""
    linear = RNG.integers(-63, 64, X.shape[1]).astype(np.int32)
    network = QuantizedNetwork(7, 6, 2.0**-6, 7, 3 / 63, (), LastLayer(np.ones(0, np.int32), 1.0, linear, 0.01, 0.25))
    graph = to_onnx(network, 14).SerializeToString()
    one = Configuration("m", 7, graph, 6, 2.0**-6, True, Setting(6, 2.0**-6, 0.0), X[:1], {})
    facts, found = circuit.cost(one)
    assert (facts["status"], facts["pbs"], facts["complexity"]) == ("ok", 0, 0)
    assert not facts.keys() & {"p_error", "p_any_pbs_off", "rounding_bits"}  # which only bootstraps have
    return found, facts, network


@pytest.fixture(scope="module")
def sides(module, tmp_path_factory):
    """The client's folder, the server's and the example rows, after all five commands."""
    folder = tmp_path_factory.mktemp("packed") / "deployed"
    clear = circuit.outputs(module[0], X, "disable")
    examples = np.argsort(clear)[[0, 150, -1, 1]]
    deployment.export(module[0], {**describe(32), "expand": MAP}, ROWS[examples], folder)
    hospital, server = folder / "client", folder / "server"
    exchange(hospital, server)
    return hospital, server, clear[examples]


def test_encrypted_outputs_are_those_in_cleartext(module):
    found, facts, network = module
    assert circuit.make_keys(found) > 0
    largest = 3 * np.sign(network.last.linear[None]).astype(np.float32)  # of all sums, and of all below 0
    rows = np.vstack([X[:8], largest, -largest])
    for x, clear in zip(rows, network.run(rows)[0]):
        run = circuit.run_encrypted(found, x)
        assert run["output_fhe"] == pytest.approx(clear, abs=8 * NOISE)
        assert 6_000 < run["input_bytes"] < 7_000 and 5_000 < run["output_bytes"] < 6_000
    keys = found.keys[0].get_serialized_evaluation_keys()
    assert len(keys) == pytest.approx(1e6 * facts["evaluation_keys_MB"], rel=1e-5)


def test_client_and_server_decide_as_in_cleartext_without_concrete(sides):
    hospital, server, clear = sides
    answers = list(csv.DictReader(io.StringIO(call(hospital, "client.py", "decrypt", "encrypted_answers.zip"))))
    np.testing.assert_allclose([float(answer["output"]) for answer in answers], clear, atol=0.1)
    assert [int(answer["abnormal"]) for answer in answers] == list((clear > 0).astype(int))
    secret = (hospital / "keys" / "secret_key").read_bytes()
    for path in server.rglob("*"):
        assert not path.is_file() or secret[100:164] not in path.read_bytes()
    for side in (hospital, server):
        assert "concrete-ml-extensions==" in (side / "requirements.txt").read_text()
        assert "concrete-ml==" not in (side / "requirements.txt").read_text()
    assert "\npandas==" in (hospital / "requirements.txt").read_text()


def test_dask_workers_compute_the_same(sides, tmp_path):
    from distributed import LocalCluster

    options = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    with LocalCluster(n_workers=1, **options) as cluster:
        argv = ("encrypted_beats.zip", "evaluation_keys.zip", "--output", tmp_path / "answers.zip")
        call(sides[1], "server.py", *argv, "--scheduler", cluster.scheduler_address)
    found = call(sides[0], "client.py", "decrypt", tmp_path / "answers.zip")
    outputs = [float(answer["output"]) for answer in csv.DictReader(io.StringIO(found))]
    np.testing.assert_allclose(outputs, sides[2], atol=0.1)


@pytest.mark.parametrize("kind", packing.KINDS[1:])
def test_a_payload_of_another_layout_never_gets_to_the_library(sides, tmp_path, kind):
    """Which would take the memory that it claims, or end the process."""
    hospital, server = sides[:2]
    linear = packing.read_description((server / "server.zip").read_bytes())
    is_whole = boxes.whole(linear, kind)
    header, payloads = boxes.read_box(server / f"{kind.replace(' ', '_')}.zip", kind, is_whole)
    first, *_ = payloads
    names = {name: header[name] for name in boxes.NAMES}
    places = [int(start) for start in linear["layouts"][kind]["fixed"]]
    assert places[0] == 0 and len(places) > 1
    for damaged in (first[:-1], first + b"\0", *(first[:at] + b"\xff" + first[at + 1 :] for at in places)):
        boxes.write_box(tmp_path / "box.zip", kind, names, [first, damaged])
        with pytest.raises(boxes.InputError, match="a payload is not whole"):
            boxes.read_box(tmp_path / "box.zip", kind, is_whole)
    if kind == "encrypted beats":
        argv = ("server.py", tmp_path / "box.zip", "evaluation_keys.zip", "--output", tmp_path / "out.zip")
        line = call(server, *argv, status=2)
    else:
        line = call(hospital, "client.py", "decrypt", tmp_path / "box.zip", status=2)
    assert "a payload is not whole" in line


def test_boxes_of_a_network_with_bootstraps_are_called_of_another_model(sides, tmp_path):
    hospital, server = sides[:2]
    names = {"model": "0" * 64, "key": "0", "beats": "0"}
    for kind in packing.KINDS:
        boxes.write_box(tmp_path / f"{kind}.zip", kind, names, [struct.pack("<IIQ", 0, 1, 7)])
    beats, keys = tmp_path / "encrypted beats.zip", tmp_path / "evaluation keys.zip"
    for argv in ((beats, "evaluation_keys.zip"), ("encrypted_beats.zip", keys)):
        line = call(server, "server.py", *argv, "--output", tmp_path / "out.zip", status=2)
        assert "must come from one export" in line
    line = call(hospital, "client.py", "decrypt", tmp_path / "encrypted answers.zip", status=2)
    assert "must come from one export" in line


def test_a_description_of_another_version_and_a_damaged_network_are_refused(sides, tmp_path):
    hospital, server = (shutil.copytree(side, tmp_path / side.name) for side in sides[:2])
    model = json.loads((hospital / "model.json").read_text())
    (hospital / "model.json").write_text(json.dumps({name: model[name] for name in model if name != "linear"}))
    line = call(hospital, "client.py", "encrypt", "example_beats.csv", status=2)
    assert "model.json: cannot be used (it has no linear" in line
    (server / "server.zip").write_bytes((server / "server.zip").read_bytes()[:500])
    line = call(server, "server.py", "encrypted_beats.zip", "evaluation_keys.zip", status=2)
    assert "server.zip: cannot be used" in line and "restore it" in line


def test_a_layout_is_what_all_values_of_a_kind_share():
    one, other = (b"8 bytes." + data + b"the end." for data in (b"abcdefgh" + b"half equ", b"ABCDEFGH" + b"HALF equ"))
    found = packing.layout([one, one[:8] + other[8:], other])
    assert found == {"bytes": 32, "fixed": {"0": b"8 bytes.".hex(), "24": b"the end.".hex()}}
    assert packing.has_layout(other, found) and not packing.has_layout(other[:-1] + b"!", found)
