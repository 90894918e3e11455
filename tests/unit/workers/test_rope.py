import math
import random

import pytest
import torch
from torch.testing import assert_close

from shoal.checkpoint.description import Rope
from shoal.errors import ModelError
from shoal.workers.rope import attention_factor, cos_sin_table, inverse_frequencies


def truth(theta: float, dim: int) -> list[float]:
    return [theta ** (-2 * pair / dim) for pair in range(dim // 2)]


def test_plain_table_is_the_cosines_then_the_sines_of_every_position() -> None:
    theta, dim, position = random.uniform(500, 9e5), random.choice([6, 14, 40]), random.randrange(300)
    table = cos_sin_table(Rope(theta=theta, dim=dim), dim, 301)
    angles = [position * frequency for frequency in truth(theta, dim)]
    assert table.shape == (301, dim)
    assert table.dtype == torch.float32
    expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    assert_close(table[position], expected, atol=1e-4, rtol=0)


def test_linear_scaling_stretches_positions() -> None:
    plain = cos_sin_table(Rope(dim=10), 10, 50)
    stretched = cos_sin_table(Rope(dim=10, scaling="linear", factor=3), 10, 148)
    assert_close(stretched[::3], plain, atol=1e-4, rtol=0)


def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between() -> None:
    rope = Rope(
        theta=500000.0, dim=64, scaling="llama3", factor=8, original_max_position=8192, high_freq_factor=4
    )
    plain = torch.tensor(truth(500000.0, 64))
    scaled = inverse_frequencies(rope, 1)
    waves = 2 * math.pi / plain
    short, long = waves < 8192 / 4, waves > 8192
    assert_close(scaled[short], plain[short])
    assert_close(scaled[long], plain[long] / 8)
    between = ~(short | long)
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_yarn_keeps_fast_pairs_interpolates_slow_ones_and_sharpens() -> None:
    rope = Rope(dim=64, scaling="yarn", factor=4, original_max_position=2048)
    plain = torch.tensor(truth(10000.0, 64))
    scaled = inverse_frequencies(rope, 1)
    turns = 2048 * plain / (2 * math.pi)
    assert_close(scaled[turns > 40], plain[turns > 40])
    assert_close(scaled[turns < 0.7], plain[turns < 0.7] / 4)
    assert attention_factor(rope) == pytest.approx(0.1 * math.log(4) + 1)
    assert_close(cos_sin_table(rope, 64, 1)[0, :32], torch.full((32,), attention_factor(rope)))


def test_yarns_factor_is_the_files_or_comes_from_its_two_scales() -> None:
    given = Rope(dim=8, scaling="yarn", factor=4, original_max_position=64, attention_factor=1.25)
    assert attention_factor(given) == 1.25
    scales = Rope(dim=8, scaling="yarn", factor=4, original_max_position=64, mscale=0.7, mscale_all_dim=1.1)
    assert attention_factor(scales) == pytest.approx((0.07 * math.log(4) + 1) / (0.11 * math.log(4) + 1))


def test_dynamic_takes_one_base_from_the_session_length() -> None:
    rope = Rope(dim=12, scaling="dynamic", factor=2, original_max_position=100)
    assert_close(inverse_frequencies(rope, 100), torch.tensor(truth(10000.0, 12)))
    assert_close(inverse_frequencies(rope, 7), inverse_frequencies(rope, 100))
    base = 10000.0 * (2 * 250 / 100 - 1) ** (12 / 10)
    assert_close(inverse_frequencies(rope, 250), torch.tensor(truth(base, 12)))


def test_the_files_own_factors_divide() -> None:
    factors = tuple(random.uniform(1, 30) for _ in range(5))
    scaled = inverse_frequencies(Rope(dim=10, freq_factors=factors), 1)
    assert_close(scaled * torch.tensor(factors), torch.tensor(truth(10000.0, 10)))


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        (Rope(dim=10, freq_factors=(1.0, 2.0)), "rope_freqs.weight"),
        (Rope(dim=8), "partial rotation"),
    ],
)
def test_what_does_not_fit_the_heads_is_refused(rope: Rope, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        cos_sin_table(rope, 10, 4)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ModelError, match="head_dim"):
        cos_sin_table(Rope(dim=7), 7, 4)
