"""fhe_mlp/ecg/physionet.py: downloads from a local HTTP server, with transfers that break off."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wfdb
from conftest import make_record, refusal

import preprocess_mitbih as pre
from fhe_mlp.ecg import physionet


def list_files(folder, more=""):
    """Write the list of checksums of all files in a folder."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS.txt").write_text("".join(lines) + more)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folder of a server of two small records and their checksums."""
    folder = tmp_path / "www" / physionet.DATABASE
    for seed, name in enumerate(("100", "101")):
        make_record(folder, name, seed=seed)
    list_files(folder, "0" * 64 + " notes/ignored.txt\n")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setattr(physionet.time, "sleep", lambda _: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        wfdb.io.download.set_db_index_url(f"http://127.0.0.1:{http.server_port}/")
        yield folder
        wfdb.io.download.set_db_index_url()
        http.shutdown()


@pytest.fixture
def transfers(server, monkeypatch):
    """Names of the files that are transferred, and how many transfers of each break off."""
    fetch, names, faults = wfdb.io.download.dl_pn_file, [], {}

    def transfer(job):
        name = job[0]
        names.append(name)
        faults[name] = faults.get(name, 0) - 1
        if faults[name] >= 0:
            Path(job[3], name).write_bytes((server / name).read_bytes()[:1000])
            raise OSError("broken off")
        fetch(job)

    monkeypatch.setattr(wfdb.io.download, "dl_pn_file", transfer)
    return names, faults


@pytest.fixture
def argv(tmp_path):
    return ["--data-dir", str(tmp_path / "d"), "--records-dir", str(tmp_path / "mitdb")]


def test_broken_transfers_are_tried_again_and_the_next_run_goes_on_with_what_is_missing(
    server, transfers, argv, tmp_path, capsys
):
    (names, faults), folder = transfers, tmp_path / "mitdb"
    faults |= {"100.dat": physionet.DOWNLOAD_ATTEMPTS - 1, "101.dat": 100}
    assert "run the same command again" in refusal(pre.main, argv, capsys)
    assert not list((tmp_path / "d").iterdir())
    finished = {"100.atr", "100.dat", "100.hea", "101.atr", "SHA256SUMS.txt"}
    assert {path.name for path in folder.iterdir()} == finished
    assert "missing" in refusal(pre.main, [*argv, "--no-download"], capsys)
    faults.clear()
    names.clear()
    pre.main(argv)
    assert names == ["101.dat", "101.hea"]
    for path in server.glob("1*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    pre.main([*argv, "--no-download"])
    assert len(names) == 2


def test_a_wrong_checksum_and_no_server_are_one_line(server, argv, tmp_path, capsys):
    (server / "100.dat").write_bytes((server / "100.dat").read_bytes()[::-1])
    assert "SHA-256" in refusal(pre.main, argv, capsys)
    assert not (tmp_path / "mitdb" / "100.dat").exists()
    wfdb.io.download.set_db_index_url("http://127.0.0.1:9/")
    assert "download failed" in refusal(pre.main, argv, capsys)


@pytest.mark.parametrize("content", [b"", b"abc12 100.dat\n", b"<html>\n", None])
def test_a_file_that_changed_on_disk_is_refused(server, argv, tmp_path, capsys, content):
    folder = shutil.copytree(server, tmp_path / "mitdb")
    name = "100.atr" if content is None else "SHA256SUMS.txt"
    (folder / name).write_bytes(b"\0\0" if content is None else content)
    assert name in refusal(pre.main, argv, capsys)


@pytest.mark.parametrize("style", ["{0} *{1}\r\n", "{0}  ./{1}\n", "\n{0}  {1}\n\n", "\ufeff{0}  {1}\n"])
def test_lists_of_checksums_are_read_in_every_style(tmp_path, style):
    sums = {f"{k}{suffix}": f"{k:064x}" for k, suffix in enumerate((".hea", ".dat", ".atr"))}
    text = "".join(style.lstrip("\ufeff").format(*reversed(item)) for item in sums.items())
    (tmp_path / "sums").write_bytes((style[0] * style.startswith("\ufeff") + text).encode())
    assert physionet.read_sums(tmp_path / "sums") == sums


def test_files_missing_from_another_database_are_reported_not_downloaded(transfers, argv, tmp_path, capsys):
    folder = tmp_path / "mitdb"
    for seed, name in enumerate(("100", "800", "801")):
        make_record(folder, name, seed=seed)
    list_files(folder)
    for suffix in (".hea", ".dat", ".atr"):
        (folder / f"100{suffix}").unlink()
    pre.main(argv)
    assert "3 listed files are missing, 100.atr first" in capsys.readouterr().err
    assert transfers[0] == []
    assert json.loads((tmp_path / "d" / "dataset.json").read_text())["recipe"]["records"] == ["800", "801"]
