"""Prompts that are read and not continued, from token ids to what the ranks read off them. Called by
/v1/embeddings, /pooling and /get_ppl."""

from collections.abc import Iterator
from typing import Final

import falcon.asgi

from shoal.errors import RequestError
from shoal.frontend import checks
from shoal.frontend.exchange import Exchange
from shoal.frontend.generation import Choice, Generation
from shoal.frontend.schemas.base import Whole
from shoal.frontend.service import Service
from shoal.messages import Pooling, Sampling

_TIMEOUT_HEADER: Final = "X-Request-Timeout"


async def read_prompts(
    service: Service,
    exchange: Exchange,
    req: falcon.asgi.Request,
    prompts: list[list[int]],
    *,
    pooling: Pooling,
    prompt_logprobs: int = -1,
    timeout_s: float | None = None,
    priority: Whole | None = None,
) -> list[Choice]:
    """Has every prompt computed, as many at a time as one request may have open; one choice for each, complete.
    Nothing is generated: a vector is always asked for. Raises RequestError."""
    deadline_ns = checks.deadline_ns(timeout_s, req.get_header(_TIMEOUT_HEADER))
    choices: list[Choice] = []
    for part in _parts(prompts):
        job = checks.Job(
            label=exchange.request_id,
            prompts=tuple(part),
            choices=1,
            sampling=Sampling(seed=0),
            max_tokens=(1,) * len(part),
            stop=(),
            stop_ids=(),
            skip_special=True,
            deadline_ns=deadline_ns,
            prompt_logprobs=prompt_logprobs,
            pooling=pooling,
            tenant=exchange.tenant,
            priority=exchange.priority + checks.own_priority(priority),
        )
        generation = Generation(service, job)
        exchange.open(generation)
        while not generation.done:
            await generation.advance()
        choices += generation.choices
    for choice in choices:
        if not choice.vector:
            raise RequestError(500, "the ranks sent no vector for this input", code="generation_failed")
    return choices


def _parts(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    for first in range(0, len(prompts), checks.MOST_SEQUENCES):
        yield prompts[first : first + checks.MOST_SEQUENCES]
