"""Every kind of integer weights, with random ones of each: for the tests of the CPU's and the GPU's products."""

import torch

from shoal.cuda_ext.quantised import QuantisedGroups, WeightFormat

FORMATS = [
    WeightFormat(4, 32, True),
    WeightFormat(4, 32, False),
    WeightFormat(8, 32, True),
    WeightFormat(8, 32, False),
    WeightFormat(8, 16, True),
    WeightFormat(8, 16, False),
]


def random_groups(fresh: torch.Generator, form: WeightFormat, outputs: int, inputs: int) -> QuantisedGroups:
    """Every code there is, the extreme ones too."""
    groups = -(-inputs // form.group)
    codes = torch.randint(0, 1 << form.bits, (outputs, groups, form.group), generator=fresh, dtype=torch.uint8)
    codes[0] = 0
    codes[-1] = (1 << form.bits) - 1
    scales = (torch.randn(outputs, groups, generator=fresh) * 0.01).half()
    offsets = torch.randn(outputs, groups, generator=fresh).mul(0.1).half() if form.has_offset else None
    return QuantisedGroups(codes, scales, offsets, form.bits)
