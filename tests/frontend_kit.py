"""The Falcon application with a scheduler that is a script: no process, no network, one token a byte."""

import asyncio
import json
import tempfile
import uuid
from array import array
from collections.abc import Callable
from typing import Any

import tokenizers
from falcon import testing
from msgspec import structs
from tokenizers import decoders, models, pre_tokenizers

from shoal.config import Settings
from shoal.frontend.app import make_app
from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.grammar import Grammars
from shoal.frontend.service import Defaults, Service
from shoal.frontend.switchboard import Switchboard
from shoal.grammar_tokens import grammar_tokens
from shoal.messages import (
    Abort,
    Aborted,
    Availability,
    Cancel,
    Finished,
    FinishReason,
    FrontendMessage,
    GatewayMessage,
    Limits,
    PooledVector,
    Progress,
    Query,
    Rejected,
    Rest,
    ScoredPrompt,
    Stats,
    Submit,
    Survey,
    Surveyed,
    TokenLogprob,
    TokenRun,
    Welcome,
)
from shoal.storage.opened import open_storage
from shoal.tokenizer import Tokenizer
from shoal.tokenizer.parts import TokenizerParts
from shoal.wire import unpack_ids

EOS = 256
SESSION_LEN = 200
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(bos: bool = False, specials: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level, no merges: a token's id is its byte in GPT-2's order; 256 ends a sequence, 257 begins one; the
    other special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|begin|>", *specials])
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
        self.reason: FinishReason | None = None
        """How sequences end, where not as their tokens say."""
        self.logprob_of: Callable[[Submit], float] | None = None
        """The log-probability of each token of a submit's answer."""
        self.aborts: list[Abort] = []
        self.aborted = 1
        """How many requests an abort ends."""
        self.rests: list[Rest] = []
        self.surveyed = Surveyed(0, ())
        self.stats: Stats | None = stats()
        self._cancelled: set[int] = set()
        self.switchboard.accept(Welcome(7, 1))
        self.switchboard.accept(Availability(True, limits()))

    def receive(self, message: FrontendMessage, scheduler_id: int) -> bool:
        """The switchboard's way to send."""
        assert scheduler_id == self.switchboard.scheduler_id
        match message:
            case Submit():
                self.submits.append(message)
                self._begin(message)
            case Cancel():
                self.cancels.append(message)
                self._cancelled.add(message.request_no)
            case Query() if self.stats is not None:
                self._answer(structs.replace(self.stats, query_no=message.query_no))
            case Abort():
                self.aborts.append(message)
                self._answer(Aborted(message.query_no, self.aborted))
            case Rest() if self.stats is not None:
                self.rests.append(message)
                self._answer(structs.replace(self.stats, query_no=message.query_no, asleep=message.level))
            case Survey():
                self._answer(structs.replace(self.surveyed, query_no=message.query_no))
            case _:
                pass
        return True

    def _answer(self, message: GatewayMessage) -> None:
        asyncio.get_running_loop().call_soon(self.switchboard.accept, message)

    def _begin(self, submit: Submit) -> None:
        answer = self.answer(submit)
        if submit.prompt_logprobs >= 0:
            asyncio.get_running_loop().call_soon(self.switchboard.accept, _scores(submit))
        if submit.pooling and isinstance(answer, list):
            asyncio.get_running_loop().call_soon(self.switchboard.accept, _pooled(submit))
            return
        if isinstance(answer, list):
            ids = answer[: submit.max_tokens]
            asyncio.get_running_loop().call_soon(self._go_on, submit, ids, len(unpack_ids(submit.generated)))
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
        if self.logprob_of is not None:
            logprobs = tuple(structs.replace(each, logprob=self.logprob_of(submit)) for each in logprobs)
        run = TokenRun(number, position, piece, logprobs if submit.sampling.logprobs >= 0 else ())
        after = position + len(piece)
        stop_id = piece[-1] if piece[-1] in submit.stop_ids else None
        self.switchboard.accept(Progress(position, (run,)))
        if stop_id is not None or after >= len(ids):
            reason = self.reason or ("length" if stop_id is None else "stop")
            times = {"queue_us": 100_000, "prefill_us": 200_000, "decode_us": 300_000}
            self._finish(Finished(number, reason, stop_id, self.cached_tokens, **times))
        else:
            asyncio.get_running_loop().call_soon(self._go_on, submit, ids, after)

    def _finish(self, finished: Finished) -> None:
        self.switchboard.accept(Progress(0, (), (finished,)))


LMDEPLOY_SCHEMAS = {
    "ChatCompletionRequest",
    "CompletionRequest",
    "EmbeddingsRequest",
    "GenerateRequest",
    "Messages",
    "Prompt",
    "Input",
    "HTTPValidationError",
    "ValidationError",
}
"""The names that generated clients of 2023 had."""


class Kit:
    """A client of the application."""

    def __init__(
        self,
        bos: bool = False,
        defaults: Defaults | None = None,
        specials: tuple[str, ...] = (),
        **settings: Any,
    ) -> None:
        self.tokenizer = byte_tokenizer(bos, specials)
        vocab_size = 258 + len(specials)
        self.scheduler = ScriptedScheduler(self.tokenizer)
        template = settings.pop("template", TEMPLATE)
        data_dir = str(settings.setdefault("data_dir", f"{tempfile.gettempdir()}/shoal-kit-{uuid.uuid4().hex}"))
        self.service = Service(
            settings=Settings(model="m", model_name="served/model", run_dir="/run", **settings),
            tokenizer=self.tokenizer,
            template=ChatTemplate(template, {}),
            vocab_size=vocab_size,
            eos_ids=(EOS,),
            defaults=defaults or Defaults(),
            switchboard=self.scheduler.switchboard,
            created=1_700_000_000,
            storage=open_storage(data_dir, session_ttl_s=settings.get("session_ttl_s", 0.0)),
            grammars=Grammars(lambda: grammar_tokens(self.tokenizer, vocab_size, (EOS,))),
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
    base = Stats(0, True, False, (), limits(), 0, 0, {}, {}, {})
    return structs.replace(base, **changes)


def _scores(submit: Submit) -> Progress:
    """Of a prompt's tokens from the second on, in two messages' worth, the second of which repeats some."""
    ids = unpack_ids(submit.prompt)[1:]
    entries = tuple(_logprob(token, submit.prompt_logprobs) for token in ids)
    half = len(entries) // 2
    first = ScoredPrompt(submit.request_no, 1, entries[: half + 1])
    return Progress(0, scored=(first, ScoredPrompt(submit.request_no, 1 + half, entries[half:])))


def pooled_values(ids: list[int], pooling: str) -> list[float]:
    """The scripted vector of a prompt, not normalised."""
    return [float(len(ids)), float(ids[-1]), 3.0 if pooling == "mean" else -4.0]


def _pooled(submit: Submit) -> Progress:
    values = array("f", pooled_values(unpack_ids(submit.prompt), submit.pooling))
    vector = PooledVector(submit.request_no, values.tobytes())
    return Progress(0, finished=(Finished(submit.request_no, "stop"),), pooled=(vector,))


def _logprob(token: int, most: int) -> TokenLogprob:
    return TokenLogprob(-0.25, tuple(((token + n) % 256, -0.25 - n) for n in range(max(most, 0))))


def _addressed(message: GatewayMessage, request_no: int) -> GatewayMessage:
    """A template of a terminal event, for this request."""
    if isinstance(message, Progress):
        ended = tuple(structs.replace(each, request_no=request_no) for each in message.finished)
        return structs.replace(message, finished=ended)
    assert isinstance(message, Rejected)
    return structs.replace(message, request_no=request_no)
