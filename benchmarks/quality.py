"""What rounding costs: each weight layout and KV format, ours and llama.cpp's, against the dequantised fp32 model.

    python benchmarks/quality.py [--model smollm2|gemma3-270m|all] [--windows 40] [--window 512]

A public-domain novel is put through every model as the same token ids in the same windows (teacher forcing), each of
which starts afresh. The reference is our decoder with every weight of the file as a float32, and a float32 cache.
llama.cpp is built and the text downloaded under --cache the first time. Ctrl-C ends the windows early. Tables go to
stdout, progress to stderr.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from forcing import llama, ours, text
from forcing.scores import Reference, Scores
from forcing.teacher import Teacher
from peers import llama_cpp, models
from peers.progress import say
from serve import ROOT, processor

from shoal.config import CacheDtype, Quantization
from shoal.cuda_ext import ops
from shoal.tokenizer import load_tokenizer
from shoal.workers.dtype import resolve_dtype
from shoal.workers.memory import return_freed_memory

_LAYOUTS: Final[dict[Quantization, str]] = {
    "auto": "the file's integers",
    "none": "bfloat16",
    "w8": "w8",
    "w4": "w4",
}
_CACHES: Final[tuple[CacheDtype, ...]] = ("float32", "bfloat16", "int8")
_LLAMA_CACHES: Final = ("f16", "q8_0")
_LLAMA_KINDS: Final = ("F32", "BF16", "Q8_0", "Q4_1")
_PROMPTS: Final = 20
_PROMPT_TOKENS: Final = 32
_FORCED_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Judged:
    """A teacher, and what came of it."""

    teacher: Teacher
    windows: Scores = field(default_factory=Scores)
    prompts: Scores = field(default_factory=Scores)


def main() -> None:
    """Prints two tables for each model."""
    arguments = parse()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    ops.set_threads(arguments.threads)
    print(f"{processor()}; text: {text.TITLE}\n")
    for name in ("smollm2", "gemma3-270m") if arguments.model == "all" else (arguments.model,):
        judge(name, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all", choices=["smollm2", "gemma3-270m", "all"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "peers", help="peers, models and the text"
    )
    parser.add_argument("--layouts", default=",".join(_LAYOUTS), help="which of ours")
    parser.add_argument(
        "--kinds", default=",".join(_LLAMA_KINDS), help="llama.cpp's, besides the file as it is"
    )
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's programs, instead of building them")
    parser.add_argument("--no_llama", action="store_true", help="only ours")
    return parser.parse_args()


def judge(name: str, arguments: argparse.Namespace) -> None:
    """All teachers on one model, side by side, and their tables."""
    gguf = models.gguf_file(name, arguments.cache, lambda: programs(arguments))
    tokenizer = load_tokenizer(str(gguf))
    ids = tokenizer.encode(text.public_text(arguments.cache), add_special=False)
    windows = text.windows(ids, tokenizer.opening, arguments.windows, arguments.window)
    prompts = text.passages(ids, tokenizer.opening, _PROMPTS, _PROMPT_TOKENS + _FORCED_TOKENS)
    with chosen_teachers(gguf, arguments) as (reference, teachers):
        judged = [Judged(teacher) for teacher in (reference, *teachers)]
        for number, prompt in enumerate(prompts):
            say(f"{name}: prompt {number + 1} of {len(prompts)}")
            for one, scores in zip(judged, compare(prompt, _PROMPT_TOKENS - 1, judged), strict=True):
                one.prompts.add(scores)
        with suppress(KeyboardInterrupt):
            for number, window in enumerate(windows):
                say(f"{name}: window {number + 1} of {len(windows)}")
                for one, scores in zip(judged, compare(window, 0, judged), strict=True):
                    one.windows.add(scores)
    print(f"{models.TITLES[name]}: {judged[0].windows.count} tokens in windows of {arguments.window}\n")
    print(f"{windows_table(judged)}\n")
    print(
        f"{_PROMPTS} prompts of {_PROMPT_TOKENS} tokens, and the logits at the {_FORCED_TOKENS} that follow\n"
    )
    print(f"{prompts_table(judged[1:])}\n", flush=True)


def programs(arguments: argparse.Namespace) -> Path:
    chosen: Path = arguments.llama or llama_cpp.programs(arguments.cache)
    return chosen


@contextmanager
def chosen_teachers(gguf: Path, arguments: argparse.Namespace) -> Iterator[tuple[Teacher, list[Teacher]]]:
    """The reference, and those that are measured by it."""
    length = max(arguments.window, _PROMPT_TOKENS + _FORCED_TOKENS)
    reference = ours.Ours("float32", *ours.load(gguf, "none", torch.float32), "float32", length)
    teachers: list[Teacher] = []
    for layout in arguments.layouts.split(","):
        title = _LAYOUTS[layout]
        say(f"loading {title}")
        loaded = ours.load(gguf, layout, resolve_dtype("auto"))
        teachers += [ours.Ours(title, *loaded, cache, length) for cache in _CACHES]
    peers = [] if arguments.no_llama else llama_teachers(gguf, arguments, length)
    try:
        yield reference, [*teachers, *peers]
    finally:
        for peer in peers:
            peer.close()


def llama_teachers(gguf: Path, arguments: argparse.Namespace, length: int) -> list[llama.Llama]:
    """The same file with each cache, and its weights in other formats with the cache that llama.cpp takes unasked."""
    folder, cache, threads = programs(arguments), arguments.cache, arguments.threads
    program = llama.compiled(folder, cache)
    teachers = [llama.Llama(program, "the file", gguf, kind, threads, length) for kind in _LLAMA_CACHES]
    for kind in filter(None, arguments.kinds.split(",")):
        file = llama.requantised(folder, gguf, kind, cache)
        teachers.append(llama.Llama(program, kind, file, _LLAMA_CACHES[0], threads, length))
    return teachers


def compare(ids: list[int], first: int, judged: Sequence[Judged]) -> list[Scores]:
    """Scores of the positions from ``first`` on that have a token after them; the first of the judged is the
    reference."""
    own, *others = (one.teacher for one in judged)
    kept = torch.cat([rows.clone() for rows in own.logits(ids)])[first:-1]
    reference = Reference.of(kept, torch.tensor(ids[first + 1 :]))
    found = [reference.judge(kept)]
    for teacher in others:
        scores, begin = Scores(), -first
        for rows in teacher.logits(ids):
            part = rows[max(0, -begin) : max(0, len(kept) - begin)]
            if len(part):
                at = max(0, begin)
                scores.add(reference.rows(at, at + len(part)).judge(part))
            begin += len(rows)
        found.append(scores)
    return_freed_memory()
    return found


def windows_table(judged: Sequence[Judged]) -> str:
    """Markdown."""
    lines = ["| weights | KV | perplexity | mean KL | ± | top-1 agrees |", "| --- |" + " --- |" * 5]
    for one in judged:
        scores = one.windows
        cells = [
            *(one.teacher.name, one.teacher.cache, f"{scores.perplexity:.3f}"),
            *(f"{scores.mean_divergence:.6f}", f"{scores.divergence_error:.6f}", f"{scores.agreement:.2%}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prompts_table(judged: Sequence[Judged]) -> str:
    """Markdown."""
    lines = ["| weights | KV | RMS error | largest error | mean KL |", "| --- |" + " --- |" * 4]
    for one in judged:
        scores = one.prompts
        cells = [
            *(one.teacher.name, one.teacher.cache),
            *(f"{scores.rms_error:.5f}", f"{scores.largest:.3f}", f"{scores.mean_divergence:.6f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
