"""What a person who waits sees: lines on stderr, so that stdout holds the tables alone."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def carry_out(command: Sequence[str | Path], log: Path) -> None:
    """Runs a step of a build, its output appended to ``log``. Raises RuntimeError with the output's end."""
    words = [str(word) for word in command]
    say(f"  {' '.join(words)}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{words[0]} failed with {code}; see {log}:\n{tail(log)}")


def tail(log: Path) -> str:
    return log.read_bytes()[-3000:].decode(errors="replace")
