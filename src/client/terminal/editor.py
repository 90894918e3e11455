"""The line that a person writes: editing, history over sessions, completion of commands, several lines."""

import os
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from shoal.client.terminal import commands


class Editor:
    """A Reader for people. ``say`` is told where no history can be kept."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._session: PromptSession[str] = PromptSession(
            message="› ",
            prompt_continuation="  ",
            multiline=True,
            key_bindings=_keys(),
            history=_history(say),
            auto_suggest=AutoSuggestFromHistory(),
            completer=WordCompleter(commands.names(), sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """Raises EOFError on ctrl-D, KeyboardInterrupt on ctrl-C."""
        return self._session.prompt()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send_or_continue(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def history_path() -> Path:
    """Where state of programs belongs."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "shoal" / "api_client_history"


def _history(say: Callable[[str], None]) -> History:
    """Only its owner may read it."""
    path = history_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        say(f"no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))
