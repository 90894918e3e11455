"""JSON schemas at random, as clients might send them: leaves, arrays, objects and unions, not too deep."""

from typing import Any

from hypothesis import strategies as st

LEAVES: Any = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 999),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
    st.sampled_from(["^[ab]{2,5}$", "^(name|null)+x$", "^\\d{1,3}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 20}
    ),
    st.lists(
        st.sampled_from(["abc", "a b", "é", '"', 1, -2.5, None, True, "<eos>"]), min_size=1, max_size=4
    ).map(lambda values: {"enum": values}),
)


def containers(inner: Any) -> Any:
    names = st.sampled_from(["name", "a", "12", "a b", "ü"])
    arrays = st.builds(
        lambda items, least, more: {
            "type": "array",
            "items": items,
            "minItems": least,
            "maxItems": least + more,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    objects = st.dictionaries(names, inner, min_size=1, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties))).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}))


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6)
