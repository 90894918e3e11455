"""schemathesis reads /openapi.json and sends what it allows, and what it forbids, to every operation.

By default some hundred cases; ``SHOAL_SCHEMATHESIS_CASES=2000`` sends at least so many, and tries the boundaries of
every field as well. The ranks are fakes: what is tested is the API, and a model would take minutes to babble.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server import FAKE_SERVER, running_server

DEFAULT_CASES = 400
CASES = int(os.environ.get("SHOAL_SCHEMATHESIS_CASES", DEFAULT_CASES))
STOPPING = ("/admin/drain", "/sleep")
"""What would end the run; they have tests of their own."""
UNFIT_CHECK = "positive_data_acceptance"
"""Takes a 400 for a fault: but a prompt that is too long, or a grammar that is none, fits any schema."""


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="needs the package schemathesis")
def test_no_request_makes_the_server_fail_or_break_its_word(tmp_path: Path) -> None:
    with running_server(f"--data_dir={tmp_path / 'data'}", "--session_len=256", command=FAKE_SERVER) as server:
        _, document = server.get("/openapi.json")
        operations = document.count('"operationId"')
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            f"--phases={'examples,fuzzing' if CASES <= DEFAULT_CASES else 'examples,coverage,fuzzing,stateful'}",
            f"--max-examples={max(4, CASES // operations)}",
            *(f"--exclude-path={path}" for path in STOPPING),
            f"--exclude-checks={UNFIT_CHECK}",
            *("--seed=1", "--request-timeout=60", "--continue-on-failure", "--no-color"),
        ]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
        assert ran.returncode == 0, ran.stdout[-12_000:] + ran.stderr[-2000:]
        counted = re.search(r"(\d+) generated, (\d+) passed", ran.stdout)
        assert counted is not None, ran.stdout[-3000:]
        generated, passed = map(int, counted.groups())
        print(f"schemathesis: {generated} cases")
        assert generated == passed
        assert generated >= min(CASES, DEFAULT_CASES) * 0.6
        assert server.get("/ready")[0] == 200
        assert "request failed" not in server.log(), "an exception that nobody expected"
