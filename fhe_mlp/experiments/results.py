"""The results of step 5 in SQLite: a row a configuration, and a row a configuration and test row that ran encrypted.

Each finished job is a transaction, so that a run that is cut short loses only what it was computing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.cli import InputError, first_line

LAYOUT = 3  # of the tables below, stored as SQLite's user_version
PATIENCE_SECONDS = 60  # until another process has read or written
RUN_COLUMNS = (  # seconds and bytes are those of one beat in a payload of `beats`
    "identity test_row output_fhe encrypt_seconds run_seconds decrypt_seconds input_bytes output_bytes beats host "
    "processor cores"
).split()
TABLES = f"""
CREATE TABLE configurations (identity TEXT PRIMARY KEY, facts TEXT, clear BLOB);
CREATE TABLE runs ({", ".join(RUN_COLUMNS)}, PRIMARY KEY (identity, test_row));
CREATE TABLE comparison (basis TEXT, name TEXT, facts TEXT, PRIMARY KEY (basis, name));
PRAGMA user_version = {LAYOUT};
"""


class Results(contextlib.AbstractContextManager):
    """The database at `path`, made where it is missing; while one process writes, others can read.

    write=False reads it; a missing one is empty. Raises InputError for a file that is no database of this layout, and
    for one to which another process writes.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path, self.lock = path, path.open("ab") if write else None
        try:
            if self.lock:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            source = path if write or path.exists() else ":memory:"
            self.connection = sqlite3.connect(source, PATIENCE_SECONDS)
            if not self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self.connection.executescript(f"BEGIN; {TABLES} COMMIT;")
            layout = self.connection.execute("PRAGMA user_version").fetchone()[0]
        except BlockingIOError:
            raise InputError(f"{path}: another run writes to it; wait for it or name another --workdir") from None
        except sqlite3.DatabaseError as error:
            reason = f"cannot be used as a database ({first_line(error)}); free space, or move it away"
            raise InputError(f"{path}: {reason}") from None
        if layout != LAYOUT:
            raise InputError(f"{path}: has layout {layout}, this program writes layout {LAYOUT}; move it away")

    def __exit__(self, *error: object) -> None:
        self.connection.close()
        if self.lock:
            self.lock.close()

    def _store(self, *statements: tuple[str, Sequence[Any]]) -> None:
        """Execute statements, each for some rows of values, in one transaction."""
        try:
            with self.connection:
                for statement, rows in statements:
                    self.connection.executemany(statement, rows)
        except sqlite3.DatabaseError as error:  # a full disk, say
            raise InputError(f"{self.path}: cannot be written ({first_line(error)}); free space, then rerun") from None

    def add(self, facts: dict[str, Any], clear: np.ndarray | None = None, runs: Sequence[dict[str, Any]] = ()) -> None:
        """Store the facts of a configuration, one of them its "identity", in place of earlier ones.

        clear: cleartext logits (n,) of all test rows; None: those that are stored stay. runs: RUN_COLUMNS of each test
        row that has run encrypted.
        """
        identity, content = facts["identity"], None if clear is None else clear.astype(np.float64).tobytes()
        configuration = (
            "INSERT INTO configurations VALUES (?, ?, ?) ON CONFLICT (identity) "
            "DO UPDATE SET facts = excluded.facts, clear = ifnull(excluded.clear, clear)"
        )
        run = f"INSERT OR REPLACE INTO runs VALUES ({', '.join(f':{name}' for name in RUN_COLUMNS)})"
        rows = [{"identity": identity, **run} for run in runs]
        self._store((configuration, [(identity, json.dumps(facts, default=np.generic.item), content)]), (run, rows))

    def facts(self, identities: Collection[str]) -> list[dict[str, Any]]:
        """Return the facts of those configurations that are stored, in the order of `identities`."""
        stored = dict(self.connection.execute("SELECT identity, facts FROM configurations"))
        return [json.loads(stored[identity]) for identity in identities if identity in stored]

    def clear(self, identity: str) -> np.ndarray | None:
        """Return the cleartext logits (n,) of all test rows, None where they are not stored."""
        query = "SELECT clear FROM configurations WHERE identity = ?"
        (content,) = self.connection.execute(query, (identity,)).fetchone() or (None,)
        return None if content is None else np.frombuffer(content)

    def runs(self, identities: Collection[str]) -> pd.DataFrame:
        """Return a row for each test row that has run encrypted, in the order of `identities` and test rows."""
        table = pd.read_sql("SELECT * FROM runs ORDER BY test_row", self.connection, index_col="identity")
        return table.loc[[identity for identity in identities if identity in table.index]].reset_index()

    def compare(self, basis: str, row: dict[str, Any]) -> None:
        """Store a row about another model in place of an earlier one of its "name" on the same `basis`."""
        values = (basis, row["name"], json.dumps(row, default=np.generic.item))
        self._store(("INSERT OR REPLACE INTO comparison VALUES (?, ?, ?)", [values]))

    def comparison(self, basis: str) -> pd.DataFrame:
        """Return what `compare` has stored, in its order."""
        rows = self.connection.execute("SELECT facts FROM comparison WHERE basis = ? ORDER BY rowid", (basis,))
        return pd.DataFrame([json.loads(facts) for (facts,) in rows])
