"""``python -m shoal.client URL``: the chat in a terminal."""

import sys

from shoal.client.terminal import main

if __name__ == "__main__":
    sys.exit(main.run(sys.argv[1:], "python -m shoal.client"))
