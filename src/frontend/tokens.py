"""POST /v1/encode, /tokenize, /detokenize and /apply_template: what a prompt is to the model. They compute nothing
on the ranks, and answer while the model is still being loaded."""

from collections.abc import Sequence
from typing import Final, cast

import falcon
import falcon.asgi
import msgspec

from shoal.frontend import body, checks
from shoal.frontend.prompts import chat_text
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.base import Whole
from shoal.frontend.schemas.chat import ChatCompletionRequest, ChatMessage
from shoal.frontend.schemas.tokens import (
    ApplyTemplateAnswer,
    ApplyTemplateRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    EncodeAnswer,
    EncodeRequest,
    TemplateRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from shoal.frontend.service import Service, off_loop
from shoal.frontend.unavailable import refuse_unavailable
from shoal.frontend.values import invalid, whole

_ENCODER: Final = msgspec.json.Encoder()
_CHARACTERS_A_TOKEN: Final = 4
"""About so many; decides only whether work is done off the event loop."""


def routes(service: Service) -> list[Route]:
    """The four of them."""
    return [
        _route("/v1/encode", Encode(service), "Count and list the tokens of texts", EncodeRequest, EncodeAnswer),
        _route("/tokenize", Tokenize(service), "Prompts to token ids", TokenizeRequest, TokenizeAnswer),
        _route("/detokenize", Detokenize(service), "Token ids to text", DetokenizeRequest, DetokenizeAnswer),
        _route(
            "/apply_template", ApplyTemplate(service), "A conversation to the text that the model reads",
            ApplyTemplateRequest, ApplyTemplateAnswer,
        ),
    ]  # fmt: skip


def _route(path: str, resource: object, summary: str, request: object, answer: object) -> Route:
    operation = Operation(summary=summary, body=request, answer=answer, errors=(404, 408, 413))
    return Route(path=path, resource=resource, operations={"POST": operation}, stateless=True)


class Encode:
    """LMDeploy's route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Each text's token ids, and how many."""
        request = await body.read(req, EncodeRequest)
        one = isinstance(request.input, str)
        texts = [request.input] if isinstance(request.input, str) else request.input
        ids = await off_loop(sum(map(len, texts)), lambda: self._encode(texts, request))
        lengths = [len(each) for each in ids]
        answer = EncodeAnswer(*((list(ids[0]), lengths[0]) if one else (list(ids), lengths)))
        _write(resp, answer)

    def _encode(self, texts: list[str], request: EncodeRequest) -> list[list[int]]:
        if request.do_preprocess:
            texts = [chat_text(self._service, [ChatMessage(role="user", content=text)]) for text in texts]
        add_special = request.add_bos is not False and not request.do_preprocess
        return self._service.tokenizer.encode_batch(texts, add_special)


class Tokenize:
    """vLLM's and SGLang's route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The token ids of a prompt, of several, or of a conversation."""
        request = await body.read(req, TokenizeRequest)
        self._service.check_model(request.model)
        refuse_unavailable(request, "")
        ids = await off_loop(_characters(request), lambda: self._ids(request))
        limits = self._service.switchboard.limits
        answer = TokenizeAnswer([], 0, limits.session_len if limits else None)
        if isinstance(request.prompt, list):
            answer.tokens, answer.count = list(ids), [len(each) for each in ids]
        else:
            answer.tokens, answer.count = list(ids[0]), len(ids[0])
        if request.return_token_strs:
            answer.token_strs = [self._strings(item) for item in answer.tokens]
        _write(resp, answer)

    def _ids(self, request: TokenizeRequest) -> list[list[int]]:
        if (request.prompt is None) == (request.messages is None):
            raise invalid("prompt", "give either prompt or messages")
        if request.prompt is None:
            texts = [rendered(self._service, request)]
            return self._service.tokenizer.encode_batch(texts, bool(request.add_special_tokens))
        _refuse_template_fields(request)
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        return self._service.tokenizer.encode_batch(texts, request.add_special_tokens is not False)

    def _strings(self, item: int | list[int]) -> str | list[str]:
        if isinstance(item, list):
            return [self._spelled(token_id) for token_id in item]
        return self._spelled(item)

    def _spelled(self, token_id: int) -> str:
        return self._service.tokenizer.token_bytes(token_id).decode("utf-8", "replace")


class Detokenize:
    """vLLM's and SGLang's route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The text of the ids; of each list, where there are several."""
        request = await body.read(req, DetokenizeRequest)
        self._service.check_model(request.model)
        batches = self._batches(request.tokens)
        characters = _CHARACTERS_A_TOKEN * sum(map(len, batches))
        skip = bool(request.skip_special_tokens)
        texts = await off_loop(
            characters, lambda: [self._service.tokenizer.decode(ids, skip) for ids in batches]
        )
        several = bool(request.tokens) and isinstance(request.tokens[0], list)
        answer = texts if several else texts[0]
        _write(resp, DetokenizeAnswer(prompt=answer, text=answer))

    def _batches(self, tokens: Sequence[Whole | list[Whole]]) -> list[list[int]]:
        if all(isinstance(item, list) for item in tokens) and tokens:
            lists = cast("Sequence[list[Whole]]", tokens)
            return [self._checked(ids, f"tokens[{n}]") for n, ids in enumerate(lists)]
        if any(isinstance(item, list) for item in tokens):
            raise invalid("tokens", "must be a list of ids, or a list of lists of ids")
        return [self._checked(cast("Sequence[Whole]", tokens), "tokens")]

    def _checked(self, ids: Sequence[Whole], name: str) -> list[int]:
        highest = max(self._service.vocab_size, self._service.tokenizer.vocab_size) - 1
        return [whole(f"{name}[{n}]", token_id, 0, 0, highest) for n, token_id in enumerate(ids)]


class ApplyTemplate:
    """The chat template by itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The text that the chat routes would tokenise."""
        request = await body.read(req, ApplyTemplateRequest)
        self._service.check_model(request.model)
        text = await off_loop(_message_characters(request), lambda: rendered(self._service, request))
        _write(resp, ApplyTemplateAnswer(text))


def rendered(service: Service, request: TemplateRequest) -> str:
    """The conversation as the chat routes would render it. Raises RequestError."""
    if not request.messages:
        raise invalid("messages", "must not be empty")
    chat = ChatCompletionRequest(
        messages=request.messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template=request.chat_template,
        chat_template_kwargs=request.chat_template_kwargs,
        enable_thinking=request.enable_thinking,
        tools=request.tools,
    )
    checks.check_available(chat)
    return chat_text(service, request.messages, chat)


def _refuse_template_fields(request: TokenizeRequest) -> None:
    for name in TemplateRequest.__struct_fields__:
        if name != "model" and getattr(request, name) is not None:
            raise invalid(name, "goes with messages; a prompt is taken as it is")


def _characters(request: TokenizeRequest) -> int:
    if request.prompt is None:
        return _message_characters(request)
    return len(request.prompt) if isinstance(request.prompt, str) else sum(map(len, request.prompt))


def _message_characters(request: TemplateRequest) -> int:
    """About how much text there is to render."""
    contents = [message.content or "" for message in request.messages or []]
    return sum(
        len(content) if isinstance(content, str) else sum(len(part.text or "") for part in content)
        for content in contents
    )


def _write(resp: falcon.asgi.Response, answer: msgspec.Struct) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(answer)
