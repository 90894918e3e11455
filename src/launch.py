"""From the command line to settings: what is left open ("auto", 0, the model's own) is resolved here, once.

Called by ``cli.py`` before anything is started; raises ``StartError`` for what cannot be served.
"""

import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal import access, checkpoint, command_line, process
from shoal.checkpoint.description import ModelDescription
from shoal.config import CacheDtype, Settings
from shoal.errors import FlagError


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What to serve and how the supervisor is to run."""

    settings: Settings
    """Complete but for ``run_dir``, which the supervisor makes."""
    daemon: bool = False
    pid_file: str = ""
    log_file: str = ""
    warnings: tuple[str, ...] = ()


def prepare(argv: Sequence[str]) -> Launch:
    """Everything that the arguments and the model's description decide."""
    values = dict(command_line.read(argv))
    _refuse(values)
    location = checkpoint.locate_model(values["model"])
    _check_format(values["model_format"], location)
    described = checkpoint.describe(location)
    description = checkpoint.with_rope_scaling(described, values["rope_scaling_factor"])
    access.check_origins(values)
    ssl_keyfile, ssl_certfile = access.tls_files(values)
    keys = access.read_keys(values["api_keys"])
    settings = Settings(
        model=str(location.path.absolute()),
        model_name=values["model_name"] or location.default_name,
        run_dir="",
        server_name=values["server_name"],
        server_port=values["server_port"],
        frontends=values["frontends"] or min(max(process.available_cores() // 4, 2), 8),
        tp=_ranks(values["tp"], description),
        instance_num=values["instance_num"],
        session_len=_session_len(values["session_len"], description),
        device=values["device"],
        deterministic=bool(values["deterministic"]),
        dtype=values["dtype"],
        quantization=values["quantization"],
        kv_cache_dtype=_cache_dtype(values["quant_policy"], values["kv_cache_dtype"]),
        threads=values["threads"] or process.available_cores(),
        cache_max_entry_count=values["cache_max_entry_count"],
        cache_block_seq_len=values["cache_block_seq_len"],
        cache_bytes=values["cache_bytes"],
        enable_prefix_caching=values["enable_prefix_caching"] is not False,
        max_prefill_token_num=values["max_prefill_token_num"],
        speculative_num_draft_tokens=values["speculative_num_draft_tokens"],
        max_queued_requests=values["max_queued_requests"],
        max_queued_tokens=values["max_queued_tokens"],
        drain_timeout_s=values["drain_timeout"],
        step_timeout_s=values["step_timeout"],
        chat_template=_template(values["chat_template"]),
        rope_scaling_factor=values["rope_scaling_factor"],
        task=values["task"],
        pooling=_pooling(values["task"], location),
        tool_call_parser=values["tool_call_parser"],
        reasoning_parser=values["reasoning_parser"],
        data_dir=_data_dir(values),
        session_store=_writable("session_store", values["session_store"]),
        session_ttl_s=values["session_ttl"],
        unknown_fields=values["unknown_fields"],
        docs=not values["disable_fastapi_docs"],
        body_limit_bytes=values["body_limit"],
        file_limit_bytes=values["file_limit"],
        max_concurrent_requests=values["max_concurrent_requests"],
        allow_origins=values["allow_origins"],
        allow_credentials=bool(values["allow_credentials"]),
        allow_methods=tuple(method.upper() for method in values["allow_methods"]),
        allow_headers=values["allow_headers"],
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        api_keys=keys.keys,
        log_level=values["log_level"],
        max_log_len=values["max_log_len"],
    )
    if settings.max_queued_tokens < settings.session_len:
        raise FlagError(
            f"--max_queued_tokens {settings.max_queued_tokens}: less than --session_len "
            f"{settings.session_len}, so a long request could never wait"
        )
    return Launch(
        settings=settings,
        daemon=bool(values["daemon"]),
        pid_file=_writable("pid_file", values["pid_file"]),
        log_file=_writable("log_file", values["log_file"]),
        warnings=(*keys.warnings, *_warnings(settings)),
    )


def _refuse(values: dict[str, Any]) -> None:
    """Values that the table lets through because the reason deserves words of its own."""
    if values["trust_remote_code"]:
        raise FlagError(
            "--trust_remote_code: refused, Shoal runs no code from model folders; leave the flag out"
        )
    if values["dtype"] == "float16" and values["device"] == "cpu":
        raise FlagError("--dtype float16: only on a GPU (--device cuda); take auto, bfloat16 or float32")
    if values["dtype"] == "float32" and values["device"] == "cuda":
        raise FlagError("--dtype float32: not on a GPU; take bfloat16 or float16, or --device cpu")
    if values["model_format"] in {"awq", "gptq"}:
        raise FlagError(f"--model_format {values['model_format']}: not available yet")


def _cache_dtype(quant_policy: str, wanted: CacheDtype) -> CacheDtype:
    """LMDeploy's flag and vLLM's for the same thing."""
    if quant_policy == "4":
        raise FlagError("--quant_policy 4: not available yet; 8 keeps keys and values as int8")
    if quant_policy == "8" and wanted not in ("auto", "int8"):
        raise FlagError(f"--quant_policy 8 is --kv_cache_dtype int8, not {wanted}: leave one of them out")
    return "int8" if quant_policy == "8" else wanted


def _check_format(wanted: str | None, location: checkpoint.ModelLocation) -> None:
    found = "gguf" if location.kind == "gguf" else "hf"
    if wanted not in (None, found):
        raise FlagError(f"--model_format {wanted}: the model at {location.path} is {found}")


def _ranks(tp: int, description: ModelDescription) -> int:
    if tp > description.num_heads:
        raise FlagError(f"--tp {tp}: the model has {description.num_heads} attention heads to share, no more")
    return tp


def _pooling(task: str, location: checkpoint.ModelLocation) -> checkpoint.PoolingKind:
    """What the model's files say; where they say nothing, the mean."""
    return (checkpoint.declared_pooling(location) if task == "embed" else None) or "mean"


def _session_len(wanted: int | None, description: ModelDescription) -> int:
    """Length-dependent scalings stretch to any length; the others end where the model says."""
    if wanted is None:
        return description.max_position
    if wanted > description.max_position and description.rope.scaling != "dynamic":
        raise FlagError(
            f"--session_len {wanted}: the model's context is {description.max_position} tokens; "
            "take less, or stretch it with --rope_scaling_factor"
        )
    return wanted


def _template(given: str | None) -> str:
    if given is None:
        return ""
    path = Path(given)
    if path.suffix == ".json":
        raise FlagError(
            f"--chat_template {given}: LMDeploy's JSON form is not available yet; give a Jinja file"
        )
    if not path.is_file():
        raise FlagError(f"--chat_template {given}: no such file; it takes the path of a Jinja file")
    return str(path.resolve())


def _data_dir(values: dict[str, Any]) -> str:
    """One a port, so that two servers of one user never share it unasked. The supervisor makes it."""
    if values["data_dir"] is not None:
        return str(Path(values["data_dir"]).absolute())
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return str(Path(state) / "shoal" / str(values["server_port"]))


def _writable(flag: str, given: str | None) -> str:
    if given is None:
        return ""
    path = Path(given).absolute()
    if path.is_dir():
        raise FlagError(f"--{flag} {given}: is a folder")
    if not path.parent.is_dir():
        raise FlagError(f"--{flag} {given}: there is no folder {path.parent}")
    return str(path)


def _warnings(settings: Settings) -> tuple[str, ...]:
    if settings.api_keys or _is_loopback(settings.server_name):
        return ()
    return (
        f"--server_name {settings.server_name} lets anybody who reaches this machine use the model: "
        "set --api_keys, or listen on 127.0.0.1",
    )


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (command_line.is_address(host) and ipaddress.ip_address(host).is_loopback)
