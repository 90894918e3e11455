"""The Falcon application with a scheduler that is a script: no process, no network, one token a byte."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import tokenizers
from falcon import testing
from msgspec import structs
from tokenizers import decoders, models, pre_tokenizers

from shoal.config import Settings
from shoal.frontend.app import make_app
from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.service import Defaults, Service
from shoal.frontend.switchboard import Switchboard
from shoal.frontend.tokenize import Tokenizer
from shoal.frontend.tokenizer_parts import TokenizerParts
from shoal.messages import (
    Availability,
    Cancel,
    Finished,
    FrontendMessage,
    GatewayMessage,
    Limits,
    Progress,
    Query,
    Rejected,
    Stats,
    Submit,
    TokenLogprob,
    TokenRun,
    Welcome,
)
from shoal.wire import unpack_ids

EOS = 256
SESSION_LEN = 200
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(bos: bool = False) -> Tokenizer:
    """Byte-level, no merges: a token's id is its byte in GPT-2's order; 256 ends a sequence, 257 begins one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|begin|>"])
    return Tokenizer(
        TokenizerParts(
            core=core,
            spelling="byte_level",
            strips_first_space=False,
            prefix=(257,) if bos else (),
            bos_id=257 if bos else None,
            eos_ids=(EOS,),
            special_tokens={"eos_token": "<|end|>"},
            chat_templates={"default": TEMPLATE},
        )
    )


class ScriptedScheduler:
    """Answers every submit at once, in runs of ``run_length`` tokens, one run a turn of the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.switchboard = Switchboard(self.receive)
        self.submits: list[Submit] = []
        self.cancels: list[Cancel] = []
        self.answer: Callable[[Submit], list[int] | GatewayMessage | None] = lambda _: tokenizer.encode(
            "ok", False
        )
        """The tokens of a submit's answer; a message to send instead; None for silence."""
        self.cached_tokens = 0
        self.run_length = 1
        self.stats: Stats | None = stats()
        self._cancelled: set[int] = set()
        self.switchboard.accept(Welcome(7, 1))
        self.switchboard.accept(Availability(True, limits()))

    def receive(self, message: FrontendMessage, scheduler_id: int) -> bool:
        """The switchboard's way to send."""
        assert scheduler_id == 7
        match message:
            case Submit():
                self.submits.append(message)
                self._begin(message)
            case Cancel():
                self.cancels.append(message)
                self._cancelled.add(message.request_no)
            case Query() if self.stats is not None:
                answer = structs.replace(self.stats, query_no=message.query_no)
                asyncio.get_running_loop().call_soon(self.switchboard.accept, answer)
            case _:
                pass
        return True

    def _begin(self, submit: Submit) -> None:
        answer = self.answer(submit)
        if isinstance(answer, list):
            ids = answer[: submit.max_tokens]
            asyncio.get_running_loop().call_soon(self._go_on, submit, ids, 0)
        elif answer is not None:
            message = _addressed(answer, submit.request_no)
            asyncio.get_running_loop().call_soon(self.switchboard.accept, message)

    def _go_on(self, submit: Submit, ids: list[int], position: int) -> None:
        number = submit.request_no
        if number in self._cancelled:
            self._finish(Finished(number, "cancelled", None, self.cached_tokens))
            return
        piece = tuple(ids[position : position + self.run_length])
        logprobs = tuple(_logprob(token, submit.sampling.logprobs) for token in piece)
        run = TokenRun(number, position, piece, logprobs if submit.sampling.logprobs >= 0 else ())
        after = position + len(piece)
        stop_id = piece[-1] if piece[-1] in submit.stop_ids else None
        self.switchboard.accept(Progress(position, (run,)))
        if stop_id is not None or after >= len(ids):
            reason = "length" if stop_id is None else "stop"
            self._finish(Finished(number, reason, stop_id, self.cached_tokens))
        else:
            asyncio.get_running_loop().call_soon(self._go_on, submit, ids, after)

    def _finish(self, finished: Finished) -> None:
        self.switchboard.accept(Progress(0, (), (finished,)))


class Kit:
    """A client of the application."""

    def __init__(self, bos: bool = False, defaults: Defaults | None = None, **settings: Any) -> None:
        self.tokenizer = byte_tokenizer(bos)
        self.scheduler = ScriptedScheduler(self.tokenizer)
        template = settings.pop("template", TEMPLATE)
        self.service = Service(
            settings=Settings(model="m", model_name="served/model", run_dir="/run", **settings),
            tokenizer=self.tokenizer,
            template=ChatTemplate(template, {}),
            vocab_size=258,
            eos_ids=(EOS,),
            defaults=defaults or Defaults(),
            switchboard=self.scheduler.switchboard,
            created=1_700_000_000,
        )
        self.app = make_app(self.service)
        self.client = testing.TestClient(self.app)

    def ids(self, text: str) -> list[int]:
        """The text's tokens."""
        return self.tokenizer.encode(text, False)

    def says(self, *texts: str, end: bool = True) -> None:
        """Answers with these texts, one submit after the other, the last one from then on."""
        answers = [self.ids(text) + ([EOS] if end else []) for text in texts]
        first = len(self.scheduler.submits)
        self.scheduler.answer = lambda _: answers[min(len(self.scheduler.submits) - first, len(answers)) - 1]

    def prompt(self, number: int = -1) -> str:
        """The text of a submitted prompt."""
        return self.tokenizer.decode(unpack_ids(self.scheduler.submits[number].prompt), skip_special=False)

    def post(self, path: str, body: object, **headers: str) -> testing.Result:
        """POSTs JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, raw, **headers)

    def get(self, path: str, **headers: str) -> testing.Result:
        """GETs."""
        return self.request("GET", path, **headers)

    def request(
        self, method: str, path: str, raw: bytes = b"", host: str = "127.0.0.1", **headers: str
    ) -> testing.Result:
        """Any request; underscores in header names stand for dashes."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.simulate_request(method, path, body=raw or None, headers=named, host=host)

    def chat(self, content: object = "hi", **fields: Any) -> testing.Result:
        """A chat of one message."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

    def complete(self, prompt: object = "hi", **fields: Any) -> testing.Result:
        """A raw completion."""
        return self.post("/v1/completions", {"prompt": prompt, **fields})


def events(result: testing.Result) -> list[Any]:
    """The decoded events of a stream; its last line, [DONE], as that string."""
    assert result.headers["content-type"].startswith("text/event-stream")
    blocks = result.text.removesuffix("\n\n").split("\n\n")
    payloads = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def limits(session_len: int = SESSION_LEN) -> Limits:
    """Of a small server."""
    return Limits(session_len, 64, 16, 8)


def stats(**changes: Any) -> Stats:
    """Of a server that is well."""
    base = Stats(0, True, False, (), limits(), 0, {}, {}, {})
    return structs.replace(base, **changes)


def _logprob(token: int, most: int) -> TokenLogprob:
    return TokenLogprob(-0.25, tuple(((token + n) % 256, -0.25 - n) for n in range(max(most, 0))))


def _addressed(message: GatewayMessage, request_no: int) -> GatewayMessage:
    """A template of a terminal event, for this request."""
    if isinstance(message, Progress):
        ended = tuple(structs.replace(each, request_no=request_no) for each in message.finished)
        return structs.replace(message, finished=ended)
    assert isinstance(message, Rejected)
    return structs.replace(message, request_no=request_no)
