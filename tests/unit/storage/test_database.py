"""The SQLite file of a store: versions, transactions, errors."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.errors import RequestError, StartError
from shoal.storage.database import Database

ONE = "CREATE TABLE a (x INTEGER); INSERT INTO a VALUES (1)"
TWO = "ALTER TABLE a ADD COLUMN y INTEGER"
OPENERS = 6


def test_a_newer_program_brings_an_older_file_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    older = Database(path, (ONE,))
    older.run_here(lambda connection: connection.execute("INSERT INTO a VALUES (2)"))
    older.close()
    newer = Database(path, (ONE, TWO))
    rows = newer.run_here(lambda connection: [tuple(row) for row in connection.execute("SELECT x, y FROM a")])
    newer.close()
    assert rows == [(1, None), (2, None)]


def test_an_older_program_refuses_a_newer_file(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    Database(path, (ONE, TWO)).check()
    with pytest.raises(StartError, match=r"store\.sqlite.*newer Shoal"):
        Database(path, (ONE,)).check()


@pytest.mark.parametrize("content", [b"not a database, but long enough to look at" * 40, b"\0" * 4096])
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(content)
    with pytest.raises(StartError, match=r"store\.sqlite"):
        Database(path, (ONE,)).check()
    assert path.read_bytes() == content


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    database = Database(tmp_path / "store.sqlite", (ONE,))

    def insert_and_fail(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO a VALUES (7)")
        raise RequestError(409, "no")

    with pytest.raises(RequestError) as caught:
        database.run_here(insert_and_fail)
    assert caught.value.status == 409
    assert database.run_here(lambda connection: connection.execute("SELECT COUNT(*) FROM a").fetchone()[0]) == 1
    database.close()


def test_a_fault_of_the_file_is_a_503(tmp_path: Path) -> None:
    database = Database(tmp_path / "store.sqlite", (ONE,))
    with pytest.raises(RequestError) as caught:
        database.run_here(lambda connection: connection.execute("INSERT INTO missing VALUES (1)"))
    assert (caught.value.status, caught.value.code) == (503, "store_failed")
    database.close()


def test_a_new_file_is_opened_by_many_at_once(tmp_path: Path) -> None:
    at_once = threading.Barrier(OPENERS)

    def write(path: Path) -> None:
        database = Database(path, ["CREATE TABLE a (x)"])
        at_once.wait()
        database.run_here(lambda connection: connection.execute("INSERT INTO a VALUES (1)"))
        database.close()

    with ThreadPoolExecutor(OPENERS) as openers:
        for number in range(100):
            list(openers.map(write, [tmp_path / f"{number}.sqlite"] * OPENERS))
