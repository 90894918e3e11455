"""Random draws under random JSON schemas: whatever the logits, the answer is JSON that the schema allows, and every
token was in the mask that a matcher of its own computes for it."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_schemas import SCHEMAS
from tiny_grammars import ENDS, TEXTS, answer, decode, json_grammar, row, tiny_threads, tiny_tokens

from shoal.grammar_tokens import open_matcher
from shoal.workers.grammar import GrammarThreads

MOST_TOKENS = 400


@pytest.fixture(scope="module")
def threads() -> Iterator[GrammarThreads]:
    with tiny_threads() as each:
        yield each


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 2**64 - 1), left_at=st.integers(0, 30))
def test_answers_are_what_the_schema_allows(
    threads: GrammarThreads, schema: dict[str, Any], seed: int, left_at: int
) -> None:
    grammar = json_grammar(schema)
    noise = np.random.default_rng(seed)
    ids = answer(row(threads, seed=seed, grammar=grammar), left_at, noise)
    if not ids or ids[-1] not in ENDS:
        # Preempted, and seated again with what it had.
        ids += answer(row(threads, ids, seed=seed, grammar=grammar), MOST_TOKENS, noise)
    assert ids[-1] in ENDS, decode(ids)
    jsonschema.validate(json.loads(decode(ids)), schema)
    check_every_token(grammar.source, ids)


def check_every_token(source: str, ids: list[int]) -> None:
    matcher = open_matcher(tiny_tokens(), source)
    for token_id in ids:
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        assert mask[token_id], (TEXTS[token_id], decode(ids))
        assert matcher.consume_token(token_id), matcher.get_error()
