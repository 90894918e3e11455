"""The commands of a person at a terminal: ``shoal serve api_server …``, and what ``bin/`` calls.

Every mistake ends in one line on standard error and an exit code: 2 for the command line, 1 for the start.
"""

import sys
from collections.abc import Sequence

from shoal import __version__
from shoal.errors import StartError

_USAGE = """\
usage: shoal serve api_server [MODEL] [HOST] [--flag value ...]
       shoal serve api_client [URL] [--flag value ...]
       shoal serve gradio [URL] [--flag value ...]
       shoal --version

Commands, each with a --help of its own:
  serve api_server   serves a model over HTTP
  serve api_client   chats with a server from a terminal
  serve gradio       serves a web page that chats with a server
"""


def main() -> int:
    """The console script ``shoal``."""
    match sys.argv[1:]:
        case ["serve", "api_server", *rest]:
            return api_server(rest)
        case ["serve", "api_client", *rest]:
            return api_client(rest, "shoal serve api_client")
        case ["serve", "gradio" | "webui" as command, *rest]:
            return webui(rest, f"shoal serve {command}")
        case ["--version"]:
            sys.stdout.write(f"shoal {__version__}\n")
            return 0
        case ["--help" | "-h"] | ["serve", "--help" | "-h"]:
            sys.stdout.write(_USAGE)
            return 0
        case []:
            return _mistake("a command is missing: try shoal serve api_server, or shoal --help")
        case ["serve"]:
            return _mistake("serve what? try shoal serve api_server, or shoal --help")
        case ["serve", command, *_]:
            return _mistake(f"serve {command}: unknown command; see shoal --help")
        case [command, *_]:
            return _mistake(f"{command}: unknown command; see shoal --help")
    return 2


def api_server(argv: Sequence[str]) -> int:
    """Serves a model until told to stop; the exit code."""
    from shoal import launch
    from shoal.supervisor import main as supervisor

    try:
        return supervisor.serve(launch.prepare(argv))
    except StartError as error:
        return _mistake(str(error))


def api_client(argv: Sequence[str], program: str = "api_client") -> int:
    """Chats from a terminal; the exit code."""
    from shoal.client.terminal import main as terminal

    return terminal.run(argv, program)


def webui(argv: Sequence[str], program: str = "webui") -> int:
    """Serves the gradio page until told to stop; the exit code."""
    from shoal.client.webui import main as page

    return page.run(argv, program)


def _mistake(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
