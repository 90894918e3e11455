"""Constrained sampling with the real model and a real scheduler: answers match, whatever else runs and whoever has to
leave the seat meanwhile. Requests go straight to the scheduler, as a frontend sends them."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import models
import pytest
from fakes.deployment import Client
from llguidance import LLMatcher
from server import Server, descendants, running_server

from shoal.messages import Grammar, Sampling, Submit, ThinkingBudget
from shoal.tokenizer import Tokenizer, load_tokenizer
from shoal.wire import pack_ids

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {
            "type": "array",
            "items": {"type": "string", "maxLength": 20},
            "minItems": 2,
            "maxItems": 4,
        },
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(LLMatcher.grammar_from_json_schema(PERSON, overrides={"whitespace_flexible": False}))
QUESTION = "<|im_start|>user\nDescribe a person as JSON.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(models.default_model_path()))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--instance_num", "4") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    found = (
        re.search(r"shoal\.scheduler\.main (\S+)/settings\.json", line)
        for line in descendants(server.pid).values()
    )
    client = Client(next(match[1] for match in found if match))
    client.connect()
    yield client
    client.close()


class Asker:
    """Submits questions; ``answers`` are texts by number."""

    def __init__(self, client: Client, tokenizer: Tokenizer) -> None:
        self.client = client
        self._tokenizer = tokenizer
        self._asked = 0

    def ask(self, max_tokens: int = 200, priority: int = 0, **sampling: Any) -> int:
        self._asked += 1
        wanted = {"seed": self._asked, "temperature": 1.0} | sampling
        self.client.send(
            Submit(
                request_no=self._asked,
                label=f"asked-{self._asked}",
                prompt=pack_ids(self._tokenizer.encode(QUESTION, add_special=False)),
                sampling=Sampling(**wanted),
                max_tokens=max_tokens,
                stop_ids=self._tokenizer.eos_ids,
                priority=priority,
                arrival_ns=time.time_ns(),
            )
        )
        return self._asked

    def answer(self, number: int) -> str:
        self.client.wait_ended(number, seconds=120)
        return self._tokenizer.decode(self.client.tokens.get(number, []))


@pytest.fixture
def asker(client: Client, tokenizer: Tokenizer) -> Asker:
    return Asker(client, tokenizer)


def test_answers_match_whatever_else_runs(asker: Asker) -> None:
    alone = [asker.answer(asker.ask(seed=seed, grammar=GRAMMAR)) for seed in range(3)]
    together = [asker.ask(seed=seed, grammar=GRAMMAR) for seed in range(3)]
    free = [asker.ask(60, seed=seed) for seed in range(3)]
    for number, before in zip(together, alone, strict=True):
        assert asker.answer(number) == before
        assert asker.client.finished(number).reason == "stop"
        jsonschema.validate(json.loads(before), PERSON)
    assert all(asker.answer(number) for number in free)
    assert len(set(alone)) == 3


def test_a_preempted_answer_goes_on_where_it_was(asker: Asker) -> None:
    alone = asker.answer(asker.ask(seed=5, grammar=GRAMMAR))
    before = asker.client.stats().counters["num_preemptions_total"]
    patient = asker.ask(seed=5, grammar=GRAMMAR, priority=9)
    asker.client.wait_tokens(patient, 8)
    hurried = [asker.ask(30, seed=seed) for seed in range(4)]
    assert asker.answer(patient) == alone
    assert all(asker.answer(number) for number in hurried)
    assert asker.client.stats().counters["num_preemptions_total"] > before


def test_a_thinking_budget_and_a_grammar_behind_it(asker: Asker, tokenizer: Tokenizer) -> None:
    end = tuple(tokenizer.encode("</think>", add_special=False))
    grammar = Grammar(LLMatcher.grammar_from_regex(" (yes|no)"), after=end)
    number = asker.ask(thinking=ThinkingBudget(most_tokens=5, end=end), grammar=grammar)
    thought, _, answer = asker.answer(number).partition("</think>")
    assert answer in (" yes", " no")
    assert tuple(asker.client.tokens[number][5 : 5 + len(end)]) == end
    assert thought


def test_contradictions_fail_alone_and_say_so(asker: Asker) -> None:
    other = asker.ask(40)
    stuck = asker.ask(allowed_ids=(100,), bad_words=((100,),))
    no_grammar = asker.ask(grammar=Grammar("start: ("))
    for number in (other, stuck, no_grammar):
        asker.answer(number)
    assert "contradicts itself" in asker.client.finished(stuck).detail
    assert "grammar" in asker.client.finished(no_grammar).detail
    assert asker.client.finished(other).reason in ("stop", "length")
