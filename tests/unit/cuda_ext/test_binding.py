"""The Python side of the C interface: field tables, levels, and what is said where something is missing."""

import re
from pathlib import Path

import eager
import pytest
import torch

from shoal.cuda_ext import __main__ as report
from shoal.cuda_ext import binding
from shoal.errors import StartError

needs_library = pytest.mark.skipif(not binding.LIBRARY.exists(), reason="no CPU library was built")


def fields_of(struct: str) -> list[str]:
    """The fields of a struct of the header, marked as binding.OPERATORS marks them."""
    body = re.search(rf"struct {struct} {{(.*?)\n}};", binding.INTERFACE.read_text(), re.DOTALL)
    assert body is not None
    fields = []
    for line in re.sub(r"//.*", "", body[1]).split(";"):
        if not line.strip():
            continue
        declared = re.fullmatch(r"(?:const )?(\w+)(\*?) (.*)", line.strip(), re.DOTALL)
        assert declared is not None
        mark = "*" if declared[2] else {"int64_t": "", "double": "."}[declared[1]]
        fields += [mark + name.strip() for name in declared[3].split(",")]
    return fields


@pytest.mark.parametrize("operator", binding.OPERATORS)
def test_field_tables_are_the_headers(operator: str) -> None:
    odd = {
        "paged_attention": "AttentionArgs",
        "linear_quantised": "QuantisedLinearArgs",
        "pack_quantised": "PackQuantisedArgs",
    }
    struct = odd.get(operator, operator.title().replace("_", "") + "Args")
    assert binding.OPERATORS[operator].split() == fields_of(struct)


def test_every_struct_has_a_table() -> None:
    assert len(re.findall(r"struct \w+Args", binding.INTERFACE.read_text())) == len(binding.OPERATORS)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """library() decides anew inside the test, and after it."""
    chosen = binding.library()
    level = chosen.level if chosen else ""
    binding.library.cache_clear()
    monkeypatch.delenv("SHOAL_CPU_LIBRARY", raising=False)
    monkeypatch.delenv("SHOAL_CPU_LEVEL", raising=False)
    yield monkeypatch
    monkeypatch.undo()
    binding.library.cache_clear()
    restored = binding.library()
    if restored:
        restored.use_level(level)


@needs_library
def test_the_environment_chooses_the_level(forgetful: pytest.MonkeyPatch) -> None:
    levels = binding.CpuLibrary(binding.LIBRARY).levels()
    assert levels["scalar"]
    for level, is_supported in levels.items():
        forgetful.setenv("SHOAL_CPU_LEVEL", level)
        binding.library.cache_clear()
        if not is_supported:
            with pytest.raises(StartError, match="this processor can do"):
                binding.library()
            continue
        chosen = binding.library()
        assert chosen is not None
        assert chosen.level == level


@needs_library
def test_the_best_level_is_taken_by_itself(tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"  # of which no test has chosen a level
    copy.write_bytes(binding.LIBRARY.read_bytes())
    untouched = binding.CpuLibrary(copy)
    assert untouched.level == next(name for name, is_supported in untouched.levels().items() if is_supported)


@needs_library
def test_an_unknown_level_is_refused_by_name(forgetful: pytest.MonkeyPatch) -> None:
    forgetful.setenv("SHOAL_CPU_LEVEL", "sse9")
    with pytest.raises(StartError, match=r"SHOAL_CPU_LEVEL=sse9.*scalar"):
        binding.library()


@needs_library
def test_a_broken_library_is_named_with_the_remedy(forgetful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libshoal_cpu.so"
    broken.write_text("not a library")
    forgetful.setattr(binding, "LIBRARY", broken)
    with pytest.raises(StartError, match="reinstall"):
        binding.library()


@needs_library
def test_a_library_of_other_sources_is_refused(forgetful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / "shoal_cpu.h"
    changed.write_text(binding.INTERFACE.read_text() + "\n")
    forgetful.setattr(binding, "INTERFACE", changed)
    with pytest.raises(StartError, match="older sources"):
        binding.library()


def test_without_a_library_the_twins_run(forgetful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forgetful.setattr(binding, "LIBRARY", tmp_path / "missing.so")
    assert binding.library() is None
    x = torch.randn(3, 10)
    torch.testing.assert_close(eager.gated_activation(x, "silu"), torch.nn.functional.silu(x[:, :5]) * x[:, 5:])
    forgetful.setenv("SHOAL_CPU_LEVEL", "avx2")
    binding.library.cache_clear()
    with pytest.raises(StartError, match="not built"):
        binding.library()


@needs_library
def test_another_library_can_be_named(forgetful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(binding.LIBRARY.read_bytes())
    forgetful.setenv("SHOAL_CPU_LIBRARY", str(other))
    assert binding.library_path() == other
    assert binding.library() is not None
    other.unlink()
    binding.library.cache_clear()
    with pytest.raises(StartError, match=r"SHOAL_CPU_LIBRARY=.*other\.so: there is no such file"):
        binding.library()


def test_reference_can_be_asked_for(forgetful: pytest.MonkeyPatch) -> None:
    forgetful.setenv("SHOAL_CPU_LEVEL", "reference")
    assert binding.library() is None


@needs_library
@pytest.mark.parametrize("level", ["", "scalar", "reference"])
def test_the_report_says_what_each_operator_runs_on(
    forgetful: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str
) -> None:
    forgetful.setenv("SHOAL_CPU_LEVEL", level)
    assert report.main() == 0
    printed = capsys.readouterr().out
    compiled = binding.library()
    runs_on = f"torch {torch.__version__}" if compiled is None else f"compiled, {compiled.level}"
    unused = report.WITHOUT_TWIN
    if compiled is not None:
        unused = report.WITHOUT_TILES if compiled.has_tiles else report.WITH_TILES_ALONE
    for operator in binding.OPERATORS:
        if operator in unused:
            assert re.search(rf"^{operator} +not used", printed, re.MULTILINE)
        else:
            assert re.search(rf"^{operator} +{re.escape(runs_on)}", printed, re.MULTILINE)
    assert compiled is None or all(name in printed for name in compiled.levels())


@needs_library
def test_the_report_says_what_is_wrong(
    forgetful: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forgetful.setenv("SHOAL_CPU_LEVEL", "sse9")
    assert report.main() == 1
    assert "SHOAL_CPU_LEVEL=sse9" in capsys.readouterr().err
