"""What nvcc makes of the kernels, where there is nvcc: every chip, no spills, the registers that the table has."""

import cuda_build


def test_no_kernel_spills_and_registers_are_those_of_the_table() -> None:
    """Where they change on purpose: ``python tests/cuda_build.py`` writes the table anew."""
    folder = cuda_build.build()
    spilling = {
        (name, chip): spilled
        for name, chips in cuda_build.resources(folder).items()
        for chip, (_, spilled, _) in chips.items()
        if spilled
    }
    assert not spilling
    written = cuda_build.TABLE.read_text()
    if written.startswith(cuda_build.nvcc_version() + "\n"):
        assert cuda_build.table(folder) == written


def test_no_products_of_wgmma_wait_for_each_other() -> None:
    assert not cuda_build.serialised(cuda_build.build())
