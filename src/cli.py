"""The commands of a person at a terminal: ``shoal serve api_server …``, and what ``bin/`` calls.

Every mistake ends in one line on standard error and an exit code: 2 for the command line, 1 for the start.
"""

import sys
from collections.abc import Sequence

from shoal import __version__
from shoal.errors import StartError

_USAGE = """\
usage: shoal serve api_server [MODEL] [HOST] [--flag value ...]
       shoal --version

Commands:
  serve api_server   serves a model over HTTP; its flags: shoal serve api_server --help
  serve api_client   chats from a terminal (not available yet)
  serve gradio       serves a web page (not available yet)
"""


def main() -> int:
    """The console script ``shoal``."""
    match sys.argv[1:]:
        case ["serve", "api_server", *rest]:
            return api_server(rest)
        case ["serve", "api_client" | "gradio" as command, *_]:
            return _mistake(f"serve {command}: not available yet")
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


def _mistake(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
