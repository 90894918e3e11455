"""``python session_worker.py STORE SEED TURNS``: a process that takes turns in sessions 1 to 3, and may be killed.

Writes ``try TEXT`` before a turn and ``end TEXT`` once it is recorded. While it holds a lease it also holds a lock of
the operating system, which must be free.
"""

import asyncio
import fcntl
import os
import random
import signal
import sys
from io import FileIO
from pathlib import Path

from shoal.errors import RequestError
from shoal.storage import leases
from shoal.storage.session_store import SessionStore
from shoal.storage.sessions import Begun, Context, Ending, Entry


def say(*words: str) -> None:
    """At once: the next moment may be the last one."""
    os.write(1, (" ".join(words) + "\n").encode())


def take_lock(lock: FileIO) -> None:
    """Fails where a living process has it. A killed one's is freed a moment after it counts as dead."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().decode()
            if holder and leases.is_alive(holder):
                raise
        else:
            lock.truncate(0)
            lock.write(leases.this_process(os.getpid()).encode())
            return


async def take_turn(store: SessionStore, dice: random.Random, folder: Path, text: str) -> None:
    """One turn, which may be recorded, given up or killed."""
    session = dice.randint(1, 3)
    ask = store.ask(tenant="t", session=session, label=text, retryable=False, digest=b"")
    try:
        begun = await store.begin(ask)
    except RequestError as error:
        if error.status != 409:
            raise
        return
    assert isinstance(begun, Begun)
    with (folder / f"lock-{session}").open("a+b", buffering=0) as lock:
        take_lock(lock)
        await asyncio.sleep(dice.random() * 0.004)
        fate = dice.random()
        if fate < 0.1:
            os.kill(os.getpid(), signal.SIGKILL)
    if fate < 0.25:
        store.give_up(begun.lease)
        return
    said = [Entry(message={"role": role, "content": text}, created=ask.now) for role in ("user", "assistant")]
    say("try", text)
    ended = store.end_soon(
        Ending(
            ask=ask,
            begun=begun,
            keeps=True,
            entries=said,
            context=Context(),
            answer=b"{}",
            generated_tokens=1,
            now=ask.now,
        )
    )
    if fate < 0.35:
        await asyncio.sleep(dice.random() * 0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.wrap_future(ended)
    say("end", text)


async def main() -> None:
    """Takes turns until it is killed or done."""
    path, seed, turns = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    dice, store = random.Random(seed), SessionStore(path, 0)
    for number in range(turns):
        await take_turn(store, dice, path.parent, f"{seed}-{number}")


asyncio.run(main())
