import random

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.cuda_ext.program import Count, Program
from shoal.errors import ModelError, StartError
from shoal.workers.parallel import Shard, SoloGroup, form_group, split

SMOLLM2 = ModelDescription(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    max_position=8192,
    norm_eps=1e-5,
    rope=Rope(dim=64),
    layer_windows=(0,) * 30,
    attention_scale=0.125,
    tied_head=True,
)
GEMMA = replace(SMOLLM2, hidden_size=640, num_heads=4, num_kv_heads=1, head_dim=256, ffn_size=2048)


def shards(description: ModelDescription, tp: int) -> list[Shard]:
    return [split(description, tp, rank) for rank in range(tp)]


def weights(description: ModelDescription, shard: Shard) -> int:
    heads = 2 * (len(shard.q_heads) + len(shard.kv_heads)) * description.head_dim
    per_layer = description.hidden_size * (heads + 3 * len(shard.ffn))
    return description.num_layers * per_layer + len(shard.vocab) * description.hidden_size


def test_smollm2_over_two_ranks_is_uneven_in_heads_and_even_in_weight() -> None:
    first, second = shards(SMOLLM2, 2)
    assert (first.q_heads, first.kv_heads) == (range(6), range(2))
    assert (second.q_heads, second.kv_heads) == (range(6, 9), range(2, 3))
    assert first.cache_share == pytest.approx(2 / 3)
    whole = weights(SMOLLM2, split(SMOLLM2, 1, 0))
    assert max(weights(SMOLLM2, shard) for shard in (first, second)) < whole / 2 * 1.01
    assert first.ffn.stop % 32 == 0


def test_gemmas_one_kv_head_is_on_both_ranks() -> None:
    first, second = shards(GEMMA, 2)
    assert (first.q_heads, first.kv_heads) == (range(2), range(1))
    assert (second.q_heads, second.kv_heads) == (range(2, 4), range(1))
    assert first.cache_share == second.cache_share == 0.5


def test_every_split_covers_everything_once_by_whole_groups() -> None:
    for _ in range(300):
        kv_heads, group = random.randint(1, 9), random.randint(1, 8)
        description = replace(
            SMOLLM2,
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            ffn_size=random.randint(80, 3000),
            vocab_size=random.randint(80, 9000),
        )
        tp = random.randint(1, description.num_heads)
        parts = shards(description, tp)
        assert [h for part in parts for h in part.q_heads] == list(range(description.num_heads))
        assert [c for part in parts for c in part.ffn] == list(range(description.ffn_size))
        assert [v for part in parts for v in part.vocab] == list(range(description.vocab_size))
        assert all(part.vocab_widths == tuple(len(p.vocab) for p in parts) for part in parts)
        assert sum(part.cache_share for part in parts) == pytest.approx(1)
        for part in parts:
            assert len(part.ffn) > 0
            assert len(part.vocab) > 0
            local_group = len(part.q_heads) // len(part.kv_heads)
            for index, head in enumerate(part.q_heads):
                assert part.kv_heads[index // local_group] == head // group
            if tp <= kv_heads:
                assert local_group == group


def test_more_ranks_than_heads_are_refused_by_flag() -> None:
    with pytest.raises(StartError, match=r"--tp 10.*--tp 9"):
        split(SMOLLM2, 10, 0)


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(ModelError, match="num_key_value_heads"):
        split(replace(SMOLLM2, num_kv_heads=2), 1, 0)


def test_one_rank_needs_no_rendezvous() -> None:
    group = form_group(1, 0, "/nowhere/at/all")
    assert isinstance(group, SoloGroup)
    x = torch.randn(3, 5)
    group.add_up(Program(), x, Count(3))
    assert group.gather_columns(Program(), x, (5,), Count(3)) is x
    group.broadcast(np.arange(3))
    group.close()
