"""What stands around a step: tokens fed from the step before, rows taken, logits capped, adjusted and masked."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.messages import Sampling
from shoal.workers.sampler import SamplerRow

VOCABULARY = 777


def random_logits(fresh: torch.Generator, rows: int) -> Tensor:
    """Rows of a wider matrix."""
    return torch.randn(rows, VOCABULARY + 5, generator=fresh)[:, :VOCABULARY] * 4


def sizes(logits: Tensor) -> dict[str, int]:
    return {"rows": len(logits), "vocabulary": VOCABULARY, "row_stride": logits.stride(0)}


@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_tokens_are_fed_from_where_they_were_drawn(
    cuda: CudaLibrary, fresh: torch.Generator, tokens: int
) -> None:
    ids = torch.randint(VOCABULARY, (tokens,), generator=fresh)
    drawn = torch.randint(-1, VOCABULARY, (9,), generator=fresh)
    drawn[3] = -1
    # Also sources that there are not, which are left out.
    sources = torch.randint(-1, 11, (tokens,), generator=fresh, dtype=torch.int32)
    expected = [
        max(int(drawn[source]), 0) if 0 <= source < 9 else int(old)
        for old, source in zip(ids.tolist(), sources.tolist(), strict=True)
    ]
    cuda.call("feed_tokens", token_ids=ids, drawn=drawn, sources=sources, tokens=tokens, rows=9)
    assert ids.tolist() == expected


@pytest.mark.parametrize("columns", [64, 61])
def test_rows_are_taken(cuda: CudaLibrary, fresh: torch.Generator, columns: int) -> None:
    x = torch.randn(13, columns, generator=fresh).bfloat16()
    rows, out = torch.tensor([12, 0, 5, 5, 13, -1, 1]), torch.ones(7, columns).bfloat16()
    cuda.call("take_rows", out=out, x=x, rows=rows, count=7, x_rows=13, row_bytes=2 * columns)
    expected = torch.stack([x[row] if 0 <= row < 13 else torch.ones(columns).bfloat16() for row in rows])
    assert torch.equal(out, expected)


def test_logits_are_capped(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    logits = random_logits(fresh, 3)
    expected = torch.tanh(logits.double() / 5.5) * 5.5
    cuda.call("cap_logits", logits=logits, **sizes(logits), cap=5.5)
    torch.testing.assert_close(logits.double(), expected, rtol=2e-6, atol=1e-6)


def test_biases_and_penalties_are_the_hosts_to_the_bit(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    tokens = torch.randint(VOCABULARY, (4, 90), generator=fresh).tolist()
    wanted = [
        Sampling(seed=1, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.21),
        Sampling(seed=1),
        Sampling(seed=1, logit_bias=tuple((token, 0.37 * token) for token in range(0, VOCABULARY, 3))),
        Sampling(seed=1, logit_bias=((5, 3.3), (tokens[3][0], -1.7)), frequency_penalty=-0.4),
    ]
    rows = [SamplerRow(s, ids[:50], ids[50:], VOCABULARY) for s, ids in zip(wanted, tokens, strict=True)]
    logits = random_logits(fresh, 4)
    expected = logits.clone()
    for row, view in zip(rows, expected.numpy(), strict=True):
        row.adjust(view)

    def entries(parts: list[tuple[np.ndarray, np.ndarray]], names: tuple[str, str, str]) -> dict[str, Tensor]:
        ends = np.cumsum([0, *(len(ids) for ids, _ in parts)], dtype=np.int32)
        ids, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        return dict(zip(names, map(torch.from_numpy, (ends, ids.astype(np.int32), values)), strict=True))

    penalties = {
        name: torch.tensor([getattr(s, f"{name}_penalty") for s in wanted], dtype=torch.float32)
        for name in ("repetition", "presence", "frequency")
    }
    cuda.call(
        "adjust_logits",
        logits=logits,
        **entries([row.bias for row in rows], ("bias_starts", "bias_ids", "biases")),
        **entries([row.seen for row in rows], ("seen_starts", "seen_ids", "seen_counts")),
        **penalties,
        **sizes(logits),
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


def test_masked_logits_are_minus_infinity(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    logits = random_logits(fresh, 5)
    forbidden = torch.rand(2, VOCABULARY, generator=fresh) < 0.5
    mask_of = torch.tensor([1, -1, 0, 1, -1], dtype=torch.int32)
    logits[0, 5], logits[0, 6] = torch.nan, torch.inf
    forbidden[1, 5:7] = True
    masks = torch.from_numpy(np.packbits(forbidden.numpy(), axis=1, bitorder="little"))
    expected = logits.clone()
    for row, mask in enumerate(mask_of.tolist()):
        if mask >= 0:
            expected[row][forbidden[mask] & (logits[row] < torch.inf)] = -torch.inf
    cuda.call(
        "mask_logits",
        logits=logits,
        mask_of=mask_of,
        masks=masks,
        mask_bytes=masks.shape[1],
        **sizes(logits),
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
