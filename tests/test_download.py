"""preprocess_mitbih.py: downloads from a local HTTP server, broken in every way."""

from __future__ import annotations

import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import wfdb
from conftest import make_record, refusal

import preprocess_mitbih as pre
from fhe_mlp import physionet
from fhe_mlp.arrays import load_description


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of two small records under the database's path; `faults` names files whose next transfers break."""
    folder = tmp_path / "www" / physionet.DATABASE
    for seed, name in enumerate(("100", "101")):
        make_record(folder, name, seed=seed)
    files = sorted(p for p in folder.iterdir())
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.name}\n" for p in files)
    (folder / "SHA256SUMS.txt").write_text(sums + "0" * 64 + " notes/ignored.txt\n")

    class Handler(SimpleHTTPRequestHandler):
        faults: ClassVar[dict[str, int]] = {}
        requests: ClassVar[list[str]] = []
        ranges: ClassVar[dict[str, int]] = {}

        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1]
            Handler.requests.append(name)
            content = (folder / name).read_bytes() if (folder / name).exists() else None
            if content is None:
                return self.send_error(404)
            start = 0
            if "Range" in self.headers:
                start = Handler.ranges[name] = int(self.headers["Range"].split("=")[1].split("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            broken = Handler.faults.get(name, 0) > 0
            if broken:
                Handler.faults[name] -= 1
            return self.wfile.write(content[start : start + 1000] if broken else content[start:])

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str((folder / self.path.rsplit("/", 1)[-1]).stat().st_size))
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        wfdb.io.download.set_db_index_url(f"http://127.0.0.1:{http.server_port}/")
        monkeypatch.setattr(physionet.time, "sleep", lambda _: None)
        Handler.folder = folder
        yield Handler
        Handler.faults.clear()
        Handler.requests.clear()
        wfdb.io.download.set_db_index_url()
        http.shutdown()


def argv(tmp_path, *more):
    return ["--data-dir", str(tmp_path / "d"), "--records-dir", str(tmp_path / "mitdb"), *more]


def test_download_then_preprocess(server, tmp_path):
    pre.main(argv(tmp_path))
    for path in server.folder.glob("1*"):
        assert (tmp_path / "mitdb" / path.name).read_bytes() == path.read_bytes()
    assert set(load_description(tmp_path / "d")["recipe"]["records"]) == {"100", "101"}
    server.requests.clear()
    pre.main(argv(tmp_path, "--no-download"))
    assert server.requests == []


def test_a_broken_transfer_is_tried_again(server, tmp_path):
    server.faults["100.dat"] = physionet.DOWNLOAD_ATTEMPTS - 1
    pre.main(argv(tmp_path))
    assert (tmp_path / "mitdb" / "100.dat").read_bytes() == (server.folder / "100.dat").read_bytes()


def test_a_download_that_stays_broken_keeps_what_it_has_and_resumes(server, tmp_path, capsys):
    server.faults["101.dat"] = 100
    assert "run the same command again" in refusal(pre.main, argv(tmp_path), capsys)
    assert not list((tmp_path / "d").iterdir())
    assert not (tmp_path / "mitdb" / "101.dat").exists()
    assert (tmp_path / "mitdb" / "100.dat").exists()
    assert "missing" in refusal(pre.main, argv(tmp_path, "--no-download"), capsys)
    server.faults.clear()
    server.requests.clear()
    pre.main(argv(tmp_path))
    assert "100.dat" not in server.requests
    assert (tmp_path / "mitdb" / "101.dat").read_bytes() == (server.folder / "101.dat").read_bytes()


def test_a_part_of_a_file_is_continued(server, tmp_path):
    part = tmp_path / "mitdb" / ".part"
    part.mkdir(parents=True)
    (part / "100.dat").write_bytes((server.folder / "100.dat").read_bytes()[:1234])
    pre.main(argv(tmp_path))
    assert server.ranges["100.dat"] == 1234
    assert (tmp_path / "mitdb" / "100.dat").read_bytes() == (server.folder / "100.dat").read_bytes()


def test_a_wrong_checksum_is_refused(server, tmp_path, capsys):
    changed = bytearray((server.folder / "100.dat").read_bytes())
    changed[100] ^= 1
    (server.folder / "100.dat").write_bytes(changed)
    assert "SHA-256" in refusal(pre.main, argv(tmp_path), capsys)
    assert not (tmp_path / "mitdb" / "100.dat").exists()


def test_a_file_that_changed_on_disk_is_refused(server, tmp_path, capsys):
    pre.main(argv(tmp_path))
    path = tmp_path / "mitdb" / "100.atr"
    path.write_bytes(path.read_bytes()[:-10])
    assert "100.atr" in refusal(pre.main, argv(tmp_path), capsys)


@pytest.mark.parametrize("content", ["", "abc12 100.dat\n", "<html>\n"])
def test_a_damaged_list_of_checksums_is_refused(server, tmp_path, capsys, content):
    pre.main(argv(tmp_path))
    (tmp_path / "mitdb" / "SHA256SUMS.txt").write_text(content)
    assert "SHA256SUMS.txt" in refusal(pre.main, argv(tmp_path), capsys)


def test_no_server_is_one_line(server, tmp_path, capsys):
    wfdb.io.download.set_db_index_url("http://127.0.0.1:9/")
    assert "download failed" in refusal(pre.main, argv(tmp_path), capsys)


@pytest.mark.parametrize("style", ["{0} *{1}\r\n", "{0}  ./{1}\n", "\n{0}  {1}\n\n", "\ufeff{0}  {1}\n"])
def test_lists_of_checksums_are_read_in_every_style(server, tmp_path, style):
    pre.main(argv(tmp_path))
    sums = tmp_path / "mitdb" / "SHA256SUMS.txt"
    want = physionet.read_sums(sums)
    assert len(want) == 6
    text = "".join(style.lstrip("\ufeff").format(*reversed(item)) for item in want.items())
    sums.write_bytes((style[0] * style.startswith("\ufeff") + text).encode())
    assert physionet.read_sums(sums) == want


def test_files_missing_from_another_database_are_reported_not_downloaded(server, tmp_path, capsys):
    folder = tmp_path / "mitdb"
    for seed, name in enumerate(("100", "800", "801")):
        make_record(folder, name, seed=seed)
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.iterdir())]
    (folder / "SHA256SUMS.txt").write_text("".join(lines))
    for suffix in (".hea", ".dat", ".atr"):
        (folder / f"100{suffix}").unlink()
    pre.main(argv(tmp_path))
    assert "3 listed files are missing, 100.atr first" in capsys.readouterr().err
    assert server.requests == []
    assert load_description(tmp_path / "d")["recipe"]["records"] == ["800", "801"]
    (folder / "801.atr").write_bytes((folder / "800.atr").read_bytes())
    assert "801.atr: SHA-256" in refusal(pre.main, argv(tmp_path), capsys)
