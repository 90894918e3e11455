"""``--unknown_fields warn``: takes what no struct knows out of a decoded body, and says what it was. Called by
``body.py``, for gateways that add fields of their own."""

from functools import cache
from typing import Any, Final

import msgspec.inspect as kinds

_MOST_NAMED: Final = 20
_LONGEST_NAME: Final = 64


def drop_unknown(tree: Any, body: type) -> list[str]:
    """Removes from ``tree``, at any depth, the keys that ``body`` has no fields for; the paths of the first of them."""
    dropped: list[str] = []
    _prune(tree, _kind(body), "", dropped)
    return dropped


@cache
def _kind(body: type) -> kinds.Type:
    return kinds.type_info(body)


def _prune(value: Any, kind: kinds.Type, where: str, dropped: list[str]) -> None:
    if isinstance(value, dict):
        for choice in _choices(kind):
            if isinstance(choice, kinds.StructType) and _is_meant(value, choice):
                _prune_object(value, choice, where, dropped)
                return
            if isinstance(choice, kinds.DictType):
                for key, item in value.items():
                    _prune(item, choice.value_type, _joined(where, key), dropped)
                return
    elif isinstance(value, list):
        for choice in _choices(kind):
            if isinstance(choice, kinds.ListType):
                for place, item in enumerate(value):
                    _prune(item, choice.item_type, f"{where}[{place}]", dropped)
                return


def _prune_object(value: dict[str, Any], kind: kinds.StructType, where: str, dropped: list[str]) -> None:
    known = {field.encode_name: field.type for field in kind.fields}
    for key in [key for key in value if key not in known and key != kind.tag_field]:
        del value[key]
        if len(dropped) < _MOST_NAMED:
            dropped.append(_joined(where, key))
    for key, item in value.items():
        if key in known:
            _prune(item, known[key], _joined(where, key), dropped)


def _choices(kind: kinds.Type) -> tuple[kinds.Type, ...]:
    """What a value of ``kind`` can be, structs before anything else."""
    while isinstance(kind, kinds.Metadata):
        kind = kind.type
    if not isinstance(kind, kinds.UnionType):
        return (kind,)
    flat = [choice for each in kind.types for choice in _choices(each)]
    return tuple(sorted(flat, key=lambda choice: not isinstance(choice, kinds.StructType)))


def _is_meant(value: dict[str, Any], kind: kinds.StructType) -> bool:
    """Whether an object is this one of several structs, which tell themselves apart by their tag."""
    return kind.tag_field is None or value.get(kind.tag_field) == kind.tag


def _joined(where: str, key: str) -> str:
    name = key[:_LONGEST_NAME]
    return f"{where}.{name}" if where else name
