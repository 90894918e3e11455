"""An argument vector, and the ``--config`` file that it names, to checked values.

Called by ``launch.py``, which resolves the values into settings. Errors are ``FlagError``: one line, naming the
flag.
"""

import argparse
import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from shoal import __version__
from shoal.errors import FlagError
from shoal.flags import Flag, flags, table

Values = Mapping[str, Any]
"""Flag name → checked value, for every flag of the table; also ``model``, None where not given."""

_USAGE: Final = "%(prog)s [MODEL] [HOST] [--flag value ...]"
_DESCRIPTION: Final = """\
Serves a language model over HTTP: OpenAI's API and LMDeploy's.

MODEL  a Hugging Face folder (config.json, safetensors, tokenizer) or a .gguf file;
       without it the default model, SmolLM2-135M-Instruct, is served
HOST   an address to listen on, as --server_name; anything that does not look like
       an address is taken as the name of the model, as --model_name

Underscores and dashes both work in flags: --server_port, --server-port=8000.
"""
_EPILOG: Final = """\
Signals: TERM and INT finish what runs (--drain_timeout), then exit 0; a second one ends at once.
HUP does the same in the foreground and is ignored with --daemon.
"""


_DOMAIN: Final = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}$", re.IGNORECASE)


def read(argv: Sequence[str]) -> Values:
    """The checked values of a command line; what it leaves out comes from ``--config``, then from the defaults.

    Ends the process after ``--help`` and ``--version``, as argparse does.
    """
    given = _parse(argv)
    config = given.pop("config", None)
    values = {flag.key: flag.default for flag in flags()} | {"model": None}
    if config is not None:
        values |= _read_config(Path(config))
    return values | given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message.removeprefix("argument ").replace("\n", " "))


class _Once(argparse.Action):
    """Stores a value; the same flag with another value contradicts it."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        value = self.const if self.nargs == 0 else tuple(values) if isinstance(values, list) else values
        if getattr(namespace, self.dest, value) != value:
            raise FlagError(f"{option_string} contradicts an earlier --{self.dest}")
        setattr(namespace, self.dest, value)


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """What one argument vector says, without defaults."""
    namespace, rest = _build_parser().parse_known_args(_with_underscores(argv))
    given = vars(namespace)
    _place_words(given, _words(rest))
    for flag in flags():
        _refuse_what_comes_later(flag, given)
    return given


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="api_server",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    for title, group in table():
        section = parser.add_argument_group(title)
        for flag in group:
            _add(section, flag)
    return parser


def _add(section: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [f"--{name}" for name in (flag.name, *flag.aliases)]
    about = flag.help
    if flag.default is not None and flag.switch is None:
        about += f" (default: {flag.default})"
    if flag.neutral is not None:
        about += f" ({_availability(flag.neutral)})"
    about = about.replace("%", "%%")
    if flag.switch is not None:
        section.add_argument(*names, action=_Once, nargs=0, const=flag.switch, dest=flag.key, help=about)
        return
    section.add_argument(
        *names,
        action=_Once,
        nargs="+" if flag.many else None,
        type=_checked(flag),
        metavar=flag.metavar or "VALUE",
        dest=flag.key,
        help=about,
    )


def _availability(neutral: tuple[Any, ...]) -> str:
    if not neutral:
        return "not available yet"
    shown = ", ".join(" ".join(value) if isinstance(value, tuple) else str(value) for value in neutral)
    return f"only {shown} is available yet"


def _checked(flag: Flag) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return flag.parse(text)
        except ValueError as error:
            shown = text if text.isprintable() else repr(text)
            raise FlagError(f"--{flag.name} {shown}: {error}") from None

    return convert


def _with_underscores(argv: Sequence[str]) -> list[str]:
    """Flag names with their dashes as underscores; values are left alone."""
    return [_with_underscore(argument) if argument.startswith("--") else argument for argument in argv]


def _with_underscore(argument: str) -> str:
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _words(rest: list[str]) -> list[str]:
    """What stands without a flag: MODEL and HOST."""
    unknown = next((argument for argument in rest if argument.startswith("-") and argument != "--"), None)
    if unknown is not None:
        raise FlagError(_unknown(unknown.partition("=")[0]))
    words = [argument for argument in rest if argument != "--"]
    if len(words) > 2:
        raise FlagError(f"unexpected argument {words[2]!r}: only MODEL and HOST stand without a flag")
    return words


def _place_words(given: dict[str, Any], words: list[str]) -> None:
    """The second word is an address to listen on where it looks like one, else the model's name."""
    if words:
        given["model"] = words[0]
    if len(words) < 2:
        return
    name = "server_name" if looks_like_host(words[1]) else "model_name"
    if given.setdefault(name, words[1]) != words[1]:
        raise FlagError(f"--{name} {given[name]} contradicts the second argument, {words[1]}")


def looks_like_host(word: str) -> bool:
    """An IP address, ``localhost``, or a domain name."""
    if is_address(word) or word.lower() == "localhost":
        return True
    return _DOMAIN.match(word) is not None and not word.lower().endswith((".gguf", ".cpp"))


def is_address(word: str) -> bool:
    """Whether ``word`` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(word)
    except ValueError:
        return False
    return True


def _unknown(name: str) -> str:
    known = [f"--{alias}" for flag in flags() for alias in (flag.name, *flag.aliases)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"{name}: unknown flag" + (f"; did you mean {close[0]}?" if close else "; see --help")


def _refuse_what_comes_later(flag: Flag, given: dict[str, Any]) -> None:
    if flag.neutral is None or flag.key not in given:
        return
    value = given[flag.key]
    if value not in flag.neutral:
        shown = "" if flag.switch is not None else f" {' '.join(value) if flag.many else value}"
        raise FlagError(f"--{flag.name}{shown}: not available yet")


def _read_config(path: Path) -> dict[str, Any]:
    """The values of a TOML file whose keys are flag names, plus ``model``."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlagError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FlagError(f"--config {path}: not TOML: {error}") from None
    entries = {key.replace("-", "_"): value for key, value in content.items()}
    model = entries.pop("model", None)
    if not isinstance(model, str | None):
        raise FlagError(f"--config {path}: model is a string")
    arguments = [argument for key, value in entries.items() for argument in _as_arguments(path, key, value)]
    try:
        given = _parse(arguments)
    except FlagError as error:
        raise FlagError(f"--config {path}: {error}") from None
    return given if model is None else given | {"model": model}


def _as_arguments(path: Path, key: str, value: object) -> list[str]:
    by_name = {alias: flag for flag in flags() for alias in (flag.name, *flag.aliases)}
    flag = by_name.get(key)
    if flag is None or key == "config":
        raise FlagError(f"--config {path}: {_unknown(f'--{key}')}")
    if flag.switch is not None:
        if not isinstance(value, bool):
            raise FlagError(f"--config {path}: {key} is true or false")
        opposite = next((other.name for other in flags() if other.target == flag.key), None)
        return [f"--{key}"] if value else [f"--{opposite}"] if opposite else []
    if flag.many and isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FlagError(f"--config {path}: {key} has a value of the wrong kind")
    return [f"--{key}={value}"]
