"""Every flag of ``bin/api_server``: its meaning, its default, and which values it takes.

``command_line.py`` reads arguments by this table. A flag whose feature is still to come is in it too, with the
values that ask for nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. Its value is None where it is not given and has no default."""

    name: str
    help: str
    parse: Callable[[str], Any] = str
    """Raises ValueError with what is wanted."""
    default: Any = None
    metavar: str = ""
    aliases: tuple[str, ...] = ()
    many: bool = False
    """Takes one value or more; the result is a tuple."""
    switch: bool | None = None
    """Takes no value: what it sets ``target`` to."""
    target: str = ""
    """The name under which the value is kept, where it is not ``name``."""
    neutral: tuple[Any, ...] | None = None
    """Set where the feature is still to come: the values that do not ask for it. Others are refused."""

    @property
    def key(self) -> str:
        return self.target or self.name


def flags() -> Iterable[Flag]:
    """Every flag, in the order of the help."""
    return (flag for _, group in table() for flag in group)


def table() -> tuple[tuple[str, tuple[Flag, ...]], ...]:
    """Groups of flags, as ``--help`` shows them."""
    return (
        ("server", _SERVER),
        ("access", _ACCESS),
        ("model", _MODEL),
        ("batching and memory", _ENGINE),
        ("limits", _LIMITS),
        ("running it", _RUNNING),
    )


# --- kinds of values -------------------------------------------------------------------------------------


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    wanted = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() and text.isascii() else least - 1
        if value < least or (most is not None and value > most):
            raise ValueError(f"must be {wanted}")
        return value

    return parse


def _seconds(text: str) -> float:
    value = _float(text)
    if not 0 < value <= 86_400:
        raise ValueError("must be a number of seconds above 0 and at most 86400")
    return value


def _ttl(text: str) -> float:
    value = _float(text)
    if not 0 <= value <= 3.2e9:
        raise ValueError("must be a number of seconds, 0 for ever")
    return value


def _share(text: str) -> float:
    value = _float(text)
    if not 0 < value <= 1:
        raise ValueError("must be a share of the free memory, above 0 and at most 1")
    return value


def _factor(text: str) -> float:
    value = _float(text)
    if not (value == 0 or 1 <= value <= 1024):
        raise ValueError("must be 0 (the model's own) or a factor from 1 to 1024")
    return value


def _float(text: str) -> float:
    """NaN, which no comparison accepts, where the text is no number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _block_len(text: str) -> int:
    if text not in {"8", "16", "32", "64", "128", "256"}:
        raise ValueError("must be a power of two from 8 to 256")
    return int(text)


def _bytes(text: str) -> int:
    """``4294967296``, ``4G`` or ``4GiB``: all powers of 1024."""
    digits = text.rstrip("KMGTiBkmgtb")
    unit = text[len(digits) :].upper().removesuffix("B").removesuffix("I")
    if not digits.isdecimal() or unit not in _UNITS or int(digits) == 0:
        raise ValueError("must be a number of bytes, as 4294967296, 512MiB or 4GiB")
    return int(digits) << _UNITS[unit]


_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def _log_level(text: str) -> str:
    level = _LEVEL_NAMES.get(text.lower(), text.lower())
    return _one_of("debug", "info", "warning", "error", "critical")(level)


_LEVEL_NAMES: Final = {"notset": "debug", "warn": "warning", "fatal": "critical"}


def _named(text: str) -> str:
    if not text or not text.isprintable() or text != text.strip():
        raise ValueError("must be a name without control characters or white space at its ends")
    return text


def _key(text: str) -> str:
    """A key itself is checked by access.py: what is wrong with a flag's value is said with the value."""
    return _named(text) if text.startswith("@") else text


# --- the flags -------------------------------------------------------------------------------------------

_SERVER: Final = (
    Flag("server_name", "address to listen on", _named, "127.0.0.1", "HOST"),
    Flag("server_port", "port to listen on", _whole(1, 65535), 23333, "PORT"),
    Flag("frontends", "HTTP processes; 0: one for four cores, from 2 to 8", _whole(0, 256), 0, "N"),
    Flag("log_level", "debug, info, warning, error or critical", _log_level, "info", "LEVEL"),
    Flag("max_log_len", "most characters of a prompt in a log line; prompts are not logged", _whole(0), 0, "N"),
    Flag(
        "disable_fastapi_docs",
        "no pages that describe the API, and no chat page",
        aliases=("no_docs",),
        switch=True,
    ),
)

_ACCESS: Final = (
    Flag(
        "api_keys",
        "keys, one of which a client must send; @FILE reads a TOML file with names, scopes and limits. Keys given "
        "here are seen in lists of processes: prefer @FILE, or the environment's SHOAL_API_KEYS",
        _key,
        (),
        "KEY",
        many=True,
    ),
    Flag(
        "allow_origins", "origins whose pages may call the API from a browser", _named, (), "ORIGIN", many=True
    ),
    Flag("allow_credentials", "let browsers send credentials to --allow_origins", switch=True),
    Flag("allow_methods", "methods that browsers may use", _named, ("*",), "METHOD", many=True),
    Flag("allow_headers", "headers that browsers may send", _named, ("*",), "HEADER", many=True),
    Flag("ssl", "serve HTTPS; files also from SSL_KEYFILE and SSL_CERTFILE", switch=True),
    Flag("ssl_keyfile", "private key in PEM form, without a passphrase; implies --ssl", metavar="FILE"),
    Flag("ssl_certfile", "certificate in PEM form, with its chain; implies --ssl", metavar="FILE"),
    Flag("body_limit", "largest body of a request but for uploads", _bytes, 8 << 20, "BYTES"),
    Flag("file_limit", "largest file that is taken by /v1/files", _bytes, 512 << 20, "BYTES"),
)

_MODEL: Final = (
    Flag("model_name", "name under which the API serves it (default: from MODEL)", _named, metavar="NAME"),
    Flag(
        "model_format",
        "hf or gguf (default: seen from MODEL); awq and gptq are not available yet",
        _one_of("hf", "gguf", "awq", "gptq"),
        metavar="FORMAT",
    ),
    Flag(
        "device",
        "auto, cpu or cuda; auto takes GPUs where the CUDA library, torch's CUDA build and a GPU for each rank are "
        "there, else the processor",
        _one_of("auto", "cpu", "cuda"),
        "auto",
    ),
    Flag(
        "deterministic",
        "a request's tokens do not depend on what else is computed with it: on a CPU always so, on GPUs at the cost of "
        "their fastest instructions for prompts",
        switch=True,
    ),
    Flag(
        "dtype",
        "auto, float32 (only on a CPU), bfloat16, or float16 (only on a GPU); auto takes bfloat16 where compiled "
        "kernels run",
        _one_of("auto", "float32", "bfloat16", "float16"),
        "auto",
    ),
    Flag(
        "session_len",
        "most tokens of prompt and answer together (default: the model's)",
        _whole(2),
        metavar="N",
    ),
    Flag(
        "rope_scaling_factor",
        "stretches the context by this factor; 0: the model's own",
        _factor,
        0.0,
        "FACTOR",
    ),
    Flag("chat_template", "a Jinja file in place of the model's own chat template", metavar="FILE"),
    Flag(
        "tool_call_parser",
        "how tool calls are read from answers: auto (from the chat template), hermes, llama3, mistral, internlm",
        _one_of("auto", "none", "hermes", "qwen", "llama3", "mistral", "internlm"),
        "auto",
        "NAME",
    ),
    Flag(
        "reasoning_parser",
        "how reasoning is split from answers: auto (from the chat template), think, none",
        _one_of("auto", "none", "think", "deepseek-r1", "qwen3"),
        "auto",
        "NAME",
    ),
    Flag(
        "task", "generate, or embed: serve vectors at /v1/embeddings", _one_of("generate", "embed"), "generate"
    ),
    Flag("adapters", "LoRA adapters", metavar="PATH", many=True, neutral=()),
    Flag(
        "quantization",
        "weights as integers: auto (where the file has them so), none, w8 or w4 (quantised at load)",
        _one_of("auto", "none", "w8", "w4"),
        "auto",
    ),
    Flag("revision", "revision of a model on the hub", metavar="NAME", neutral=()),
    Flag("download_dir", "where models from the hub are kept", metavar="FOLDER", neutral=()),
    Flag("trust_remote_code", "refused: Shoal runs no code from model folders", switch=True),
)

_ENGINE: Final = (
    Flag("tp", "processes (ranks) that share the model, on GPUs one each", _whole(1, 64), 1, "N"),
    Flag("dp", "replicas of the model", _whole(1), metavar="N", neutral=(1,)),
    Flag(
        "instance_num",
        "most concurrent sequences; a lower number takes less memory",
        _whole(1, 65536),
        64,
        "N",
        aliases=("max_batch_size",),
    ),
    Flag("threads", "compute threads of all ranks together; 0: one a core", _whole(0, 4096), 0, "N"),
    Flag("max_prefill_token_num", "most tokens computed in a step", _whole(1), 512, "N"),
    Flag(
        "speculative_num_draft_tokens",
        "most tokens of a sequence that a step guesses from what came before and checks, which never changes answers; "
        "0: none (on GPUs always)",
        _whole(0, 255),
        15,
        "N",
    ),
    Flag(
        "cache_max_entry_count", "share of the free memory that may hold keys and values", _share, 0.8, "SHARE"
    ),
    Flag(
        "cache_bytes", "most memory for keys and values on a CPU, all ranks together", _bytes, 4 << 30, "BYTES"
    ),
    Flag("cache_block_seq_len", "tokens in a block of the cache", _block_len, 16, "N"),
    Flag("enable_prefix_caching", "equal beginnings of prompts are computed once (the default)", switch=True),
    Flag(
        "no_enable_prefix_caching",
        "every prompt is computed whole",
        switch=False,
        target="enable_prefix_caching",
        aliases=("no_prefix_caching",),
    ),
    Flag(
        "quant_policy",
        "keys and values in the cache: 0 plain, 8 int8, 4 int4 (in LMDeploy of 2023, 4 meant int8)",
        _one_of("0", "4", "8"),
        "0",
    ),
    Flag(
        "kv_cache_dtype",
        "element type of the cache: auto (that of the matrices), bfloat16, on a CPU also float32 and int8, on a GPU "
        "also float16 and fp8",
        _one_of("auto", "float32", "bfloat16", "float16", "fp8", "int8"),
        "auto",
    ),
)

_LIMITS: Final = (
    Flag("max_queued_requests", "waiting requests beyond which new ones get 429", _whole(1), 1024, "N"),
    Flag(
        "max_queued_tokens",
        "tokens of waiting requests beyond which new ones get 429",
        _whole(1),
        4_000_000,
        "N",
    ),
    Flag(
        "max_concurrent_requests",
        "open HTTP requests beyond which new ones get 429 (0: any number)",
        _whole(0),
        0,
        "N",
    ),
    Flag("drain_timeout", "seconds that running requests are given at shutdown", _seconds, 30.0, "SECONDS"),
    Flag(
        "step_timeout",
        "seconds after which a step that has not ended counts as hung",
        _seconds,
        60.0,
        "SECONDS",
    ),
    Flag(
        "data_dir",
        "folder of what outlives the server: sessions, responses, files, batches (default: shoal/PORT in "
        "$XDG_STATE_HOME or ~/.local/state)",
        metavar="FOLDER",
    ),
    Flag("session_store", "file that keeps interactive sessions (default: in --data_dir)", metavar="FILE"),
    Flag(
        "session_ttl",
        "seconds after which an idle session is forgotten (0: never)",
        _ttl,
        604_800.0,
        "SECONDS",
    ),
    Flag(
        "unknown_fields",
        "refuse: a field of a request that is not known is an error; warn: it is reported",
        _one_of("refuse", "warn"),
        "refuse",
    ),
)

_RUNNING: Final = (
    Flag("config", "a TOML file with flags as keys; the command line wins over it", metavar="FILE"),
    Flag("daemon", "run in the background; returns when the server is ready, or with its error", switch=True),
    Flag("pid_file", "where the server's process id is written", metavar="FILE"),
    Flag("log_file", "where the log goes instead of standard error", metavar="FILE"),
)
