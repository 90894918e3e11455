"""The file of the sessions: how it starts, what is written together, what a start refuses."""

import asyncio
import sqlite3
from pathlib import Path

import pytest
from msgspec import structs

from shoal.errors import RequestError, StartError
from shoal.storage import sessions
from shoal.storage.session_store import SessionStore
from shoal.storage.sessions import Ask, Begun, Context, Ending, Entry


def ask(store: SessionStore, label: str = "x", session: int = 1) -> Ask:
    return store.ask(tenant="t", session=session, label=label, retryable=False, digest=b"")


def ending(asked: Ask, begun: Begun, text: str) -> Ending:
    said = [Entry(message={"role": role, "content": text}, created=asked.now) for role in ("user", "assistant")]
    return Ending(
        ask=asked, begun=begun, keeps=True, entries=said, context=Context(), answer=b"{}", generated_tokens=1,
        now=asked.now,
    )  # fmt: skip


async def begin(store: SessionStore, label: str = "x") -> tuple[Ask, Begun]:
    asked = ask(store, label)
    begun = await store.begin(asked)
    assert isinstance(begun, Begun)
    return asked, begun


@pytest.mark.parametrize("content", [b"not a database at all, but long enough" * 99, b"\0" * 8192])
def test_a_file_that_is_no_store_is_refused_at_the_start(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.sqlite"
    path.write_bytes(content)
    with pytest.raises(StartError, match=r"mine\.sqlite.*--session_store"):
        SessionStore(path, 0).check()
    assert path.read_bytes() == content


@pytest.mark.parametrize("version", [0, 1])
def test_the_database_of_another_program_is_left_alone(tmp_path: Path, version: int) -> None:
    path = tmp_path / "theirs.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(f"CREATE TABLE sessions (x); PRAGMA user_version = {version}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StartError, match=r"theirs\.sqlite.*another program.*--session_store"):
        SessionStore(path, 0).check()
    assert path.read_bytes() == before


def test_a_store_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "newer.sqlite"
    SessionStore(path, 0).check()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StartError, match="newer Shoal"):
        SessionStore(path, 0).check()


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.sqlite"
    SessionStore(path, 0).check()
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(StartError, match="--session_store"):
        SessionStore(path, 0).check()


def test_nobody_else_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sessions.sqlite"
    SessionStore(path, 0).check()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_turn_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "s.sqlite", 0)

    async def scenario() -> None:
        asked, begun = await begin(store)
        broken = ending(asked, begun, "one")
        broken = structs.replace(broken, entries=[*broken.entries, Entry(message={"x": object()}, created=1)])
        with pytest.raises(TypeError):
            await store.end(broken)
        assert await store.read("t", 1) is None
        asked, begun = await begin(store)
        await store.end(ending(asked, begun, "two"))
        found = await store.read("t", 1)
        assert found is not None
        assert [entry.message["content"] for entry in found[1]] == ["two", "two"]

    asyncio.run(scenario())


def test_an_end_is_carried_out_though_its_caller_is_cancelled(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "s.sqlite", 0)

    async def scenario() -> None:
        asked, begun = await begin(store)
        task = asyncio.create_task(store.end(ending(asked, begun, "kept")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await store.read("t", 1) is not None
        assert await store.find_holder("t", 1) is None

    asyncio.run(scenario())


def test_a_begin_whose_caller_is_cancelled_leaves_no_lease(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "s.sqlite", 0)

    async def scenario() -> None:
        task = asyncio.create_task(store.begin(ask(store)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await begin(store)

    asyncio.run(scenario())


def test_two_turns_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "s.sqlite", 0)

    async def scenario() -> None:
        _, begun = await begin(store)
        with pytest.raises(RequestError, match="busy"):
            await store.begin(ask(store, "y"))
        store.give_up(begun.lease)
        store.give_up(begun.lease)
        await begin(store, "y")

    asyncio.run(scenario())


def test_leases_are_renewed_while_turns_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.storage.leases.RENEW_EVERY_S", 0.01)
    store = SessionStore(tmp_path / "s.sqlite", 0)

    async def scenario() -> None:
        keeper = asyncio.create_task(store.keep())
        await begin(store)

        def age(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE leases SET expires = 1")

        await store._database.run(age)
        for _ in range(2000):
            if await store.find_holder("t", 1) is not None:
                break
            await asyncio.sleep(0.005)
        else:
            pytest.fail("not renewed")
        keeper.cancel()

    asyncio.run(scenario())


def test_fresh_ids_are_not_those_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([6, 6, 7, 7, 8])
    monkeypatch.setattr("shoal.storage.sessions.secrets.randbelow", lambda _: next(drawn))
    store = SessionStore(tmp_path / "s.sqlite", 0)

    async def scenario() -> list[int]:
        numbers = []
        for _ in range(3):
            asked = ask(store, session=sessions.FRESH)
            begun = await store.begin(asked)
            assert isinstance(begun, Begun)
            numbers.append(begun.lease.session)
            if len(numbers) == 1:
                await store.end(ending(asked, begun, "kept"))
        return numbers

    assert asyncio.run(scenario()) == [7, 8, 9]
