"""POST /get_ppl: how well the model foresees a text."""

import math
from typing import Final

import falcon
import falcon.asgi
import msgspec

from shoal.errors import RequestError
from shoal.frontend import body, checks
from shoal.frontend.exchange import exchange_of
from shoal.frontend.generation import Choice
from shoal.frontend.inputs import characters, input_ids, is_single
from shoal.frontend.readings import read_prompts
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.native import PPLAnswer, PPLRequest
from shoal.frontend.service import Service, off_loop
from shoal.frontend.values import invalid

_ENCODER: Final = msgspec.json.Encoder()
_MOST_EXPONENT: Final = 700.0
"""e to a little more is no float64."""


def routes(service: Service) -> list[Route]:
    """The route."""
    return [
        Route(
            path="/get_ppl",
            resource=Perplexity(service),
            operations={
                "POST": Operation(
                    summary="Score texts",
                    description="`ppl` is LMDeploy's number: the mean cross-entropy. `perplexity` is e to its power.",
                    body=PPLRequest,
                    answer=PPLAnswer,
                    errors=(404, 408, 413),
                )
            },
            stateless=True,
        )
    ]


class Perplexity:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The mean negative log-likelihood of each input's tokens, given those before them."""
        exchange = exchange_of(req)
        request = await body.read(req, PPLRequest)
        service = self._service
        checks.check_task(service)
        service.check_model(request.model)
        limits = await service.switchboard.wait_ready()
        add_special = request.add_special_tokens is not False
        prompts = await off_loop(
            characters(request.input),
            lambda: input_ids(service, limits, request.input, add_special=add_special),
        )
        for number, prompt in enumerate(prompts):
            if len(prompt) < 2:
                name = "input" if is_single(request.input) else f"input[{number}]"
                raise invalid(name, "has one token; the first is not scored, so at least two are needed")
        choices = await read_prompts(
            service, exchange, req, prompts,
            pooling="last", prompt_logprobs=0, timeout_s=request.timeout, priority=request.priority,
        )  # fmt: skip
        losses = [_loss(choice, prompt) for choice, prompt in zip(choices, prompts, strict=True)]
        perplexities = [math.exp(min(loss, _MOST_EXPONENT)) for loss in losses]
        tokens = [len(prompt) - 1 for prompt in prompts]
        answer = PPLAnswer(losses, perplexities, tokens)
        if is_single(request.input):
            answer = PPLAnswer(losses[0], perplexities[0], tokens[0])
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(answer)


def _loss(choice: Choice, prompt: list[int]) -> float:
    logprobs = [entry.logprob for entry in choice.prompt_logprobs]
    loss = -math.fsum(logprobs) / (len(prompt) - 1)
    if len(logprobs) != len(prompt) - 1 or not math.isfinite(loss):
        raise RequestError(500, "the ranks sent no log-probability for each token", code="generation_failed")
    return loss
