"""The texts of a start: which phase it is in, and what to do with a server that is ready."""

from shoal import __version__
from shoal.config import Settings
from shoal.messages import Limits, RankStatus, Stats

_PHASES = ("absent", "loading", "loaded", "warming", "ready")
_NAMES = {
    "absent": "starting the processes",
    "loading": "loading the weights",
    "loaded": "allocating the cache",
    "warming": "warming up",
    "ready": "waiting for the frontends",
}


def url(settings: Settings) -> str:
    """Where a client on this machine reaches the server."""
    host, port = reachable(settings)
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def reachable(settings: Settings) -> tuple[str, int]:
    """Host and port that a process of this machine connects to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.server_name, settings.server_name)
    return host, settings.server_port


def phase(stats: Stats | None) -> tuple[str, int, int]:
    """(what is going on, done, total): the rank that is furthest behind says which phase it is."""
    if stats is None or not stats.ranks:
        return _NAMES["absent"], 0, 0
    slowest = min((_place(rank) for rank in stats.ranks), default=0)
    name = _PHASES[slowest]
    behind = [rank for rank in stats.ranks if _place(rank) == slowest]
    return _NAMES[name], sum(rank.done for rank in behind), sum(rank.total for rank in behind)


def ready(settings: Settings, limits: Limits) -> str:
    """The address, what fits, and a first request to try."""
    tokens = limits.num_blocks * limits.block_size
    whole = min(settings.instance_num, tokens // limits.session_len)
    address = url(settings)
    key = "-H 'Authorization: Bearer KEY' " if settings.api_keys else ""
    route, body = _first_request(settings)
    return (
        f"Shoal {__version__} is ready\n"
        f"  URL        {address}\n"
        f"  model      {settings.model_name} ({settings.model})\n"
        f"  KV cache   {limits.num_blocks} blocks of {limits.block_size} tokens: {tokens} tokens\n"
        f"  sequences  {limits.instance_num} at once; {whole} fit with all of their "
        f"{limits.session_len} tokens of context\n"
        f"Try it:\n"
        f"  curl -N {address}{route} {key}-H 'Content-Type: application/json' -d '{body}'\n"
    )


def _first_request(settings: Settings) -> tuple[str, str]:
    """A route, and a body for it."""
    if settings.task == "embed":
        return (
            "/v1/embeddings",
            f'{{"model": "{settings.model_name}", "input": "The capital of France is Paris."}}',
        )
    question = '{"role": "user", "content": "What is the capital of France?"}'
    body = f'{{"model": "{settings.model_name}", "stream": true, "messages": [{question}]}}'
    return "/v1/chat/completions", body


def _place(rank: RankStatus) -> int:
    return _PHASES.index(rank.phase) if rank.phase in _PHASES else 0
