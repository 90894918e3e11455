"""How near to the machine's limits each server came that serves the same file."""

from pathlib import Path

from ceilings import Ceilings

from peers.models import weights_read
from peers.results import PREFILL, Results, tpot

_COLUMNS = (
    "decode, weights beyond the caches",
    "decode, 100 MB buffer",
    "prefill, int8 vectors",
    "prefill, int8 tiles",
)


def limits_table(gguf: Path, results: Results, ceilings: Ceilings) -> str:
    """Markdown. Decoding is one stream's, between its tokens; vLLM is left out, since it reads other weights."""
    weight_bytes, prompt_ops = weights_read(gguf)
    limits = [1e9 * ceilings.best(name) / weight_bytes for name in ("read_large", "read_100mb")]
    vectors, tiles = ceilings.best("int8_avx2", "int8_avx_vnni", "int8_avx512"), ceilings.best("int8_amx")
    limits += [1e9 * rate / prompt_ops for rate in (vectors, tiles)]
    lines = [
        f"A decoded token reads {weight_bytes / 1e6:.0f} MB of weights, a prompt's token takes "
        f"{prompt_ops / 1e9:.2f} GOP; of these limits reached:",
        "",
        f"| | {' | '.join(_COLUMNS)} |",
        "| --- |" + " --- |" * len(_COLUMNS),
        f"| limit, tok/s | {' | '.join(f'{limit:.0f}' if limit else '–' for limit in limits)} |",
    ]
    for name in results.servers():
        tpot_ms, prefill = results.median(tpot(1), name), results.median(PREFILL, name)
        if "bf16" not in name:
            decode = 1000 / tpot_ms if tpot_ms else 0.0
            rates = (decode, decode, prefill, prefill)
            lines.append(f"| {name} | {' | '.join(map(_share, rates, limits))} |")
    return "\n".join(lines)


def _share(rate: float, limit: float) -> str:
    return f"{100 * rate / limit:.0f} %" if rate and limit else "–"
