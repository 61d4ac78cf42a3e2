"""The export: a hospital's process and a server's, which have nothing in common but the files that travel."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tracemalloc
import zipfile
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import wfdb
from conftest import ROOT, make_record, random_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_encrypted import random_network

from fhe_mlp import deployment, encrypted
from fhe_mlp.cli import InputError
from fhe_mlp.deployment import client, exchange
from fhe_mlp.deployment.exchange import Archive, Header, write_archive
from fhe_mlp.ecg import EXPECTED_LEADS, FEATURES
from fhe_mlp.encrypted import ANSWERS, BEATS, KEYS
from fhe_mlp.scaling import prepare

ROWS = 0.3 * random_rows(3000)
PAYLOAD = 8  # beats in one payload
SERVE = ("server.py", "encrypted_beats.zip", "evaluation_keys.zip", "--output")
MODEL = {  # as step 5 passes it to export_network
    **{"name": "small", "p_error": 2.0**-40, "security_bits": 128, "complexity": 1.5e9, "pbs": 3, "map": "none"},
    **{"test_balanced_accuracy": 0.9876, "test_rows": 12345, "leads": EXPECTED_LEADS, "features": FEATURES},
    "scaler": {"mean": list(range(32)), "sd": [0.5] * 32, "clip_sd": 3.0},
}


def make_scheme(name):
    """A small network, linear but for TFHE, under the scheme of that name."""
    return encrypted.scheme_module(name).Scheme(random_network(3 if name == "tfhe" else 0), ROWS[:300], PAYLOAD)


def call(folder, *argv, status=0):
    """Run a side's script in its folder, without this checkout; return what it printed, of a refusal the one line."""
    command = [sys.executable, "-E", "-s", *map(str, argv)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    if not status:
        return done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def deploy(name, folder):
    """Export a network, and exchange what has to travel to classify the 18 beats farthest from the threshold."""
    scheme, hospital, server = make_scheme(name), folder / "client", folder / "server"
    examples = ROWS[np.argsort(scheme.network.logits(ROWS))[[*range(9), *range(-9, 0)]]]
    deployment.export_network(scheme, MODEL, examples, folder)
    call(hospital, "client.py", "keys")
    call(hospital, "client.py", "encrypt", "example_beats.csv")
    for file in SERVE[1:3]:
        shutil.copy(hospital / file, server)
    call(server, *SERVE[:3])
    shutil.copy(server / "encrypted_answers.zip", hospital)
    model = json.loads((hospital / "model.json").read_text())
    logits = scheme.network.logits(examples)
    return SimpleNamespace(hospital=hospital, server=server, model=model, examples=examples, logits=logits)


@pytest.fixture(scope="module", autouse=True)
def cleartext():
    """Adds the scheme without encryption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encrypted, "__path__", [*encrypted.__path__, str(Path(__file__).with_name("schemes"))])
        yield


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Both sides of a network whose scheme encrypts nothing, after all five commands."""
    return deploy("cleartext", tmp_path_factory.mktemp("cleartext") / "deployed")


def decrypt(hospital, answers):
    """The table that decrypt prints."""
    return pd.read_csv(StringIO(call(hospital, "client.py", "decrypt", answers)))


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.mark.parametrize("name", ["packed", "tfhe"])
def test_two_processes_decide_as_the_network_in_cleartext_and_the_server_holds_no_secret(name, tmp_path):
    sides = deploy(name, tmp_path / "deployed")
    answers = decrypt(sides.hospital, "encrypted_answers.zip")
    np.testing.assert_allclose(answers["output"], sides.logits, atol=1.1)  # a table's index may be rounded otherwise
    np.testing.assert_array_equal(answers["abnormal"], sides.logits > 0)
    np.testing.assert_allclose(answers["probability"], 1 / (1 + np.exp(-answers["output"])))
    for name in (*SERVE[1:3], "encrypted_answers.zip"):
        with zipfile.ZipFile(sides.hospital / name) as archive:  # no word of when
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    secret = Archive(sides.hospital / "keys" / "secret_keys.zip", exchange.SECRET_KEYS, sides.model).payload()
    words = re.findall(rb"(?:[\0\1]\0{7}){64,}", secret)  # bits in words of 64, besides evaluation keys
    secret = max(words, key=lambda words: words.count(b"\1"))
    assert secret.count(b"\1") > 500
    assert secret[:512] not in b"".join(content(sides.server).values())


def test_a_record_comes_back_as_annotations_of_every_beat_that_only_its_owner_can_read(sides, tmp_path):
    samples = make_record(tmp_path, "r", symbols=list("NNVNNNVVNN"))
    work, answers = tmp_path / "work", tmp_path / "answers.zip"
    line = "r: 10 beats, R peaks of r.atr; 8 can be classified; 2 first or last beat"
    assert line in call(sides.hospital, "client.py", "encrypt", tmp_path / "r.hea", "--output", work / "beats.zip")
    call(sides.server, SERVE[0], work / "beats.zip", *SERVE[2:], answers)
    (times,) = work.glob("r.*.json")
    argv = ("client.py", "decrypt", answers, "--output", work, "--times", work)
    summary = call(sides.hospital, *argv)
    table, annotation = pd.read_csv(work / "r.fhe.csv"), wfdb.rdann(str(work / "r"), "fhe")
    assert annotation.fs == 360  # which the file states: there is no header beside it
    for found in (annotation.sample, table["sample"]):
        np.testing.assert_array_equal(found, samples)
    codes = {"normal": "N", "abnormal": "Q", "not classified": '"'}
    assert set(table["recording"]) == {json.loads(times.read_text())["recording"]["identity"]}
    assert annotation.symbol == [codes[decision] for decision in table["decision"]]
    assert annotation.aux_note[1:-1] == [f"{probability:.4f}" for probability in table["probability"][1:-1]]
    assert annotation.aux_note[0] == annotation.aux_note[-1] == "not classified"
    abnormal = annotation.symbol.count("Q")
    counts = f"{8 - abnormal} normal, {abnormal} abnormal\n2 not classified; 2 first or last beat\n"
    assert f"r: 10 beats, R peaks of r.atr\n{counts}" in summary
    assert {path.name for path in work.iterdir()} == {"beats.zip", times.name, "r.fhe", "r.fhe.csv", "r.fhe.png"}
    for path in (*work.iterdir(), *(sides.hospital / "keys").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (work / "r.fhe.csv").write_text("of another program")
    assert "r.fhe.csv: exists and is not an earlier output" in call(sides.hospital, *argv, status=2)
    for damage in (lambda: times.write_text(times.read_text()[:300]), times.unlink):
        damage()
        assert f"{work}: the times of these beats, RECORD." in call(sides.hospital, *argv, status=2)


def test_results_of_two_patients_are_never_mixed_or_replaced(sides, tmp_path):
    work = tmp_path / "work"
    for seed, patient in enumerate(("a", "b")):  # the second is encrypted before the first answers are back
        make_record(tmp_path / patient, "holter", symbols=list("NNVNNNVVNN"), seed=seed)
        call(sides.hospital, "client.py", "encrypt", tmp_path / patient / "holter", "--output", work / f"{patient}.zip")
        call(sides.server, SERVE[0], work / f"{patient}.zip", *SERVE[2:], tmp_path / f"{patient}_answers.zip")
    a, b = (SERVE[0], work / "a.zip", *SERVE[2:]), tmp_path / "b_answers.zip"
    assert "exists and is not an earlier output" in call(sides.server, *a, b, status=2)
    files = [json.loads(path.read_text())["recording"] for path in work.glob("holter.*.json")]
    identities = {Path(file["path"]).parent.name: file["identity"] for file in files}
    assert len(set(identities.values())) == 2
    travelling = b"".join((work / f"{patient}.zip").read_bytes() for patient in "ab")
    assert not any(identity.encode() in travelling for identity in identities.values())

    def decrypt(patient, status=0):
        argv = (tmp_path / f"{patient}_answers.zip", "--output", tmp_path / "out", "--times", work)
        return call(sides.hospital, "client.py", "decrypt", *argv, status=status)

    (tmp_path / "out").mkdir()
    decrypt("a")
    first = content(tmp_path / "out")
    for name, found in first.items():
        assert identities["a"].encode() in found, name
    refused = decrypt("b", status=2)
    assert "holter.fhe: exists and is not an earlier output of this command for these beats" in refused
    assert content(tmp_path / "out") == first
    make_record(tmp_path / "a", "holter", symbols=list("NNVNNNVVNN"), seed=5)  # another patient at the same path
    done = subprocess.run(
        [
            sys.executable,
            "client.py",
            "decrypt",
            tmp_path / "a_answers.zip",
            "--output",
            tmp_path / "out",
            "--times",
            work,
        ],
        cwd=sides.hospital,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "holter: is not the signal that was encrypted; the picture has no signal" in done.stderr
    assert (tmp_path / "out" / "holter.fhe.png").stat().st_size < len(first[tmp_path / "out" / "holter.fhe.png"]) / 1.5


def test_a_record_whose_name_is_no_text_is_decided_and_shown_escaped(sides, tmp_path):
    make_record(tmp_path, "r", symbols=list("NNVNNNVVNN"))
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / os.fsdecode(b"M\xfcller" + os.fsencode(path.suffix)))
    header = tmp_path / os.fsdecode(b"M\xfcller.hea")
    header.write_bytes(header.read_bytes().replace(b"r.dat", b"M\xfcller.dat"))
    assert r"M\xfcller: 10 beats" in call(
        sides.hospital, "client.py", "encrypt", header, "--output", tmp_path / "b.zip"
    )
    call(sides.server, SERVE[0], tmp_path / "b.zip", *SERVE[2:], tmp_path / "a.zip")
    argv = ("client.py", "decrypt", tmp_path / "a.zip", "--times", tmp_path, "--output", tmp_path / "out")
    assert r"M\xfcller: 10 beats" in call(sides.hospital, *argv)
    assert len(list((tmp_path / "out").glob("M*ller.fhe*"))) == 3


def test_two_commands_at_once_make_one_pair_of_keys(sides, tmp_path):
    keys = [sys.executable, "client.py", "keys", "--keys", tmp_path / "keys", "--output"]
    running = [subprocess.Popen([*keys, tmp_path / name], cwd=sides.hospital) for name in ("a.zip", "b.zip")]
    assert [process.wait() for process in running] == [0, 0]
    secret = Archive(tmp_path / "keys" / "secret_keys.zip", exchange.SECRET_KEYS, sides.model)
    for name in ("a.zip", "b.zip"):
        archive = Archive(tmp_path / name, KEYS, sides.model)
        assert archive.header.key == secret.header.key
        assert archive.payload() == b"keys" + hashlib.sha256(secret.payload()).digest()


def test_faults_of_the_machine_are_named_and_not_put_on_keys(sides, tmp_path):
    before = content(sides.hospital / "keys"), (sides.hospital / "keys").stat().st_mtime_ns
    call(sides.hospital, "client.py", "encrypt", "example_beats.csv", "--output", tmp_path / "beats.zip")
    assert (
        content(sides.hospital / "keys"),
        (sides.hospital / "keys").stat().st_mtime_ns,
    ) == before  # it can be read-only

    def limited(folder, limit, *argv):
        command = f"{limit}; exec {shlex.join([sys.executable, *map(str, argv)])}"
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    full = "trap '' XFSZ; ulimit -f 1"
    status, line = limited(
        sides.hospital, full, "client.py", "encrypt", "example_beats.csv", "--output", tmp_path / "x.zip"
    )
    assert (status, line) == (
        2,
        f"client.py: {tmp_path / 'x.zip'}: cannot be written (File too large); free space or name another folder\n",
    )
    assert not (tmp_path / "x.zip").exists()
    status, line = limited(
        sides.hospital, "exec >&-", "client.py", "encrypt", "example_beats.csv", "--output", tmp_path / "x.zip"
    )
    assert (status, line) == (0, "")
    assert Archive(tmp_path / "x.zip", BEATS, sides.model).header.count == 18


def test_no_linker_is_a_fault_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scheme = encrypted.scheme_module("tfhe")
    for use in (lambda: make_scheme("tfhe"), lambda: scheme.Server(b"").load_keys(bytes(8))):
        with pytest.raises(InputError, match="the linker ld, .* install the package binutils"):
            use()


def test_the_same_network_exported_twice_is_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        export = (
            "import sys; sys.path[:0] = ['.', 'tests']; from pathlib import Path; from test_deployment import *; "
            f"deployment.export_network(make_scheme('tfhe'), MODEL, ROWS[:5], Path({str(tmp_path / folder)!r}))"
        )
        subprocess.run([sys.executable, "-c", export + "; os._exit(0)"], cwd=ROOT, check=True)
    a, b = ({path.relative_to(tmp_path / f): found for path, found in content(tmp_path / f).items()} for f in "ab")
    assert a == b
    assert len(a) > 30


def test_no_keys_are_replaced_lost_evaluation_keys_are_written_again_and_damaged_ones_refused(sides, tmp_path):
    output, path = tmp_path / "evaluation_keys.zip", tmp_path / "keys" / "secret_keys.zip"
    encrypt = ("client.py", "encrypt", "example_beats.csv", "--output", tmp_path / "out.zip", "--keys", path.parent)
    assert "make them with" in call(sides.hospital, *encrypt, status=2)
    shutil.copytree(sides.hospital / "keys", path.parent)
    output.write_bytes(b"of somebody")
    argv, before = ("client.py", "keys", "--keys", path.parent, "--output", output), content(tmp_path)
    assert "exists already" in call(sides.hospital, *argv, status=2)
    assert content(tmp_path) == before
    output.unlink()
    call(sides.hospital, *argv)
    assert content(path.parent).items() <= before.items()
    again, first = (Archive(path, KEYS, sides.model) for path in (output, sides.hospital / "evaluation_keys.zip"))
    assert (again.header, again.payload()) == (first.header, first.payload())
    path.write_bytes(path.read_bytes()[:700])
    assert "secret_keys.zip: is truncated or damaged" in call(sides.hospital, *encrypt, status=2)
    argv = ("client.py", "keys", "--keys", tmp_path / "new", "--output", output / "evaluation_keys.zip")
    call(sides.hospital, *argv, status=2)  # its folder is a file
    assert not (tmp_path / "new").exists()


def test_outputs_replace_nothing_but_earlier_outputs_of_the_same_command(sides):
    before = content(sides.hospital) | content(sides.server)
    encrypt = ("client.py", "encrypt", "example_beats.csv")
    assert "name another --output" in call(sides.hospital, *encrypt, "--output", "example_beats.csv", status=2)
    assert "is no recording" in call(sides.hospital, *encrypt, "--minutes", "5", status=2)
    assert "not an earlier output" in call(sides.server, *SERVE, "encrypted_beats.zip", status=2)
    assert content(sides.hospital) | content(sides.server) == before
    call(sides.hospital, *encrypt)
    call(sides.server, *SERVE, "encrypted_answers.zip")


def test_the_export_describes_itself_and_overwrites_nothing(sides, tmp_path):
    assert sides.model.items() >= MODEL.items()
    examples = pd.read_csv(sides.hospital / "example_beats.csv", float_precision="round_trip")
    assert list(examples) == [feature["name"] for feature in FEATURES]
    np.testing.assert_array_equal(prepare(examples.to_numpy(), sides.model["scaler"], "none"), sides.examples)
    readme = (sides.server / "README.md").read_text()
    for words in ("98.76% on 12,345", "128 bits", "p_error is 9.09e-13", "(32 here", "python server.py encrypted_b"):
        assert words in readme
    assert f"numpy=={np.__version__}\n" in (sides.server / "requirements.txt").read_text()
    schemes = {path.name for path in (sides.server / "fhe_mlp" / "encrypted").glob("*.py")}
    assert schemes == {"__init__.py", "cleartext.py"}
    (tmp_path / "file").write_text("")
    for existing in (sides.server, tmp_path / "file", tmp_path / "file" / "deployed"):
        with pytest.raises(InputError, match="name a"):
            deployment.check_new(existing)
    with pytest.raises(KeyError):
        deployment.export_network(make_scheme("cleartext"), {**MODEL, "scaler": {}}, ROWS[:5], tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_wrong_keys_damaged_files_and_other_versions_are_refused(sides, tmp_path):
    keys, beats = tmp_path / "keys.zip", tmp_path / "beats.zip"
    call(sides.hospital, "client.py", "keys", "--keys", tmp_path / "keys", "--output", keys)
    assert "must come from the same keys" in call(sides.server, *SERVE[:2], keys, status=2)
    argv = ("client.py", "decrypt", "encrypted_answers.zip", "--keys", tmp_path / "keys")
    assert "the keys with which its beats were encrypted" in call(sides.hospital, *argv, status=2)
    whole = bytearray((sides.server / "encrypted_beats.zip").read_bytes())
    whole[len(whole) // 2] ^= 1
    beats.write_bytes(whole)
    line = call(sides.server, SERVE[0], beats, *SERVE[2:], tmp_path / "answers.zip", status=2)
    assert "beats.zip: is truncated or damaged" in line
    for kind, other, why in ((KEYS, {"model": "0"}, "come from one export"), (BEATS, {}, "holds 'evaluation keys'")):
        with pytest.raises(InputError, match=why):
            Archive(keys, kind, {**sides.model, **other})
    server = shutil.copytree(sides.server, tmp_path / "server")
    (server / "model.json").write_text(json.dumps({**sides.model, "versions": {"numpy": "0.1"}}))
    line = call(server, *SERVE[:3], status=2)
    assert f"numpy {np.__version__} is installed, 0.1 is needed; pip install -r requirements.txt" in line
    (server / "server_part.bin").write_bytes(b"")
    assert "server_part.bin is damaged); restore it" in call(server, *SERVE[:3], status=2)


def test_payloads_that_the_scheme_cannot_use_are_refused_in_one_line(sides, tmp_path):
    path = tmp_path / "bad.zip"
    of_library = "beats from number 9 on cannot be computed with these keys"
    for kind, start, side, argv, why in (
        (BEATS, b"beat", sides.server, (SERVE[0], path, SERVE[2]), of_library),
        (ANSWERS, b"sums", sides.hospital, ("client.py", "decrypt", path), "holds no answers"),
    ):
        good = Archive(sides.hospital / f"{kind.replace(' ', '_')}.zip", kind, sides.model)
        for bad, line in ((b"seat", "is truncated or damaged (a value is not whole)"), (start + bytes(16), why)):
            write_archive(path, good.header, [good.payload(0), bad, good.payload(2)])
            assert line in call(side, *argv, "--output", tmp_path / "out", status=2)


def test_a_column_in_another_unit_is_named_on_stderr(capsys):
    model = {"features": FEATURES[:2], "scaler": {"mean": [1, 0], "sd": [0.5] * 2}}
    client.warn_of_units(np.array([[800.0, 0.0], [900.0, 0.5], [1.0, 0.0]]), model)
    what = "2 of 3 values are over 10 standard deviations from the training data's mean; its unit is s"
    assert capsys.readouterr().err == f"warning: pre_RR: {what}\n"


SMALL = {"model": "0", "numbers": {"beats": 2}}  # a model
HEADER = {"kind": BEATS, "model": "0", "key": "0", "beats": "0", "count": 1}


def write_zip(path, header=HEADER, payloads=(b"x",), compression=zipfile.ZIP_STORED, claim=None, names=("0", "1")):
    """Write an archive with a header that may be anything, and with `claim` a wrong size in the directory."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("header.json", header if isinstance(header, str) else json.dumps(header))
        for name, payload in zip(names, payloads):
            archive.writestr(name, payload)
        if claim:
            archive.filelist[-1].file_size = archive.filelist[-1].compress_size = claim
    return path


@pytest.mark.parametrize(
    "lie",
    [
        *({"header": {**HEADER, "count": count}} for count in (10**12, 3, 0, True, 1.0, "1", None)),
        *({"header": header} for header in ([], "x", "[" * 9000, {"kind": BEATS}, json.dumps(HEADER) + " " * 10**4)),
        *({"claim": size} for size in (10**12, 3 * 10**8)),
        *({"payloads": [bytes(n)], "compression": zipfile.ZIP_DEFLATED} for n in (100, 10**8)),
        *({"names": ["../../etc/passwd"]}, {"payloads": (b"x", b"more")}, {"payloads": ()}),
        {"header": {**HEADER, "count": 4}, "payloads": (b"x", b"x")},
        {"header": {**HEADER, "beats": 5}},
    ],
)
def test_a_lying_archive_is_refused_in_one_line_without_memory(tmp_path, lie):
    path = write_zip(tmp_path / "beats.zip", **lie)
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"^{path}: is truncated or damaged \(.*\); have it sent again[^\n]*$"):
        Archive(path, BEATS, SMALL)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), end=st.integers(0, 10**6))
def test_an_archive_is_read_as_written_or_refused(tmp_path, edits, end):
    path = write_zip(tmp_path / "beats.zip", {**HEADER, "count": 3}, [b"first", b"second"])
    whole = bytearray(path.read_bytes())
    for place, value in edits:
        whole[place % len(whole)] = value
    path.write_bytes(whole[: end % (len(whole) + 1)])
    try:
        archive = Archive(path, BEATS, SMALL)
        assert [archive.payload(0), archive.payload(1)] == [b"first", b"second"]
    except InputError as refusal:
        assert len(str(refusal).splitlines()) == 1


def test_archives_are_written_and_read_one_payload_at_a_time(tmp_path):
    payload = bytes(10**6)
    tracemalloc.start()
    payloads = (number.to_bytes(1, "big") + payload for number in range(40))
    write_archive(tmp_path / "beats.zip", Header(BEATS, "0", "0", count=79), payloads)
    archive = Archive(tmp_path / "beats.zip", BEATS, SMALL)
    assert [len(span) for span in archive.spans] == [2] * 39 + [1]
    assert all(archive.payload(number) == number.to_bytes(1, "big") + payload for number in range(40))
    assert tracemalloc.get_traced_memory()[1] < 6 * 10**6
    tracemalloc.stop()


def serve(sides, output, code, **how):
    """Start a server with one process, in which `code` comes before each payload."""
    command = [sys.executable, *SERVE, output, "--processes", "1"]
    how |= {"cwd": sides.server, "env": {**os.environ, "CLEARTEXT_RUN": code}, "text": True}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def test_after_a_kill_of_the_server_only_what_is_missing_is_computed(sides, tmp_path):
    runs, output = tmp_path / "runs", tmp_path / "answers.zip"
    runs.mkdir()
    count = f"import os; n = len(os.listdir({str(runs)!r})); open(f'{runs}/{{n}}', 'w'); "  # a file for each payload
    killed = serve(sides, output, f"{count}n == 2 and os.kill(os.getppid(), 9)")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (part,) = tmp_path.glob("answers.zip.*.part")
    stored, before = part.read_bytes(), len(list(runs.iterdir()))
    part.write_bytes(b"x" * 5000)
    assert "delete it to begin anew" in call(sides.server, *SERVE, output, status=2)
    part.write_bytes(stored)
    printed = serve(sides, output, count).communicate()[0]
    done = int(re.match(r"(\d+) of 18 beats are computed already", printed)[1]) // PAYLOAD
    assert 1 <= done <= 2
    assert len(list(runs.iterdir())) - before == 3 - done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.zip", "runs"]
    np.testing.assert_allclose(decrypt(sides.hospital, output)["output"], sides.logits)


def test_a_payload_that_kills_its_processes_is_named(sides, tmp_path):
    killed = serve(sides, tmp_path / "answers.zip", "import os; os.kill(os.getpid(), 9)")
    assert re.search("the processes that compute beat (1|9|17) are killed again and again", killed.communicate()[1])
    assert killed.returncode == 2


def test_a_second_server_is_refused_and_ctrl_c_is_one_line(sides, tmp_path):
    alive, output = tmp_path / "alive", tmp_path / "answers.zip"
    os.mkfifo(alive)
    code = f"import signal; file = open({str(alive)!r}, 'w'); print(file=file, flush=True); signal.pause()"
    server = serve(sides, output, code, start_new_session=True)
    try:
        with alive.open() as process:
            assert process.readline() == "\n"
            assert "another process is computing these beats" in call(sides.server, *SERVE, output, status=2)
            os.killpg(server.pid, signal.SIGINT)  # Ctrl-C is for the whole group
            assert process.read() == ""  # when nobody has it open any more
        lines = server.communicate()[1].splitlines()
    finally:
        server.kill()  # where it still lives
    assert server.returncode == 130
    assert lines == ["", "server.py: interrupted; run the same command again"]


def test_dask_workers_receive_program_and_keys_once_and_compute_the_same(sides, tmp_path, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setenv("CLEARTEXT_LOAD", f"open({str(tmp_path / 'loads')!r}, 'a').write('x')")
    options = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    with LocalCluster(n_workers=2, **options) as cluster:
        call(sides.server, *SERVE, tmp_path / "answers.zip", "--scheduler", cluster.scheduler_address)
    np.testing.assert_allclose(decrypt(sides.hospital, tmp_path / "answers.zip")["output"], sides.logits)
    assert 1 <= len((tmp_path / "loads").read_text()) <= 2
