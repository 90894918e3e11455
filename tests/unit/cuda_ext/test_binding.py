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
    yield monkeypatch
    monkeypatch.undo()
    binding.library.cache_clear()
    restored = binding.library()
    if restored:
        restored.use_level(level)


@needs_library
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "avx512_vnni"])
def test_the_environment_chooses_the_level(forgetful: pytest.MonkeyPatch, level: str) -> None:
    forgetful.setenv("SHOAL_CPU_LEVEL", level)
    plain = binding.CpuLibrary(binding.LIBRARY)
    if not plain.levels()[level]:
        with pytest.raises(StartError, match="this processor can do"):
            binding.library()
        return
    chosen = binding.library()
    assert chosen is not None
    assert chosen.level == level


@needs_library
def test_an_unknown_level_is_refused_by_name(forgetful: pytest.MonkeyPatch) -> None:
    forgetful.setenv("SHOAL_CPU_LEVEL", "sse9")
    with pytest.raises(StartError, match=r"SHOAL_CPU_LEVEL=sse9.*scalar"):
        binding.library()


@needs_library
def test_a_broken_library_is_named_with_the_remedy(forgetful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forgetful.delenv("SHOAL_CPU_LEVEL", raising=False)
    broken = tmp_path / "libshoal_cpu.so"
    broken.write_text("not a library")
    forgetful.setattr(binding, "LIBRARY", broken)
    with pytest.raises(StartError, match="reinstall"):
        binding.library()


@needs_library
def test_a_library_of_other_sources_is_refused(forgetful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forgetful.delenv("SHOAL_CPU_LEVEL", raising=False)
    changed = tmp_path / "shoal_cpu.h"
    changed.write_text(binding.INTERFACE.read_text() + "\n")
    forgetful.setattr(binding, "INTERFACE", changed)
    with pytest.raises(StartError, match="older sources"):
        binding.library()


def test_without_a_library_the_twins_run(forgetful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forgetful.setattr(binding, "LIBRARY", tmp_path / "missing.so")
    forgetful.delenv("SHOAL_CPU_LEVEL", raising=False)
    assert binding.library() is None
    x = torch.randn(3, 10)
    torch.testing.assert_close(eager.gated_activation(x, "silu"), torch.nn.functional.silu(x[:, :5]) * x[:, 5:])
    forgetful.setenv("SHOAL_CPU_LEVEL", "avx2")
    binding.library.cache_clear()
    with pytest.raises(StartError, match="not built"):
        binding.library()


def test_reference_can_be_asked_for(forgetful: pytest.MonkeyPatch) -> None:
    forgetful.setenv("SHOAL_CPU_LEVEL", "reference")
    assert binding.library() is None


def test_the_report_names_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    printed = capsys.readouterr().out
    for operator in binding.OPERATORS:
        assert operator in printed
