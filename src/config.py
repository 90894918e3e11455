"""The settings of one server: frozen, checked once by ``flags.py``, handed to every process as a JSON file.

"auto" values are resolved by the supervisor before any child starts; children never see them, but for what
only a loaded model can tell (``session_len`` = 0: the model's own).
"""

from pathlib import Path
from typing import Literal

import msgspec

Dtype = Literal["auto", "float32", "bfloat16"]


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
    dtype: Dtype = "auto"
    threads: int = 0
    """Compute threads of all ranks together; 0: one a core."""
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = 16
    cache_bytes: int = 4 << 30
    """Upper limit of KV memory on a CPU, all ranks together."""
    enable_prefix_caching: bool = True
    max_prefill_token_num: int = 512
    """Token budget of a step."""
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_000_000
    drain_timeout_s: float = 30.0
    step_timeout_s: float = 60.0
    chat_template: str = ""
    """Path of a Jinja file that replaces the model's own template."""
    rope_scaling_factor: float = 0.0
    allow_origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    log_level: str = "info"
    max_log_len: int = 0


def save(settings: Settings, path: Path) -> None:
    """Writes the settings for the children, readable by the owner alone."""
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.encode(settings))


def load(path: Path) -> Settings:
    """Reads what ``save`` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Settings)
