"""``python tests/fakes/fake_server.py [MODEL] --server_port N …``: the real server with fake workers."""

import sys
from pathlib import Path

from shoal.errors import StartError
from shoal.launch import prepare
from shoal.supervisor.main import serve

FAKE_WORKER = (sys.executable, str(Path(__file__).resolve().parent / "fake_worker.py"))

if __name__ == "__main__":
    try:
        sys.exit(serve(prepare(sys.argv[1:]), FAKE_WORKER))
    except StartError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
