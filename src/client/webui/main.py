"""The command line of the page, and its life: up until SIGINT or SIGTERM."""

import argparse
import importlib.util
import ipaddress
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Final

from shoal.client.api_client import APIClient
from shoal.client.arguments import Parser, count
from shoal.client.errors import APIError

_SILENT_GRADIO: Final = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Read when gradio is imported: nothing is sent anywhere but to the Shoal server."""


def run(argv: Sequence[str], program: str = "webui") -> int:
    """Serves the page until told to stop; the exit code."""
    options = _parser(program).read(argv)
    if importlib.util.find_spec("gradio") is None:
        return _failure("the page needs gradio: pip install 'shoal[webui]'", code=2)
    os.environ.update(_SILENT_GRADIO)
    try:
        with APIClient(options.url, options.api_key, options.timeout, verify=options.ca_file or True) as client:
            return _serve(client, options)
    except (APIError, ValueError, OSError) as error:
        return _failure(str(error), code=1)


def _serve(client: APIClient, options: argparse.Namespace) -> int:
    """Raises APIError where the server is not there, OSError where the port is taken."""
    from shoal.client.webui import page

    models = client.available_models
    if not models:
        raise ValueError(f"{options.url} serves no model")
    demo = page.build(client, models)
    url = page.launch(
        demo,
        server_name=options.server_name,
        server_port=options.server_port,
        share=options.share,
        login=options.login,
    )
    told_to_stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told_to_stop.set())
    if options.login is None and not _is_loopback(options.server_name):
        sys.stderr.write("warning: whoever reaches this page can use the server; set --login\n")
    sys.stdout.write(f"the page is at {url}\n")
    sys.stdout.flush()
    told_to_stop.wait()
    demo.close(verbose=False)
    return 0


def _parser(program: str) -> Parser:
    parser = Parser(program, "Serves a web page that chats with a Shoal server.")
    add = parser.add_argument
    add("--server-name", default="localhost", metavar="NAME", help="where the page listens (default localhost)")
    add("--server-port", type=_port, default=6006, metavar="PORT", help="default 6006")
    add(
        "--login",
        type=_login,
        default=os.environ.get("SHOAL_WEBUI_LOGIN"),
        metavar="NAME:PASSWORD",
        help="asked for before the page is shown (default: $SHOAL_WEBUI_LOGIN)",
    )
    add("--share", action="store_true", help="also opens a public address, a tunnel of gradio's makers")
    return parser


def _port(text: str) -> int:
    port = count(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 to 65535")
    return port


def _login(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise argparse.ArgumentTypeError("must look like NAME:PASSWORD")
    return name, password


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _failure(message: str, *, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code
