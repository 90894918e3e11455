"""What a person can tell the program instead of the model."""

import enum
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shoal.client.api_client import Message
from shoal.client.terminal.conversation import Conversation, text_of
from shoal.client.terminal.show import Display

_COMMAND: Final = re.compile(r"/[a-z]+(\s|$)")
_BARE: Final = ("exit", "end")

HELP: Final = """\
enter sends · alt-enter, or a backslash at a line's end, begins a new line · ctrl-C stops an answer
/reset           ends the conversation and begins another
/system [TEXT]   shows the system text, or begins a conversation with another; /system none has none
/model [NAME]    shows what is served, or chooses
/stats           counts and speed of the last answer
/save [FILE]     writes the conversation, as JSON if the name ends so, otherwise as Markdown
end              ends the conversation, as /reset does
exit             ends the conversation and leaves
/quit, ctrl-D    leaves; the server keeps the conversation"""


class Then(enum.Enum):
    """What follows a command."""

    GO_ON = enum.auto()
    LEAVE = enum.auto()


def is_command(text: str) -> bool:
    """A path like /etc/hosts is none."""
    return text in _BARE or _COMMAND.match(text) is not None


def obey(text: str, conversation: Conversation, display: Display) -> Then:
    """Carries out a command. Raises APIError."""
    name, _, argument = text.partition(" ")
    if name in ("exit", "end", "/exit", "/end"):
        conversation.end()
        if name.endswith("exit"):
            return Then.LEAVE
        display.note("the conversation has ended")
    elif name == "/quit":
        return Then.LEAVE
    elif name in _COMMANDS:
        _COMMANDS[name](argument.strip(), conversation, display)
    else:
        display.error(f"there is no {name}; /help lists what there is")
    return Then.GO_ON


def names() -> list[str]:
    """For completion."""
    return [*_COMMANDS, "/quit", *_BARE]


def _help(_argument: str, _conversation: Conversation, display: Display) -> None:
    display.note(HELP)


def _reset(_argument: str, conversation: Conversation, display: Display) -> None:
    conversation.end()
    display.note("a new conversation")


def _system(argument: str, conversation: Conversation, display: Display) -> None:
    if not argument:
        display.note(conversation.system or "there is no system text")
        return
    conversation.end()
    conversation.system = None if argument == "none" else argument
    display.note("a new conversation" + (", with this system text" if conversation.system else ""))


def _model(argument: str, conversation: Conversation, display: Display) -> None:
    if not argument:
        marks = {conversation.model: "* "}
        display.note("\n".join(f"{marks.get(name, '  ')}{name}" for name in conversation.models))
    elif argument in conversation.models:
        conversation.model = argument
        display.note(f"{argument} answers from now on")
    else:
        display.error(f"{argument} is not served; there is {', '.join(conversation.models)}")


def _stats(_argument: str, conversation: Conversation, display: Display) -> None:
    last = conversation.last
    if last is None:
        display.note("nothing has been answered yet")
        return
    lines = [
        f"session {conversation.session_id}, {len(conversation.messages)} messages, {conversation.model}",
        f"history {last.history_tokens} tokens, turn {last.input_tokens}, answer {last.tokens}"
        f" ({last.finish_reason or 'stopped'})",
    ]
    if last.ttft_s is not None:
        lines.append(f"first text after {last.ttft_s:.2f} s")
    if last.tokens_per_s is not None:
        lines.append(f"{last.tokens_per_s:.1f} tokens/s")
    display.note("\n".join(lines))


def _save(argument: str, conversation: Conversation, display: Display) -> None:
    path = Path(argument or f"chat-{conversation.session_id}.md").expanduser()
    as_json = path.suffix == ".json"
    text = _as_json(conversation) if as_json else _as_markdown(conversation.messages)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        display.error(f"{path} is there already; /save OTHER_NAME")
    except OSError as error:
        display.error(f"{path}: {error.strerror}")
    else:
        display.note(f"saved to {path}")


def _as_json(conversation: Conversation) -> str:
    content = {
        "model": conversation.model,
        "session_id": conversation.session_id,
        "messages": conversation.messages,
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _as_markdown(messages: list[Message]) -> str:
    return "\n\n".join(f"## {message['role']}\n\n{text_of(message).strip()}" for message in messages) + "\n"


_COMMANDS: Final[dict[str, Callable[[str, Conversation, Display], None]]] = {
    "/help": _help,
    "/reset": _reset,
    "/system": _system,
    "/model": _model,
    "/stats": _stats,
    "/save": _save,
}
