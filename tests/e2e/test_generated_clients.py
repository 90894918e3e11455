"""openapi-generator's clients: made from /openapi.json without a complaint, compiled, and used against the server."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from frontend_kit import LMDEPLOY_SCHEMAS, Kit
from server import running_server

JAVA = shutil.which("java")
GO = shutil.which("go")
DEBIAN_GO_PACKAGES = Path("/usr/share/gocode")
"""Where Debian's golang-gopkg-validator.v2-dev puts the one package that generated Go code imports."""
GENERATOR = importlib.util.find_spec("openapi_generator_cli")

SAID_OF_EVERY_DOCUMENT = [
    r"OpenAPI 3\.1 support is still in beta",
    r"Failed to get the schema name: null",
    r"cannot be used as (a )?[\w/ ]+ name\. Renamed to",
]
"""What the generator warns of whatever the document says: that its version is 3.1, that a union has a branch that is
no object, and that a type or a field has a name that is a word of the language (``ApplicationJson`` is the media type).
"""

pytestmark = [
    pytest.mark.skipif(JAVA is None, reason="needs java"),
    pytest.mark.skipif(GENERATOR is None, reason="needs the package openapi-generator-cli"),
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openapi") / "openapi.json"
    path.write_bytes(Kit().get("/openapi.json").content)
    return path


@pytest.mark.parametrize("language", ["python", "go", "java", "rust"])
def test_a_client_is_made_without_a_complaint(language: str, document: Path, tmp_path: Path) -> None:
    log = generate(language, document, tmp_path)
    complaints = [
        line
        for line in log.splitlines()
        if re.search(r"\b(WARN|ERROR)\b|Exception", line)
        and "writing file" not in line
        and not any(re.search(known, line) for known in SAID_OF_EVERY_DOCUMENT)
    ]
    assert complaints == []
    names = {_plain(path.stem) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"apidefault", "defaultapi"} & names, "operations have no tag"
    for model in LMDEPLOY_SCHEMAS:
        assert {model.lower(), f"model{model.lower()}"} & names, f"no {model}"


@pytest.mark.skipif(GO is None, reason="needs go")
@pytest.mark.skipif(
    not DEBIAN_GO_PACKAGES.joinpath("src/gopkg.in/validator.v2").is_dir(), reason="needs validator.v2"
)
def test_the_go_client_compiles(document: Path, tmp_path: Path) -> None:
    assert GO is not None
    made = tmp_path / "made"
    generate("go", document, made)
    package = tmp_path / "gopath" / "src" / "client"
    package.mkdir(parents=True)
    for source in made.glob("*.go"):
        shutil.copy(source, package)
    environment = os.environ | {
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "GOPATH": f"{tmp_path / 'gopath'}:{DEBIAN_GO_PACKAGES}",
        "GOCACHE": str(tmp_path / "cache"),
    }
    built = subprocess.run([GO, "build", "."], cwd=package, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


CALLS = """
import sys
import openapi_client as made

api = made.DefaultApi(made.ApiClient(made.Configuration(host=sys.argv[1])))
models = api.available_models_v1_models_get()
print("model", models.data[0].id)

message = made.ChatMessage(role="user", content=made.ChatMessageContent("Say this is a test!"))
request = made.ChatCompletionRequest(messages=made.Messages([message]), max_tokens=6, seed=2**40, temperature=0)
answer = api.chat_completions_v1_v1_chat_completions_post(request)
print("chat", answer.usage.completion_tokens, bool(answer.choices[0].message.content))

request = made.CompletionRequest(prompt=made.Prompt("two steps to build a house:"), max_tokens=5)
print("completion", api.completions_v1_v1_completions_post(request).usage.completion_tokens)

request = made.GenerateRequest(prompt=made.GenerateRequestPrompt("Hello! How are you?"), request_output_len=4)
print("interactive", api.chat_interactive_v1_v1_chat_interactive_post(request).tokens)

try:
    message = made.Messages("hi")
    api.chat_completions_v1_v1_chat_completions_post(made.ChatCompletionRequest(messages=message, temperature=9))
except made.ApiException as error:
    print("error", error.status, error.data.error.param)
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pydantic", "urllib3", "dateutil")),
    reason="generated Python needs pydantic, urllib3 and python-dateutil",
)
def test_the_python_client_calls_the_server(document: Path, tmp_path: Path) -> None:
    generate("python", document, tmp_path)
    with running_server(f"--data_dir={tmp_path / 'data'}") as server:
        called = subprocess.run(
            [sys.executable, "-c", CALLS, server.url],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        _, models = server.get("/v1/models")
    assert called.returncode == 0, called.stderr
    said = dict(line.split(" ", 1) for line in called.stdout.splitlines())
    assert said.pop("model") in models
    assert said == {
        "chat": "6 True",
        "completion": "5",
        "interactive": "4",
        "error": "400 temperature",
    }


def generate(language: str, document: Path, into: Path) -> str:
    """What the generator said."""
    assert JAVA is not None
    assert GENERATOR is not None
    assert GENERATOR.origin is not None
    jar = Path(GENERATOR.origin).with_name("openapi-generator.jar")
    command = [JAVA, "-jar", str(jar), "generate", "-i", str(document), "-g", language, "-o", str(into)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    return ran.stdout + ran.stderr


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
