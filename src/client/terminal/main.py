"""The command line of the terminal client, and its loop: read, then do or answer."""

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Sequence
from typing import Final, Protocol

from shoal.client.api_client import APIClient
from shoal.client.arguments import Parser, count, not_negative, share
from shoal.client.errors import APIError, AuthenticationError, NotFoundError
from shoal.client.terminal import commands
from shoal.client.terminal.conversation import Conversation, Sampling
from shoal.client.terminal.plain import LineReader, PlainDisplay
from shoal.client.terminal.show import Display

_LARGEST_SESSION_ID: Final = 2**31


class Reader(Protocol):
    """Where a person's turns come from."""

    def read(self) -> str:
        """The next turn. Raises EOFError at the end, and KeyboardInterrupt."""


def run(argv: Sequence[str], program: str = "api_client") -> int:
    """Chats until told to leave; the exit code."""
    options = _parser(program).read(argv)
    try:
        with APIClient(options.url, options.api_key, options.timeout, verify=options.ca_file or True) as client:
            conversation = _conversation(client, options)
            return _chat(conversation, options)
    except (APIError, ValueError) as error:
        sys.stderr.write(f"error: {_advice(error)}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def converse(conversation: Conversation, reader: Reader, display: Display) -> int:
    """Turn after turn until the input ends or says so; the number of turns that failed."""
    failed = 0
    while True:
        try:
            text = reader.read().strip()
        except KeyboardInterrupt:
            display.note("ctrl-D leaves, and so does exit")
            continue
        except EOFError:
            return failed
        try:
            if not text:
                continue
            if commands.is_command(text):
                if commands.obey(text, conversation, display) is commands.Then.LEAVE:
                    return failed
            else:
                with contextlib.closing(conversation.turn(text)) as pieces:
                    display.answer(pieces)
                _comment(conversation, display)
        except KeyboardInterrupt:
            _stop(conversation, display)
        except APIError as error:
            failed += 1
            display.error(_advice(error))


def _chat(conversation: Conversation, options: argparse.Namespace) -> int:
    if options.plain or not _is_terminal():
        failed = converse(conversation, LineReader(sys.stdin), PlainDisplay(sys.stdout, sys.stderr))
        if conversation.is_known and options.session_id is None:
            conversation.end()
        return 1 if failed else 0
    from shoal.client.terminal.editor import Editor
    from shoal.client.terminal.screen import Screen

    screen = Screen(markdown=options.markdown)
    _greet(conversation, screen)
    converse(conversation, Editor(screen.note), screen)
    if conversation.is_known:
        screen.note(f"the server keeps this conversation; --session-id {conversation.session_id} continues it")
    return 0


def _conversation(client: APIClient, options: argparse.Namespace) -> Conversation:
    """With the history of the session, where one is continued. Raises APIError where the server is not there."""
    models = client.available_models
    model = options.model or next(iter(models), "")
    if model not in models:
        raise ValueError(f"--model: {model!r} is not served; there is {', '.join(models) or 'no model'}")
    session_id: int | None = options.session_id
    if session_id is None:
        session_id = secrets.randbelow(_LARGEST_SESSION_ID - 1) + 1
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.max_tokens)
    conversation = Conversation(client, session_id, model, options.system, sampling)
    if options.session_id is not None:
        with contextlib.suppress(NotFoundError):
            conversation.resume(client.session(session_id)["messages"])
    return conversation


def _greet(conversation: Conversation, display: Display) -> None:
    messages = len(conversation.messages)
    state = f"continued, {messages} messages" if conversation.is_known else "new"
    display.note(f"{conversation.model} · session {conversation.session_id} ({state}) · /help")


def _comment(conversation: Conversation, display: Display) -> None:
    """What an answer's end means, where the text does not show it."""
    last = conversation.last
    if last is None:
        return
    if last.is_full:
        display.error("the session is as long as the server allows; /reset begins another")
    elif last.finish_reason == "length":
        display.note(f"cut after {last.tokens} tokens")
    elif last.finish_reason not in ("stop", None):
        display.note(f"ended: {last.finish_reason}")


def _stop(conversation: Conversation, display: Display) -> None:
    """The connection is closed by now; the server is told besides, so that the next turn finds it free."""
    try:
        conversation.stop()
    except APIError as error:
        display.error(str(error))
    else:
        display.note("stopped")


def _advice(error: Exception) -> str:
    if isinstance(error, AuthenticationError):
        return f"{error}: start with --api-key KEY, or set SHOAL_API_KEY"
    return str(error)


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _parser(program: str) -> Parser:
    parser = Parser(program, "Chats with a Shoal server. Text from a pipe is answered line by line.")
    add = parser.add_argument
    add("--session-id", type=count, metavar="N", help="continues this conversation, or begins it")
    add("--model", metavar="NAME", help="one of the served models (default: the first)")
    add("--system", metavar="TEXT", help="what the model is told before the conversation")
    add(
        "--temperature",
        type=not_negative,
        metavar="T",
        help="0: the likeliest words (default: the model's, else 0.8)",
    )
    add("--top-p", type=share, metavar="P", help="default: the model's, else 0.8")
    add("--top-k", type=count, metavar="K", help="0: all (default: the model's, else 40)")
    add("--max-tokens", type=count, metavar="N", help="longest answer (default: what fits)")
    add("--no-markdown", dest="markdown", action="store_false", help="shows answers as they are")
    add("--plain", action="store_true", help="no line editing and no colours, as in a pipe")
    return parser
