"""Steps that are started before the one before is read, on the device: the same results as one at a time."""

import random
from typing import Any

import pytest
import torch
from decoding import random_checkpoint
from on_chip import need_emulation, open_device

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.messages import Sampling, Seat, StepPlan, StepResult
from shoal.wire import pack_ids, unpack_ids
from shoal.workers.cuda_decoder import CudaBuffers, CudaDecoder
from shoal.workers.cuda_group import SoloDeviceGroup
from shoal.workers.cuda_inputs import StepLimits
from shoal.workers.cuda_runner import CudaRunner
from shoal.workers.cuda_sampler import CudaSampler
from shoal.workers.kv_cache import KVCache
from shoal.workers.load import load_parameters
from shoal.workers.parallel import split
from shoal.workers.slots import SlotTable
from shoal.workers.weights.places import DevicePlace

MODEL = ModelDescription(
    family="llama",
    vocab_size=211,
    hidden_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=64,
    max_position=64,
    norm_eps=1e-5,
    rope=Rope(dim=16),
    layer_windows=(0, 0),
    attention_scale=0.25,
)
SEATS, BLOCK, BLOCKS, CONTEXT = 5, 8, 40, 48


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return open_device()


@pytest.fixture(scope="module")
def make_runner(device: CudaDevice) -> Any:
    shard = split(MODEL, 1, 0)
    place = DevicePlace(device, torch.bfloat16)
    parameters = load_parameters(random_checkpoint(MODEL, 5), MODEL, shard, place, lambda *_: None)
    buffers = CudaBuffers(device, MODEL, shard, torch.bfloat16, StepLimits(64, SEATS, CONTEXT, BLOCK))
    sampler = CudaSampler(device, buffers.logits, buffers.results.device["ids"])

    group = SoloDeviceGroup()

    def make() -> CudaRunner:
        cache = KVCache(MODEL, shard, torch.bfloat16, BLOCKS, BLOCK, device)
        slots = SlotTable(SEATS, CONTEXT, BLOCKS, BLOCK, MODEL.vocab_size, sampling=True)
        return CudaRunner(
            CudaDecoder(MODEL, shard, parameters, cache, group, buffers), sampler, slots, device, group, 1
        )

    return make


def random_plans(seed: int) -> list[StepPlan]:
    """A conversation of a scheduler's that never waits: seats come and go at any step, prompts come in chunks, a seat's
    last token may be one that nobody has read."""
    rng, plans = random.Random(seed), []
    held: dict[int, list[int]] = {}  # slot → [known, computed, blocks]
    free, epoch, seated = list(range(BLOCKS)), 0, {}
    for step_id in range(1, 31):
        leave = [slot for slot, (known, _, _) in held.items() if rng.random() < 0.1 or known >= CONTEXT - 1]
        for slot in leave:
            free += seated.pop(slot)
            del held[slot]
        admit = []
        empty = [slot for slot in range(SEATS) if slot not in held]
        for slot in [slot for slot in empty if rng.random() < 0.5] or empty[: not held]:
            epoch += 1
            prompt = [rng.randrange(MODEL.vocab_size) for _ in range(rng.randrange(1, 20))]
            sampling = Sampling(
                seed=rng.getrandbits(60),
                temperature=rng.choice([0.0, 1.0]),
                frequency_penalty=rng.choice([0.0, 0.5]),
                logprobs=rng.choice([-1, 2]),
                bad_words=rng.choice([(), ((7,), (8, 9))]),
            )
            scored = rng.choice([-1, -1, 1])
            admit.append(Seat(slot, epoch, pack_ids(prompt), b"", sampling, prompt_logprobs=scored))
            held[slot], seated[slot] = [len(prompt), 0, 0], []
        rows = []
        for slot, seat in held.items():
            known, computed, blocks = seat
            if rows and rng.random() < 0.1:
                continue
            count = known - computed if known - computed == 1 else rng.randrange(1, known - computed + 1)
            needed = -(-(computed + count) // BLOCK) - blocks
            taken = [free.pop() for _ in range(needed)]
            seated[slot] += taken
            samples = computed + count == known
            rows.append((slot, computed, count, samples, taken))
            held[slot] = [known + samples, computed + count, blocks + needed]
        slots, starts, counts, samples_, blocks_ = zip(*rows, strict=True)
        plans.append(
            StepPlan(
                crew_epoch=1,
                step_id=step_id,
                leave=pack_ids(leave),
                admit=tuple(admit),
                slots=pack_ids(slots),
                starts=pack_ids(starts),
                counts=pack_ids(counts),
                samples=bytes(samples_),
                block_counts=pack_ids(map(len, blocks_)),
                new_blocks=pack_ids(block for part in blocks_ for block in part),
            )
        )
    return plans


def told(result: StepResult) -> tuple[Any, ...]:
    """All but the time."""
    return (result.step_id, result.slots, result.epochs, result.ids, result.logprobs, result.scored)


def test_one_step_ahead_gives_what_one_at_a_time_gives(make_runner: Any) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)  # noqa: T201
    plans = random_plans(seed)
    alone, ahead = make_runner(), make_runner()
    expected = [told(alone.execute(plan)) for plan in plans]
    found = [ahead.start(plan) for plan in plans]
    assert found[0] is None
    found = [*found[1:], ahead.finish()]
    assert [told(result) for result in found] == expected
    assert ahead.finish() is None
    ids = [token for result in found for token in unpack_ids(result.ids)]
    assert len(ids) > 20
    assert min(ids) >= 0


def test_nothing_runs_before_it_is_waited_for(make_runner: Any) -> None:
    """And then it is done without being told to."""
    need_emulation()
    runner = make_runner()
    prompt = Seat(0, 1, pack_ids([1, 2, 3]), b"", Sampling(seed=0, temperature=0.0))
    first = StepPlan(
        1, 1, b"", (prompt,), pack_ids([0]), pack_ids([0]), pack_ids([3]), b"\1", pack_ids([1]), pack_ids([4])
    )
    assert not runner.is_waiting
    assert runner.start(first) is None
    assert runner.is_waiting
    asked = 0
    while not runner.is_done():
        asked += 1
    assert asked > 20
    result = runner.finish()
    assert result is not None
    assert len(unpack_ids(result.ids)) == 1
    assert not runner.is_waiting


def test_graphs_that_are_captured_ahead_change_nothing(make_runner: Any) -> None:
    """Between steps too: what is under way, they leave alone."""
    plans = random_plans(random.randrange(1 << 30))
    plain, ahead = make_runner(), make_runner()
    expected = [told(plain.execute(plan)) for plan in plans]
    found, left = [], True
    for plan in plans:
        found.append(told(ahead.execute(plan)))
        left = left and ahead.use_idle_time()
    assert found == expected
    assert not left
    graphs = {rows for rows, _ in ahead._decoder._graphs}
    assert graphs == {1, 2, 4, SEATS}
    busy = make_runner()
    assert busy.start(plans[0]) is None
    assert not busy.use_idle_time()
