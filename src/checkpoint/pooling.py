"""How a model says that its hidden states become one vector: sentence-transformers' folders, and GGUF's pooling type.

Called by the supervisor and the frontends where the model is served with --task embed.
"""

from pathlib import Path
from typing import Final, Literal

import msgspec

from shoal.checkpoint.fields import REMEDY, Fields, read_json_object, shown
from shoal.checkpoint.gguf import GgufFile
from shoal.checkpoint.locate import ModelLocation
from shoal.errors import ModelError

PoolingKind = Literal["mean", "last"]
_KNOWN_MODULES: Final = ("Transformer", "Pooling", "Normalize")
_KINDS: Final[dict[str, PoolingKind]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_GGUF_KINDS: Final[dict[int, PoolingKind]] = {1: "mean", 3: "last"}


class _Module(msgspec.Struct):
    """An entry of modules.json."""

    type: str
    path: str = ""


def declared_pooling(location: ModelLocation) -> PoolingKind | None:
    """What the model's files say; None where they say nothing. Raises ModelError for what is not served."""
    if location.kind == "gguf":
        with GgufFile(location.path) as file:
            return _of_gguf(file)
    return _of_folder(location.path)


def _of_gguf(file: GgufFile) -> PoolingKind | None:
    fields = Fields(str(file.path), file.metadata)
    name = f"{fields.text('general.architecture', '')}.pooling_type"
    declared = fields.integer(name, 0, 255, 0)
    if declared == 0:
        return None
    if declared not in _GGUF_KINDS:
        raise fields.error(name, f"is {declared}, which is not served: only 1 (mean) and 3 (last token) are")
    return _GGUF_KINDS[declared]


def _of_folder(folder: Path) -> PoolingKind | None:
    config = folder / _pooling_folder(folder) / "config.json"
    if not config.exists():
        return None
    values = read_json_object(config)
    modes = [name for name, on in values.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) == 1 and modes[0] in _KINDS:
        return _KINDS[modes[0]]
    raise ModelError(
        f"{config}: its pooling ({shown(', '.join(modes) or 'none')}) is not served: only "
        f"{' and '.join(_KINDS)} are, one at a time"
    )


def _pooling_folder(folder: Path) -> str:
    """Of the pooling module. A model with layers behind the pooling is refused: its vectors would be others."""
    path = folder / "modules.json"
    if not path.exists():
        return "1_Pooling"
    try:
        modules = msgspec.json.decode(path.read_bytes(), type=list[_Module])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path}: is not sentence-transformers' list of modules ({error}): {REMEDY}"
        ) from error
    pooling = "1_Pooling"
    for module in modules:
        kind = module.type.rpartition(".")[2]
        if kind not in _KNOWN_MODULES:
            raise ModelError(f"{path}: a module of type {shown(module.type)} is not served with --task embed")
        if kind == "Pooling":
            pooling = module.path
    if Path(pooling).name != pooling:
        raise ModelError(f"{path}: {shown(pooling)} is not the name of a folder beside it: {REMEDY}")
    return pooling
