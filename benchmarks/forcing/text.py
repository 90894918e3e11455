"""A fixed text: Sōseki's Botchan in Morri's translation, in the public domain, which sentencepiece's sdist carries."""

import hashlib
import sys
import tarfile
from pathlib import Path

from peers.progress import carry_out, say

TITLE = "Botchan (test/botchan.txt of sentencepiece 0.2.1's sdist)"
_SDIST = "sentencepiece==0.2.1"
_MEMBER = "sentencepiece-0.2.1/test/botchan.txt"
_SHA256 = "464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7"
_BEGIN, _END = "CHAPTER I\n", "End of Project Gutenberg's"


def public_text(cache: Path) -> str:
    """The novel without what stands around it. Downloaded once."""
    path = cache / "botchan.txt"
    if not path.exists():
        _download(path)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise RuntimeError(f"{path} is not the text that {_SDIST} carries: remove it")
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    return text[text.index(_BEGIN) : text.index(_END)]


def _download(path: Path) -> None:
    say(f"downloading {_SDIST} for its text, once")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    carry_out([*pip, "-d", path.parent, _SDIST], path.with_suffix(".log"))
    sdist = path.parent / f"{_SDIST.replace('==', '-')}.tar.gz"
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(_MEMBER)
        if member is None:
            raise RuntimeError(f"{_MEMBER} is no file")
        path.write_bytes(member.read())
    sdist.unlink()


def windows(ids: list[int], opening: tuple[int, ...], count: int, length: int) -> list[list[int]]:
    """The text in pieces that follow each other, each of ``length`` tokens with the model's opening before it."""
    step = length - len(opening)
    if count * step > len(ids):
        raise ValueError(f"the text has {len(ids)} tokens, not {count} × {step}")
    return [[*opening, *ids[at : at + step]] for at in range(0, count * step, step)]


def passages(ids: list[int], opening: tuple[int, ...], count: int, length: int) -> list[list[int]]:
    """Pieces from all over the text."""
    stride = (len(ids) - length) // (count - 1)
    return [[*opening, *ids[at * stride : at * stride + length - len(opening)]] for at in range(count)]
