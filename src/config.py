"""The settings of one server: frozen, checked once by ``flags.py``, handed to every process as a JSON file.

"auto" values are resolved by the supervisor before any child starts; children never see them, but for what
only a loaded model can tell (``session_len`` = 0: the model's own).
"""

from pathlib import Path
from typing import Final, Literal

import msgspec

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"]
Quantization = Literal["auto", "none", "w8", "w4"]
"""auto: integers where the file has them."""
Scope = Literal["inference", "metrics", "admin"]
SCOPES: Final[tuple[Scope, ...]] = ("inference", "metrics", "admin")


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A key that clients may send. The key itself is kept nowhere: only its digest is."""

    name: str
    """Names the tenant in logs, quotas and stores."""
    digest: str
    """SHA-256 of the key, hexadecimal."""
    scopes: tuple[Scope, ...] = SCOPES
    max_concurrent: int = 0
    """Most open requests; 0: any number."""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Of prompts and answers; 0: any number."""
    priority: int | None = None
    """The most urgent priority (the lowest number) that its requests may ask for; None: any."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the command line says; see ``bin/api_server --help`` for the meaning of each."""

    model: str
    """A Hugging Face folder or a .gguf file, already resolved to an existing path."""
    model_name: str
    """The id under which the API serves it."""
    run_dir: str
    """Sockets, settings file, lock; mode 0700, a short path."""
    server_name: str = "127.0.0.1"
    server_port: int = 23333
    frontends: int = 2
    tp: int = 1
    instance_num: int = 64
    session_len: int = 0
    """0: what the model declares."""
    device: Device = "auto"
    """auto: GPUs where they can be used, else the processor; each rank finds out for itself."""
    deterministic: bool = False
    """On GPUs: one order of summation whatever the number of rows. On a CPU it is always so."""
    dtype: Dtype = "auto"
    quantization: Quantization = "auto"
    kv_cache_dtype: CacheDtype = "auto"
    threads: int = 0
    """Compute threads of all ranks together; 0: one a core."""
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 16
    cache_bytes: int = 4 << 30
    """Upper limit of KV memory on a CPU, all ranks together."""
    enable_prefix_caching: bool = True
    max_prefill_token_num: int = 512
    """Token budget of a step."""
    speculative_num_draft_tokens: int = 15
    """Most tokens guessed of a sequence in a step; 0: none."""
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_000_000
    drain_timeout_s: float = 30.0
    step_timeout_s: float = 60.0
    chat_template: str = ""
    """Path of a Jinja file that replaces the model's own template."""
    rope_scaling_factor: float = 0.0
    task: Literal["generate", "embed"] = "generate"
    """``embed``: the model's hidden states are served as vectors, and it does not chat."""
    pooling: Literal["mean", "last"] = "mean"
    """How they become one, unless a request says otherwise: as the model's files have it."""
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    data_dir: str = ""
    """What outlives the process: sessions, responses, files, batches."""
    session_store: str = ""
    """SQLite file of the interactive sessions; empty: in ``data_dir``."""
    session_ttl_s: float = 0.0
    """Idle sessions older than this are forgotten; 0: never."""
    unknown_fields: Literal["refuse", "warn"] = "refuse"
    docs: bool = True
    """Whether the pages that describe the API are served."""
    body_limit_bytes: int = 8 << 20
    file_limit_bytes: int = 512 << 20
    max_concurrent_requests: int = 0
    """Open HTTP requests of all frontends together; 0: any number."""
    allow_origins: tuple[str, ...] = ()
    allow_credentials: bool = False
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    ssl_keyfile: str = ""
    ssl_certfile: str = ""
    """Both or none: HTTPS."""
    api_keys: tuple[ApiKey, ...] = ()
    log_level: str = "info"
    max_log_len: int = 0


def save(settings: Settings, path: Path) -> None:
    """Writes the settings for the children, readable by the owner alone."""
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.encode(settings))


def load(path: Path) -> Settings:
    """Reads what ``save`` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Settings)
