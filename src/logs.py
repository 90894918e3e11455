"""One line an event: time, level, process, event name, key=value fields. No stack trace for a user's mistake."""

import logging
import sys
from typing import Any


def configure(process: str, level: str) -> None:
    """Sends this process's log lines to stderr; call once, first thing in ``main``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname)-7s {process} %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger("shoal")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def event(logger: logging.Logger, name: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Logs ``name key=value …``; a value with white space or control characters is quoted, so a line stays one."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", " ".join([name, *(f"{key}={_plain(value)}" for key, value in fields.items())]))


def _plain(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
