"""The export: a hospital's process and a server's, which have nothing in common but the files that travel."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import wfdb
from conftest import ROOT, call, describe, exchange, make_record, small_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fhe_mlp import circuit, deployment
from fhe_mlp.arrays import apply_scaler
from fhe_mlp.cli import InputError, sha256
from fhe_mlp.configuration import Setting, load_configuration, quantized_path
from fhe_mlp.graphs import to_onnx
from fhe_mlp.quantized import HiddenLayer, LastLayer, QuantizedNetwork, signed_bits

sys.path.insert(0, str(ROOT / "fhe_mlp" / "deployment"))
sys.path.append(str(ROOT / "fhe_mlp"))  # of which an export has some files
import answers
import boxes
import client
import compute
import csvfiles
import server as server_side

SETTING = Setting(4, 2.0**-40, 0.0)
RNG = np.random.default_rng(0)
X = np.clip(RNG.normal(size=(300, 32)), -3, 3).astype(np.float32)
NAMES = ["a", "b", "c"]  # of the features in the tests of the .csv reader


def table_network():
    """Three random tables, of slopes under an entry a step, and a linear path."""
    weights = RNG.integers(-7, 8, (32, 3)).astype(np.int32)
    table = np.cumsum(RNG.integers(0, 2, (16, 3)), axis=0, dtype=np.int32) - 4
    sums = np.clip(np.rint(X / 0.2), -15, 15) @ weights
    hidden = HiddenLayer(weights, np.zeros(3, np.int32), table, 0.5, signed_bits(sums.astype(int)))
    last = LastLayer(np.ones(3, np.int32), 1.0, RNG.integers(-7, 8, 32).astype(np.int32), 0.1, 0.0)
    return QuantizedNetwork(4, 4, SETTING.p_error, 5, 0.2, (hidden,), last)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of two exports, of 5 and of 32 features, and of the latter the network and the example rows."""
    folder = tmp_path_factory.mktemp("export")
    for name, features in (("other", 5), ("deployed", 32)):
        path = small_network(folder / f"{name}.onnx", widths=(features, 3, 1))
        if features == 32:  # one of tables with a linear path: an answer has two parts
            quantized = quantized_path(path, 4)
            quantized.parent.mkdir()
            onnx.save(to_onnx(table_network(), 14), quantized)
        rows = X[:, :features]
        configuration = load_configuration(path, 4, SETTING, {"train": (rows, None)}, rows, {})
        module = circuit.cost(configuration)[1]
        order = np.argsort(circuit.outputs(module, rows, "disable"))
        examples = rows[order[[0, -1, 1, 2, -2]]]  # far from the threshold, which the noise of rounding may cross
        deployment.export(module, describe(features), examples, folder / name)
    return folder, module, examples


@pytest.fixture(scope="module")
def sides(exported):
    """The client's folder after keys and encryption of the example beats, and the server's with what was sent."""
    hospital, server = exported[0] / "deployed" / "client", exported[0] / "deployed" / "server"
    exchange(hospital, server)
    return hospital, server


def content(folder):
    """Bytes of each file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_two_processes_decide_as_the_network_in_cleartext(exported, sides):
    answers = list(csv.DictReader(io.StringIO(call(sides[0], "client.py", "decrypt", "encrypted_answers.zip"))))
    clear = circuit.outputs(exported[1], exported[2], "disable")
    assert [int(answer["abnormal"]) for answer in answers] == list((clear > 0).astype(int)) == [0, 1, 0, 0, 1]
    for answer in answers:
        assert float(answer["probability"]) == pytest.approx(1 / (1 + np.exp(-float(answer["output"]))))


def test_the_servers_folder_never_holds_a_secret_key(sides):
    hospital, server = sides
    sent = b"".join(content(server).values())
    secret = list((hospital / "keys").rglob("secretKey_*"))
    assert secret
    for path in secret:
        key = path.read_bytes()
        assert key[len(key) // 2 :][:64] not in sent  # no 64 bytes of it, whatever is around them


def test_secret_keys_are_readable_by_their_owner_only(sides):
    for path in (sides[0] / "keys", *(sides[0] / "keys").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_damaged_key_is_refused_and_left_alone(sides, tmp_path):
    shutil.copytree(sides[0] / "keys", tmp_path / "keys")
    key = next((tmp_path / "keys").rglob("secretKey_0"))
    key.write_bytes(key.read_bytes()[:1000])
    before = content(tmp_path)
    argv = ("encrypt", "example_beats.csv", "--keys", tmp_path / "keys", "--output", tmp_path / "out.zip")
    assert "secretKey_0: is missing or damaged" in call(sides[0], "client.py", *argv, status=2)
    assert content(tmp_path) == before


def test_secret_and_evaluation_keys_are_made_together_or_not_at_all(sides, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ("keys", "--keys", tmp_path / "new", "--output", tmp_path / "file" / "evaluation_keys.zip")
    call(sides[0], "client.py", *argv, status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "is there already" in call(sides[0], "client.py", "keys", status=2)


def test_no_output_overwrites_what_a_command_reads(sides):
    hospital, server = sides
    before = content(hospital) | content(server)
    for output in ("example_beats.csv", "model.json", "keys", "keys/about.json", "beats.json"):
        line = call(hospital, "client.py", "encrypt", "example_beats.csv", "--output", output, status=2)
        assert "would overwrite" in line or "not an earlier output" in line
    assert "is no recording" in call(hospital, "client.py", "encrypt", "example_beats.csv", "--minutes", "5", status=2)
    for output in ("encrypted_beats.zip", "server.zip"):
        argv = ("encrypted_beats.zip", "evaluation_keys.zip", "--output", output)
        assert "would overwrite" in call(server, "server.py", *argv, status=2)
    assert content(hospital) | content(server) == before


def test_wrong_keys_truncated_files_and_another_model_are_refused(exported, sides, tmp_path):
    hospital, server = sides
    other = exported[0] / "other"
    assert "make them with" in call(other / "client", "client.py", "encrypt", "example_beats.csv", status=2)
    argv = ("encrypted_beats.zip", "--keys", tmp_path / "keys", "--output", tmp_path / "evaluation_keys.zip")
    call(hospital, "client.py", "keys", *argv[1:])
    argv = ("encrypted_beats.zip", tmp_path / "evaluation_keys.zip", "--output", tmp_path / "answers.zip")
    assert "must come from the same keys" in call(server, "server.py", *argv, status=2)
    argv = ("decrypt", "encrypted_answers.zip", "--keys", tmp_path / "keys")
    assert "the keys it was encrypted with" in call(hospital, "client.py", *argv, status=2)

    whole = (server / "encrypted_beats.zip").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], whole[:10], b"", flipped):
        (tmp_path / "beats.zip").write_bytes(damaged)
        argv = (tmp_path / "beats.zip", "evaluation_keys.zip", "--output", tmp_path / "answers.zip")
        assert "beats.zip: is truncated or damaged" in call(server, "server.py", *argv, status=2)
    argv = ("evaluation_keys.zip", "evaluation_keys.zip", "--output", tmp_path / "answers.zip")
    assert "holds 'evaluation keys'" in call(server, "server.py", *argv, status=2)
    argv = (server / "encrypted_beats.zip", server / "evaluation_keys.zip", "--output", tmp_path / "answers.zip")
    assert "must come from one export" in call(other / "server", "server.py", *argv, status=2)
    assert not (tmp_path / "answers.zip").exists()


def message(content):
    """A payload that is as long as it says, like those of Concrete: one segment of whole words."""
    content += bytes(-len(content) % 8)
    return struct.pack("<II", 0, len(content) // 8) + content


def test_a_payload_that_concrete_cannot_use_is_refused_in_one_line(sides, tmp_path):
    hospital, server = sides
    header, payloads = boxes.read_box(hospital / "encrypted_beats.zip", "encrypted beats")
    beats = list(payloads)
    beats[2] = message(b"no ciphertext")
    for kind, payload in (("encrypted beats", beats), ("encrypted answers", [beats[2]] * 2)):
        boxes.write_box(tmp_path / f"{kind}.zip", kind, {name: header[name] for name in boxes.NAMES}, payload)
    argv = (tmp_path / "encrypted beats.zip", "evaluation_keys.zip", "--output", tmp_path / "out.zip")
    assert "beat 3 cannot be computed with" in call(server, "server.py", *argv, status=2)
    line = call(hospital, "client.py", "decrypt", tmp_path / "encrypted answers.zip", status=2)
    assert "encrypted answers.zip: holds no answer" in line
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize("word", range(4))
def test_a_payload_that_claims_more_bytes_than_it_has_never_gets_to_concrete(sides, tmp_path, word):
    """Whose reader would take minutes to refuse it."""
    header, payloads = boxes.read_box(sides[0] / "encrypted_beats.zip", "encrypted beats")
    first, *others = payloads
    lying = bytearray(first)
    lying[4 * word + 2] ^= 1
    assert boxes.is_message(first)
    boxes.write_box(tmp_path / "box.zip", "k", {name: header[name] for name in boxes.NAMES}, [*others, bytes(lying)])
    if word == 3:  # which only fills up the table of two segments
        assert len(list(boxes.read_box(tmp_path / "box.zip", "k")[1])) == 5
    else:
        with pytest.raises(boxes.InputError, match="a payload is not whole"):
            boxes.read_box(tmp_path / "box.zip", "k")


def lying_box(path, header, entries=(b"x",), compression=zipfile.ZIP_STORED, claim=None, stored=None, names=()):
    """Write a box with a header that may be anything, with `claim` a size in the directory that is not true.

    stored: in place of what a box holds of `entries`; names: of further entries.
    """
    with zipfile.ZipFile(path, "w", compression) as box:
        box.writestr("header.json", header if isinstance(header, str) else json.dumps(header))
        for name in names:
            box.writestr(name, b"")
        frames = b"".join(boxes.framed(message(entry)) for entry in entries)
        box.writestr("payloads.bin", frames if stored is None else stored)
        if claim:
            box.filelist[-1].file_size = box.filelist[-1].compress_size = claim
    return path


FAKE = """
import os, signal, cli, compute, server
append, appends, answers = server.append, {appends}, {answers}  # zero: the last thing a process does

def live_or_die(left):
    left.pop() or os.kill(os.getpid(), signal.SIGKILL)

def append_counted(part, entry):
    place = append(part, entry)
    live_or_die(appends)
    return place

def echo(*arguments):
    live_or_die(answers)
    return (arguments[-1],)

server.append, compute.answer = append_counted, echo
cli.run_and_leave(server.main, "run the same command again")
"""
ALWAYS = [1] * 9


@pytest.mark.parametrize(
    ("appends", "answers", "status"), [([0, 1, 1], ALWAYS, -signal.SIGKILL), (ALWAYS, [0, 1, 1], 2)]
)
def test_after_a_kill_of_server_or_process_only_the_beat_in_work_is_lost(sides, tmp_path, appends, answers, status):
    """The first entry of a .part file is no answer, so that both leave two answers."""

    def serve(**left):
        argv = ("encrypted_beats.zip", "evaluation_keys.zip", "--output", tmp_path / "answers.zip", "--processes", "1")
        command = [sys.executable, "-c", FAKE.format(**left), *map(str, argv)]
        return subprocess.run(command, cwd=sides[1], capture_output=True, text=True, check=False)

    done = serve(appends=appends, answers=answers)
    assert done.returncode == status
    assert ("a process was killed" in done.stderr) == (status == 2)
    (part,) = tmp_path.iterdir()
    part.write_bytes(part.read_bytes() + b"the beat in work")
    assert "2 of 5 beats are computed already" in serve(appends=ALWAYS, answers=[0, 1, 1, 1]).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["answers.zip"]
    beats, answers = (
        list(boxes.read_box(path, f"encrypted {path.stem.split('_')[-1]}")[1])
        for path in (sides[1] / "encrypted_beats.zip", tmp_path / "answers.zip")
    )
    assert answers == beats


PAUSED = """
import os, signal, cli, compute, server

def pause(*arguments):
    os.write(1, b"computing\\n")
    signal.pause()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
compute.answer = pause
cli.run_and_leave(server.main, "run the same command again")
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_processes_end_with_the_server(sides, tmp_path, number, status):
    argv = ("encrypted_beats.zip", "evaluation_keys.zip", "--output", tmp_path / "out.zip", "--processes", "2")
    command = [sys.executable, "-c", PAUSED, *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    server = subprocess.Popen(command, cwd=sides[1], text=True, **pipes)
    assert [server.stdout.readline() for _ in range(2)] == ["computing\n"] * 2
    assert "another process is computing these beats" in call(sides[1], "server.py", *argv, status=2)
    if number == signal.SIGINT:
        os.killpg(server.pid, number)  # as a terminal does
    else:
        server.send_signal(number)
    left = server.communicate()[1]  # until nobody has stdout any more
    assert server.returncode == status
    assert left.splitlines()[1:] == (["-c: interrupted; run the same command again"] if status == 130 else [])


@pytest.fixture
def dask_cluster():
    from distributed import LocalCluster

    options = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    with LocalCluster(n_workers=2, **options) as cluster:
        yield cluster


def test_dask_workers_compute_the_same_answers(sides, tmp_path, dask_cluster):
    hospital, server = sides
    argv = ("encrypted_beats.zip", "evaluation_keys.zip", "--output", tmp_path / "answers.zip")
    call(server, "server.py", *argv, "--scheduler", dask_cluster.scheduler_address)
    answers = csv.DictReader(io.StringIO(call(hospital, "client.py", "decrypt", tmp_path / "answers.zip")))
    assert [int(answer["abnormal"]) for answer in answers] == [0, 1, 0, 0, 1]


def test_dask_workers_get_the_keys_once_and_not_with_each_beat(sides, monkeypatch):
    scattered, submitted, files = [], [], []

    class Client:
        """In place of distributed's: what is scattered is held by the workers, and tasks name it."""

        def __init__(self, address, timeout):
            self.wait_for_workers = lambda count, timeout: None
            self.upload_file = lambda path: files.append(Path(path).name)

        def scatter(self, values, broadcast, hash):
            scattered.append((values, broadcast))
            return [f"held {number}" for number in range(len(values))]

        def get_executor(self, pure):
            return SimpleNamespace(submit=lambda *task: submitted.append(task))

    monkeypatch.setattr("distributed.Client", Client)
    monkeypatch.setattr(server_side, "SERVER", sides[1] / "server.zip")
    workers = server_side.dask_workers("tcp://here:1", "name", b"keys")
    for beat in (b"one", b"two"):
        workers.submit(beat)
    network = (sides[1] / "server.zip").read_bytes()
    assert scattered == [([network, b"keys"], True)]
    assert files == ["packing.py", "compute.py"]
    fixed = (compute.answer, "name", compute.versions(network), "held 0", "held 1")
    assert submitted == [(*fixed, b"one"), (*fixed, b"two")]


def test_a_process_loads_the_keys_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(compute, "_LOADED", {})
    monkeypatch.setattr(compute, "load", lambda *given: loaded.append(given) or (FakeServer, given[2]))
    assert [compute.answer(name, {}, b"net", name.encode(), b"beat") for name in "aabba"] == [
        (b"beat with " + name,) for name in (b"a", b"a", b"b", b"b", b"a")
    ]
    assert [keys for _, _, keys in loaded] == [b"a", b"b", b"a"]


class FakeServer:
    """In place of Concrete ML's."""

    @staticmethod
    def run(beat, keys):
        return beat + b" with " + keys


def test_a_worker_of_another_version_and_a_scheduler_that_does_not_answer_are_refused(sides, monkeypatch):
    network = (sides[1] / "server.zip").read_bytes()
    for name in ("python", "concrete-ml"):
        with pytest.raises(ValueError, match=rf"{os.uname().nodename}: its {name} is .*, the server's is 0\.1"):
            compute.load({**compute.versions(network), name: "0.1"}, network, b"")
    monkeypatch.setattr(server_side, "CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(boxes.InputError, match="python -m dask worker"):
            server_side.dask_workers(address, "a", b"")


@pytest.mark.parametrize("cut", [0, 5, 12, 30, 77, 78, 139, 140, 1000])
def test_a_part_file_is_continued_behind_its_last_whole_entry(tmp_path, cut):
    """Of three beats, with the answers to the last and the first."""
    first, entries = b"of these beats", {2: boxes.framed(b"1" * 20), 0: boxes.framed(b"2" * 30)}
    with (tmp_path / "part").open("a+b") as part:
        server_side.append(part, first)
        for number, answer in entries.items():
            server_side.append(part, number.to_bytes(8, "big") + answer)
        part.truncate(cut)
        places = server_side.resume(part, first, 3)
        assert [bool(place) for place in places] == [cut >= 26 + 52 + 62, False, cut >= 26 + 52]
        for number in (0, 1, 2):
            if not places[number]:
                entry = entries.get(number, boxes.framed(b"two ") + boxes.framed(b"parts"))
                places[number] = server_side.append(part, number.to_bytes(8, "big") + entry)
        assert b" ".join(server_side.answers(part, places)) == b" ".join([b"2" * 30, b"two  parts", b"1" * 20])
        server_side.append(part, (3).to_bytes(8, "big") + b"of a beat that there is not")
        assert server_side.resume(part, first, 3) == places
        assert not any(server_side.resume(part, b"of other beats", 3))
        assert part.seek(0, os.SEEK_END) == 26


def test_a_box_is_read_in_the_memory_of_one_payload(tmp_path):
    names, payload = dict.fromkeys(boxes.NAMES, "0"), message(bytes(10**6))
    boxes.write_box(tmp_path / "box.zip", "k", names, itertools.repeat(payload, 40))
    tracemalloc.start()
    header, payloads = boxes.read_box(tmp_path / "box.zip", "k")
    assert sum(len(payload) for payload in payloads) == header["count"] * len(payload)
    assert tracemalloc.get_traced_memory()[1] < 6 * 10**6
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_payloads(tmp_path):
    peaks = []
    for count in (1000, 10_000):
        tracemalloc.start()
        boxes.write_box(
            tmp_path / "box.zip", "k", dict.fromkeys(boxes.NAMES, "0"), itertools.repeat(message(b"x"), count)
        )
        assert sum(1 for _ in boxes.read_box(tmp_path / "box.zip", "k")[1]) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


HEADER = {"kind": "k", "version": boxes.BOX_VERSION, "model": "0", "key": "0", "beats": "0", "count": 1}


@pytest.mark.parametrize(
    "lie",
    [
        *({"header": {**HEADER, "count": count}} for count in (10**12, 2, 0, -1, True, 1.0, "1", None, [1])),
        *({"header": header} for header in ([], "x", None, "[" * 9000, '{"kind": "k"}', " " * 20000)),
        *({"header": {**HEADER, name: "../../etc\n"}} for name in ("kind", "version", *boxes.NAMES)),
        {"header": HEADER, "claim": 10**12},
        {"header": HEADER, "claim": 3 * 10**8},
        {"header": HEADER, "entries": [bytes(10**8)], "compression": zipfile.ZIP_DEFLATED},
        {"header": HEADER, "names": ["../../etc/passwd"]},
        *({"header": HEADER, "stored": boxes.FRAME.pack(length, 0)} for length in (0, 10**12, 2**64 - 1)),
        *(
            {"header": HEADER, "stored": stored}
            for stored in (b"", b"\0" * 99, boxes.framed(b"x"), boxes.framed(b"x" * 99))
        ),
        {"header": HEADER, "stored": boxes.framed(message(b"x")) + b"more"},
    ],
)
def test_a_lying_box_is_refused_in_one_line_without_memory(tmp_path, lie):
    path = lying_box(tmp_path / "box.zip", **lie)
    tracemalloc.start()
    with pytest.raises(boxes.InputError) as refusal:
        boxes.read_box(path, "k")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert str(refusal.value).startswith(f"{path}: ")
    assert len(str(refusal.value).splitlines()) == 1


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), end=st.integers(0, 10**6))
def test_a_box_is_read_as_written_or_refused(tmp_path, edits, end):
    whole = bytearray(lying_box(tmp_path / "box.zip", {**HEADER, "count": 2}, (b"first", b"second")).read_bytes())
    for place, value in edits:
        whole[place % len(whole)] = value
    (tmp_path / "box.zip").write_bytes(whole[: end or None])
    try:
        assert list(boxes.read_box(tmp_path / "box.zip", "k")[1]) == [message(b"first"), message(b"second")]
    except boxes.InputError as refusal:
        assert len(str(refusal).splitlines()) == 1


WANTED = [[1.5, -2.0, 3e-2], [4.0, 5.25, 6.0]]


@pytest.mark.parametrize(
    "text",
    [
        "a,b,c\n1.5,-2,3e-2\n4,5.25,6\n",
        "c,a,b\n0.03,1.5,-2\n6,4,5.25",
        "a, b , c\r\n 1.5, -2, 0.03\r\n4 ,5.25,6\r\n\r\n",
        "a,b,c\r\r\n1.5,-2,0.03\r\r\n4,5.25,6\r\r\n",
        'a,b,c\n1.5,"-2", "0.03"\n4,5.25,6\n,,\n,,,,\n',
        "a,b,c\n1.5,-2,0.03,\n4,5.25,6,\n",
        "a,b,c,\n1.5,-2,0.03,\n4,5.25,6,\n",
        "a;b;c\n1.5;-2;0.03\n4;5.25;6\n",
        "a;b;c\n1,5;-2;0,03\n4;5,250;6\n",
        'a,b,c\n"1,5",-2,"0,03"\n4,"5,25",6\n',
        "a\tb\tc\n1,5\t-2\t3,0E-2\n4\t5,25\t6\n",
        "comment,a,b,c,x,x\ngood,1.5,-2,0.03,,\nn\xe4,4,5.25,6,1;2,NaN\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_beats_file_is_read_as_spreadsheets_and_programs_write_it(tmp_path, text, encoding):
    (tmp_path / "beats.csv").write_bytes(text.encode(encoding))
    np.testing.assert_array_equal(csvfiles.read_beats(tmp_path / "beats.csv", NAMES), WANTED)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a,b,c\n1,2,3\n7,4,5,6\n", "line 3: 4 values for 3 columns"),
        ('a,b,c\n"1",4,5,6\n', "line 2: 4 values"),
        ("a,b,c\n0,5,1,2\n", "line 2: 4 values"),
        ('a,b,comment\n"1",4,5,""\n', "0 columns are called 'c'"),
        ('a,b,c,comment\n"1",4,5,6,""\n', "line 2: 5 values for 4 columns"),
        ("a,b,c\n1,2,3,\n4,5,6\n", "line 2: 4 values"),
        ("a,b,c\n1,2\n", "line 2: 2 values"),
        ("a,b\n1,2\n", "0 columns are called 'c'"),
        ("a,b,c,a\n1,2,3,4\n", "2 columns are called 'a'"),
        ("1,2,3\n4,5,6\n", "0 columns are called 'a'"),
        ("a,b,c\n1,,3\n", "line 2, column b: there is no value"),
        ("a,b,c\n,,\n1,2,3\n", "line 2, column a: there is no value"),
        ('a,b,c\n1,2,"1,234"\n', "line 2, column c: '1,234'"),
        ("a;b;c\n1;2;1,234\n", "line 2, column c: '1,234'"),
        ("a;b;c\n1;0.5;0,5\n", "line 2, column c: '0,5'"),
        ("a;b;c\n1;2;1.234,5\n", "line 2, column c: '1.234,5'"),
        *((f"a,b,c\n1,2,3\n1,2,{cell}\n", "line 3, column c: ") for cell in ("nan", "inf", "1e999", "x", "1_0", "1 0")),
        ('a,b,c,d\n1,2,3,"x\n4,5,6,y\n', "line 3: unexpected end of data"),
        ("a,b,c\n", "holds no beats"),
        ("", "0 columns"),
        ("a\0b", "is not text"),
    ],
)
def test_what_a_beats_file_could_mean_in_two_ways_is_refused_with_its_place(tmp_path, text, where):
    (tmp_path / "beats.csv").write_text(text, newline="")
    with pytest.raises(boxes.InputError, match=re.escape(where)) as refusal:
        csvfiles.read_beats(tmp_path / "beats.csv", NAMES)
    assert str(refusal.value).startswith(str(tmp_path / "beats.csv"))
    assert len(str(refusal.value).splitlines()) == 1


def test_a_long_cell_that_is_no_number_is_refused(tmp_path):
    """Of the longest that csv reads; a pattern that tries the digits in every way would not come to an end."""
    (tmp_path / "beats.csv").write_text(f"a,b,c\n1,2,{'1' * 130_000}x\n")
    with pytest.raises(boxes.InputError, match="column c"):
        csvfiles.read_beats(tmp_path / "beats.csv", NAMES)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=4),
    separator=st.sampled_from(",;\t"),
    comma=st.booleans(),
    comment=st.text(max_size=5),
    row_names=st.booleans(),
)
def test_no_way_of_writing_a_table_shifts_or_changes_a_number(tmp_path, values, separator, comma, comment, row_names):
    rows = [[f"{value:.4f}".replace(".", "," if comma else ".") for value in row] for row in values]
    table = [["b", "note", "a", "c"], *([*[str(k)] * row_names, r[1], comment, r[0], r[2]] for k, r in enumerate(rows))]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(table)
    if comma and separator == ",":
        text = io.StringIO(text.getvalue().replace('"', ""))
    (tmp_path / "beats.csv").write_bytes(text.getvalue().encode("utf-8", "replace"))
    try:
        read = csvfiles.read_beats(tmp_path / "beats.csv", NAMES)
        np.testing.assert_array_equal(read, [[float(f"{value:.4f}") for value in row] for row in values])
        assert not row_names
    except boxes.InputError as refusal:
        assert row_names or (comma and separator == ",") or "\0" in comment, refusal


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(), st.text('abc,;\t"\n\r 0123456789.eE+-').map(lambda text: b"a,b,c\n" + text.encode())))
def test_any_bytes_are_a_table_of_finite_numbers_or_one_line(tmp_path, beats):
    (tmp_path / "beats.csv").write_bytes(beats)
    try:
        assert np.isfinite(csvfiles.read_beats(tmp_path / "beats.csv", NAMES)).all()
    except boxes.InputError as refusal:
        assert len(str(refusal).splitlines()) == 1


def test_a_record_comes_back_as_annotations_of_every_beat(sides, tmp_path):
    hospital, server = sides
    samples = make_record(tmp_path, "r", symbols=list("NNVNNNVVNN"))
    argv = ("encrypt", tmp_path / "r.hea", "--output", tmp_path / "beats.zip")
    line = "r: 10 beats, R peaks of r.atr; 8 can be classified; 2 first or last beat"
    assert line in call(hospital, "client.py", *argv)
    argv = (tmp_path / "beats.zip", "evaluation_keys.zip", "--output", tmp_path / "answers.zip")
    call(server, "server.py", *argv)
    argv = ("decrypt", tmp_path / "answers.zip", "--beats", tmp_path / "beats.json", "--output", tmp_path / "out")
    summary = call(hospital, "client.py", *argv)
    with (tmp_path / "out" / "r.fhe.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    annotation = wfdb.rdann(str(tmp_path / "out" / "r"), "fhe")
    np.testing.assert_array_equal(annotation.sample, samples)
    assert annotation.fs == 360  # which the file states: there is no header beside it
    assert [int(row["sample"]) for row in rows] == list(samples)
    codes = {"normal": "N", "abnormal": "Q", "not classified": '"'}
    assert annotation.symbol == [codes[row["decision"]] for row in rows]
    assert [note for note in annotation.aux_note if note != "not classified"] == [
        f"{float(row['probability']):.4f}" for row in rows[1:-1]
    ]
    abnormal = annotation.symbol.count("Q")
    assert "r: 10 beats, R peaks of r.atr\n" in summary
    assert f"\n{8 - abnormal} normal, {abnormal} abnormal\n2 not classified; 2 first or last beat\n" in summary
    assert (tmp_path / "out" / "r.fhe.png").stat().st_size > 10_000

    before = content(tmp_path)
    other = ("decrypt", "encrypted_answers.zip", "--beats", tmp_path / "beats.json")
    assert "is of other beats" in call(hospital, "client.py", *other, status=2)
    for name in ("r.hea", "r.dat", "r.atr"):
        argv = ("encrypt", tmp_path / "r", "--output", tmp_path / name)
        assert "not an earlier output" in call(hospital, "client.py", *argv, status=2)
    assert content(tmp_path) == before
    (tmp_path / "r.fhe").write_bytes((tmp_path / "out" / "r.fhe").read_bytes())  # an input this time
    times = json.loads((tmp_path / "beats.json").read_text())
    (tmp_path / "beats.json").write_text(json.dumps({**times, "annotations": str(tmp_path / "r.fhe")}))
    argv = ("decrypt", tmp_path / "answers.zip", "--beats", tmp_path / "beats.json", "--output")
    assert "would overwrite" in call(hospital, "client.py", *argv, tmp_path, status=2)
    (tmp_path / "beats.json").write_text(json.dumps({**times, "leads": 0}).replace("leads", "other"))
    assert "damaged or of another version" in call(hospital, "client.py", *argv, tmp_path, status=2)
    answers.check_files(tmp_path / "out", "r", "")  # the next run may replace them


def test_a_file_that_another_program_wrote_is_not_replaced(tmp_path, monkeypatch):
    for ending in answers.OURS:
        path = tmp_path / f"r{ending}"
        path.write_bytes(b"of another program")
        with pytest.raises(boxes.InputError, match=re.escape(f"r{ending}: is there and not an earlier output")):
            answers.check_files(tmp_path, "r", "")
        path.unlink()
    monkeypatch.chdir(tmp_path)  # where decrypt writes by default
    answers.check_files(Path(), "r", "")


def test_a_column_in_another_unit_is_named_on_stderr(capsys):
    model = describe(3)
    z = client.scale(np.array([[0.0, 800.0, 2.0], [0.5, 900.0, 900.0], [0.0, 1.0, 2.0]]), model)
    assert capsys.readouterr().err.splitlines() == [
        "warning: ampl, 1: 2 of 3 values are over 10 standard deviations from the training data's mean; its unit is mV"
    ]
    np.testing.assert_array_equal(z[1], [1, 3, 3])


def test_the_export_describes_itself_and_overwrites_nothing(exported):
    deployed = exported[0] / "deployed"
    model = json.loads((deployed / "client" / "model.json").read_text())
    assert model == {
        **describe(32),
        "outputs": 2,
        "linear": None,
        "model": sha256(deployed / "server" / "server.zip"),
    }
    with (deployed / "client" / "example_beats.csv").open(newline="") as file:
        names, *raw = csv.reader(file)
    assert names == [feature["name"] for feature in model["features"]]
    np.testing.assert_array_equal(apply_scaler(np.array(raw, dtype=float), model["scaler"]), exported[2])
    readme = (deployed / "README.md").read_text()
    for words in (
        "98.76% on 12,345",
        "128 bits",
        "p_error is 9.09e-13",
        "(32 here",
        "python server.py encrypted_beats",
    ):
        assert words in readme
    before = content(deployed)
    with pytest.raises(InputError, match="is there already"):
        deployment.export(exported[1], describe(32), X[:5], deployed)
    with pytest.raises(KeyError):
        deployment.export(exported[1], {**describe(32), "scaler": {}}, X[:5], exported[0] / "new")
    assert content(deployed) == before
    assert not [path for path in exported[0].iterdir() if "new" in path.name]


def test_an_export_needs_a_new_folder_in_one_that_can_be_written(tmp_path):
    deployment.check_new(tmp_path / "new" / "deployed")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file", tmp_path / "file" / "deployed"):
        with pytest.raises(InputError, match="name a"):
            deployment.check_new(folder)
