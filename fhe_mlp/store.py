"""The results of step 5 in SQLite: what is done, what is missing.

One transaction for each finished configuration and batch, so that a run that is cut short loses only what it was
computing. Rows of another network, data set, setting or version have another identity and are never mixed.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from fhe_mlp.cli import InputError, first_line

LAYOUT = 2  # of the tables below, kept as SQLite's user_version
FINISHED = ("ok", "cannot compile")  # a configuration of another status is tried again
PREDICTION_COLUMNS = (
    "identity batch test_row record aami label decision_clear decision_fhe output_clear output_fhe encrypt_seconds "
    "run_seconds decrypt_seconds input_bytes output_bytes"
).split()
TABLES = f"""
CREATE TABLE results (identity TEXT, batch INTEGER, status TEXT, facts TEXT, PRIMARY KEY (identity, batch));
CREATE TABLE predictions ({", ".join(PREDICTION_COLUMNS)}, PRIMARY KEY (identity, batch, test_row));
CREATE TABLE comparison (basis TEXT, name TEXT, facts TEXT, PRIMARY KEY (basis, name));
PRAGMA user_version = {LAYOUT};
"""


class Store:
    """The database in `path`, made where there is none. Open for writing it keeps every other writer out.

    write=False reads it and, where there is none, an empty one in memory. Raises InputError when another run writes to
    it, or for a file that is no database of this layout.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path = path
        try:
            self.connection = sqlite3.connect(path if write or path.exists() else ":memory:", 0, isolation_level=None)
            if write:
                self.connection.execute(
                    "PRAGMA locking_mode = EXCLUSIVE"
                )  # held until it is closed or the process ends
                self.connection.execute("BEGIN EXCLUSIVE")
                self.connection.execute("COMMIT")
            if not self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self.connection.executescript(f"BEGIN; {TABLES} COMMIT;")
            layout = self.connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                reason = "another run writes to it; wait for it or name another --workdir"
            else:
                reason = f"cannot be used as a database ({first_line(error)}); free space, or move it away"
            raise InputError(f"{path}: {reason}") from None
        if layout != LAYOUT:
            raise InputError(f"{path}: has layout {layout}, this program writes layout {LAYOUT}; move it away")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        try:
            self.connection.execute("BEGIN")
            yield self.connection
            self.connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:  # a full disk, say; what was not committed is rolled back on closing
            raise InputError(f"{self.path}: cannot be written ({first_line(error)}); free space, then rerun") from None

    def finished(self, identities: Collection[str]) -> set[tuple[str, int]]:
        """Identity and batch of what needs no run any more."""
        rows = self.connection.execute("SELECT identity, batch, status FROM results").fetchall()
        return {(i, batch) for i, batch, status in rows if i in set(identities) and status in FINISHED}

    def add(self, batch: int, row: dict[str, Any], predictions: pd.DataFrame | None) -> None:
        """Keep what one configuration gave on one batch, in place of an earlier attempt."""
        identity = row["identity"]
        with self._transaction() as connection:
            facts = json.dumps({**row, "batch": batch}, default=lambda value: value.item())
            connection.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", (identity, batch, row["status"], facts)
            )
            connection.execute("DELETE FROM predictions WHERE identity = ? AND batch = ?", (identity, batch))
            if predictions is not None:
                values = predictions.assign(identity=identity, batch=batch)[PREDICTION_COLUMNS].astype(object)
                marks = ", ".join("?" * len(PREDICTION_COLUMNS))
                connection.executemany(f"INSERT INTO predictions VALUES ({marks})", values.to_numpy().tolist())

    def results(self, identities: Collection[str], batch: int | None = None) -> pd.DataFrame:
        """One row a configuration and batch, in the order of `identities`, then of the batches (or of one batch)."""
        order = {identity: number for number, identity in enumerate(identities)}
        query = "SELECT facts FROM results WHERE batch = ifnull(?, batch) ORDER BY batch"
        rows = [json.loads(facts) for (facts,) in self.connection.execute(query, (batch,))]
        rows = sorted((r for r in rows if r["identity"] in order), key=lambda r: order[r["identity"]])
        return pd.DataFrame(rows, columns=None if rows else ["identity", "batch", "status"])

    def predictions(self, identities: Collection[str], batch: int | None = None) -> pd.DataFrame:
        """One row a prediction, in the order of `identities`, batches (or of one batch) and test rows."""
        query = "SELECT * FROM predictions WHERE batch = ifnull(?, batch) ORDER BY batch, test_row"
        table = pd.read_sql(query, self.connection, params=(batch,))
        order = {identity: number for number, identity in enumerate(identities)}
        table = table[table["identity"].isin(order)]
        return table.sort_values("identity", key=lambda column: column.map(order), kind="stable", ignore_index=True)

    def compare(self, basis: str, row: dict[str, Any]) -> None:
        """Keep a row about another model, in place of an earlier one of its "name" on the same `basis`."""
        with self._transaction() as connection:
            facts = json.dumps(row, default=lambda value: value.item())
            connection.execute("INSERT OR REPLACE INTO comparison VALUES (?, ?, ?)", (basis, row["name"], facts))

    def comparison(self, basis: str) -> pd.DataFrame:
        """What `compare` has kept, in the order in which it came."""
        rows = self.connection.execute("SELECT facts FROM comparison WHERE basis = ? ORDER BY rowid", (basis,))
        return pd.DataFrame([json.loads(facts) for (facts,) in rows])
