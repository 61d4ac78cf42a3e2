"""The database of step 5's results."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from fhe_mlp.cli import InputError
from fhe_mlp.store import LAYOUT, PREDICTION_COLUMNS, Store


def row(identity, status="ok", **facts):
    return {"identity": identity, "model_name": "m", "status": status, "accuracy": np.float64(0.5), **facts}


def predictions(*test_rows):
    numbers = dict.fromkeys(PREDICTION_COLUMNS[3:], 1.5)
    return pd.DataFrame([{"test_row": np.int64(k), **numbers} for k in test_rows])


def test_what_is_added_is_there_after_reopening_in_the_order_asked_for(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.add(1, row("b"), predictions(7, 3))
        store.add(0, row("b"), predictions(1))
        store.add(0, row("a", complexity=3), None)
        store.add(0, row("c", status="failed"), None)
    with Store(tmp_path / "r.sqlite", write=False) as store:
        assert store.results(["a", "b"])[["identity", "batch"]].to_numpy().tolist() == [["a", 0], ["b", 0], ["b", 1]]
        assert list(store.results(["a", "b"], batch=1)["identity"]) == ["b"]
        assert store.results([]).empty
        assert list(store.predictions(["b"])["test_row"]) == [1, 3, 7]
        assert list(store.predictions(["b"], batch=0)["output_fhe"]) == [1.5]
        assert store.finished(["a", "b", "c"]) == {("a", 0), ("b", 0), ("b", 1)}  # what failed is tried again
        assert store.finished(["a"]) == {("a", 0)}


def test_a_second_attempt_takes_the_place_of_the_first(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.add(0, row("a", status="failed"), predictions(1, 2))
        store.add(0, row("a"), predictions(2))
        assert list(store.results(["a"])["status"]) == ["ok"]
        assert list(store.predictions(["a"])["test_row"]) == [2]
        for accuracy in (0.1, 0.2):
            store.compare("x", {"name": "other", "accuracy": accuracy})
        assert list(store.comparison("x")["accuracy"]) == [0.2]
        assert store.comparison("y").empty


def test_a_transaction_that_is_cut_short_leaves_nothing(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import pandas as pd; from fhe_mlp.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.add(0, {'identity': 'a', 'status': 'ok'}, None)\n"
        "connection = store.connection\n"
        "connection.execute('BEGIN')\n"
        "connection.execute(\"INSERT INTO results VALUES ('b', 0, 'ok', '{}')\")\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "r.sqlite"], cwd=ROOT, check=False)
    assert done.returncode == -9
    with Store(tmp_path / "r.sqlite") as store:
        assert store.finished(["a", "b"]) == {("a", 0)}


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path):
        for write in (True, False):
            with pytest.raises(InputError, match=r"r\.sqlite: another run writes to it"):
                Store(path, write)
    with Store(path):
        pass


@pytest.mark.parametrize("content", [b"hello, this is no database" * 100, b"SQLite format 3\x00" + bytes(4000)])
def test_a_file_that_is_no_database_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "r.sqlite"
    path.write_bytes(content)
    for write in (True, False):
        with pytest.raises(InputError, match="cannot be used as a database"):
            Store(path, write)
    assert path.read_bytes() == content


def test_another_layout_is_refused(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path) as store:
        store.connection.execute(f"PRAGMA user_version = {LAYOUT + 1}")
    with pytest.raises(InputError, match=f"has layout {LAYOUT + 1}, this program writes layout {LAYOUT}"):
        Store(path)


def test_reading_where_there_is_none_makes_no_file(tmp_path):
    with Store(tmp_path / "r.sqlite", write=False) as store:
        assert store.finished(["a"]) == set()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.add(0, row("a"), None)
        (pages,) = store.connection.execute("PRAGMA page_count").fetchone()
        store.connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to run out of space
        with pytest.raises(InputError, match="cannot be written .*full"):
            store.add(1, row("a", text="x" * 20_000), None)
    with Store(tmp_path / "r.sqlite") as store:
        assert json.loads(store.connection.execute("SELECT facts FROM results").fetchall()[0][0])["batch"] == 0
        assert store.finished(["a"]) == {("a", 0)}
