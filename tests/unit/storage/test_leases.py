"""Leases of sessions: who holds one, who has died with it, who has lost it."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shoal.errors import RequestError
from shoal.storage import leases

NOW = 1000.0


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    connection.execute(leases.SCHEMA)
    yield connection
    connection.close()


def owned_by(connection: sqlite3.Connection, owner: str) -> None:
    connection.execute("UPDATE leases SET owner = ?", (owner,))


def test_one_turn_at_a_time_for_a_session_of_a_tenant(connection: sqlite3.Connection) -> None:
    lease = leases.take(connection, "a", 1, "first", NOW)
    with pytest.raises(RequestError) as caught:
        leases.take(connection, "a", 1, "second", NOW)
    assert (caught.value.status, caught.value.retry_after_s) == (409, 1)
    assert "first" in caught.value.message
    leases.take(connection, "a", 2, "third", NOW)
    leases.take(connection, "b", 1, "fourth", NOW)
    assert leases.give_back(connection, lease)
    assert not leases.give_back(connection, lease), "twice"
    leases.take(connection, "a", 1, "second", NOW)


def test_a_lease_that_is_not_renewed_is_lost(connection: sqlite3.Connection) -> None:
    first = leases.take(connection, "a", 1, "first", NOW)
    leases.renew(connection, [first.token], NOW + 20)
    late = NOW + 20 + leases.LIFETIME_S
    assert leases.find_holder(connection, "a", 1, late - 0.1) is not None
    assert leases.find_holder(connection, "a", 1, late) is None
    second = leases.take(connection, "a", 1, "second", late)
    leases.renew(connection, [first.token], late + 20)
    assert not leases.give_back(connection, first), "who was too late ends nobody's turn"
    holder = leases.find_holder(connection, "a", 1, late + 1)
    assert holder is not None
    assert holder.label == "second"
    assert leases.give_back(connection, second)


def test_the_lease_of_a_dead_process_is_free_at_once(connection: sqlite3.Connection) -> None:
    leases.take(connection, "a", 1, "first", NOW)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = leases.this_process(process.pid)
        owned_by(connection, owner)
        assert leases.find_holder(connection, "a", 1, NOW) is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert leases.find_holder(connection, "a", 1, NOW) is None, "a zombie is dead"
    assert leases.find_holder(connection, "a", 1, NOW) is None
    leases.sweep(connection, NOW)
    assert connection.execute("SELECT count(*) FROM leases").fetchone()[0] == 0


def test_a_pid_that_was_given_again_is_another_process() -> None:
    boot, namespace, pid, ticks = leases.this_process(os.getpid()).split(" ")
    assert leases.is_alive(f"{boot} {namespace} {pid} {ticks}")
    assert not leases.is_alive(f"{boot} {namespace} {pid} {int(ticks) - 1}")
    assert not leases.is_alive(f"other-boot {namespace} {pid} {ticks}")
    assert leases.is_alive(f"{boot} pid:[1] {pid} {int(ticks) - 1}"), "another container: its time tells"


def test_a_sweep_leaves_running_turns_alone(connection: sqlite3.Connection) -> None:
    leases.take(connection, "a", 1, "runs", NOW)
    leases.take(connection, "a", 2, "hangs", NOW - 100)
    leases.sweep(connection, NOW)
    assert [row["label"] for row in connection.execute("SELECT label FROM leases")] == ["runs"]
