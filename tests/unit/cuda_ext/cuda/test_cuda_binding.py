"""The table of CUDA operators against the header, the sources and the tests; what is said of the library."""

import re
from pathlib import Path

import cuda_calls
import pytest
import torch
from emulated import SOURCES
from on_chip import OnChip
from torch import Tensor

from shoal.cuda_ext import __main__ as report
from shoal.cuda_ext import cuda_binding
from shoal.cuda_ext.cuda_binding import OPERATORS, CudaLibrary
from shoal.errors import StartError

HEADER = cuda_binding.INTERFACE.read_text()


def launchers() -> dict[str, str]:
    """Each operator that a source exports, and the name of its struct."""
    text = "\n".join(path.read_text() for path in sorted(SOURCES.glob("*.cu")))
    return dict(re.findall(r'extern "C" EXPORT int shoal_(\w+)\(const (\w+)\* \w+\)', text))


def fields_of(struct: str) -> list[str]:
    """The fields of a struct of the header, marked as OPERATORS marks them."""
    body = re.search(rf"struct {struct} {{(.*?)\n}};", HEADER, re.DOTALL)
    assert body is not None
    fields = []
    for line in re.sub(r"//.*", "", body[1]).split(";"):
        if not line.strip():
            continue
        declared = re.fullmatch(r"(?:const )?(\w+)(\*(?: const\*)?)? (.*)", line.strip(), re.DOTALL)
        assert declared is not None
        mark = "*" if declared[2] else {"int64_t": "", "double": "."}[declared[1]]
        fields += [mark + name.strip() for name in declared[3].split(",")]
    return fields


def test_every_kernel_begins_by_waiting_for_the_one_ahead() -> None:
    """The emulation has no kernels that come early."""
    texts = [path.read_text() for path in SOURCES.iterdir() if path.suffix in (".cu", ".h")]
    begins = [begin for text in texts for begin in re.findall(r"__global__ void [^;{]*\{\n *([^\n]*)", text)]
    assert len(begins) >= len(OPERATORS)
    assert set(begins) == {"begin_kernel();"}


def test_every_launcher_is_in_the_table() -> None:
    assert launchers().keys() == OPERATORS.keys() == cuda_binding.PICKS.keys()
    assert sorted(launchers().values()) == sorted(re.findall(r"struct (\w+Args) {", HEADER))


@pytest.mark.parametrize("operator", OPERATORS)
def test_field_tables_are_the_headers(operator: str) -> None:
    assert OPERATORS[operator].split() == fields_of(launchers()[operator])


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_test_that_starts_it(operator: str) -> None:
    tests = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    assert any(re.search(rf'(call\(|return)\s*"{operator}",', path.read_text()) for path in tests)


def test_every_operator_has_an_example() -> None:
    """Which sanitizers watch."""
    random = torch.Generator()
    assert {
        operator for example in cuda_calls.EXAMPLES.values() for operator, _ in example(random)
    } == OPERATORS.keys()


def test_the_library_says_what_it_is(emulation: CudaLibrary) -> None:
    assert emulation.is_emulated
    assert emulation.chips() == {"0: emulated chip": "sm_80"}


def test_a_library_of_other_sources_is_refused(
    cuda: CudaLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "shoal_cuda.h"
    changed.write_text(HEADER + "\n")
    monkeypatch.setattr(cuda_binding, "INTERFACE", changed)
    with pytest.raises(StartError, match="older sources"):
        CudaLibrary(Path(cuda.path))


def test_tensors_may_be_copied_to_where_the_kernels_run(emulation: CudaLibrary) -> None:
    """What tests on a chip do, here with copies on the CPU: views, and addresses in memory."""
    copied = OnChip(emulation.path, torch.device("cpu"))
    for operator, example in cuda_calls.EXAMPLES.items():
        here, there = (example(torch.Generator().manual_seed(5)) for _ in range(2))
        together = operator in cuda_calls.TOGETHER
        emulation.run(here, together=together)
        copied.run(there, together=together)
        for (_, fields), (_, others) in zip(here, there, strict=True):
            for name, value in fields.items():
                if isinstance(value, Tensor) and name not in ("regions", "widths"):
                    assert torch.equal(value.view(torch.uint8), others[name].view(torch.uint8))


def test_unknown_fields_and_types_are_refused(cuda: CudaLibrary) -> None:
    with pytest.raises(ValueError, match="no field colour"):
        cuda.call("rms_norm", colour=3)
    with pytest.raises(NotImplementedError, match="rms_norm"):
        cuda.call("rms_norm", out=torch.zeros(1), outer=1, inner=1, dim=1, x_dtype=3, dtype=1)


def test_the_report_names_the_library_and_its_operators(
    emulation: CudaLibrary, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SHOAL_CUDA_LIBRARY", str(emulation.path))
    assert report.main() == 0
    printed = capsys.readouterr().out
    assert "compiled for: emulation" in printed
    for operator in OPERATORS:
        assert re.search(rf"^{operator} +CUDA: \w", printed, re.MULTILINE)
    monkeypatch.setenv("SHOAL_CUDA_LIBRARY", str(tmp_path / "missing.so"))
    assert report.main() == 0
    assert "CUDA library: not built" in capsys.readouterr().out
