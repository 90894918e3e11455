"""Drives a decoder as the scheduler would: sequences with scattered blocks, chunks, shared prefixes, mixed steps.

Also ``random_checkpoint``, a description's tensors, all random, in a source that the loader reads like a file, and
``load_file_or_folder``, which goes the way of a rank.
"""

import dataclasses
import random
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from shoal.checkpoint import describe, locate_model
from shoal.checkpoint.description import ModelDescription, Rope
from shoal.config import Quantization
from shoal.cuda_ext.fp8 import Fp8Rows
from shoal.cuda_ext.quantised import QuantisedGroups
from shoal.workers.architectures import choose_layout, expected_shapes
from shoal.workers.decoder import Decoder
from shoal.workers.inputs import StepInputs
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import HostWeight, Parameters
from shoal.workers.load import load_parameters
from shoal.workers.parallel import Group, SoloGroup, split
from shoal.workers.weights.places import HostPlace
from shoal.workers.weights.source import open_source

SMALL_LLAMA = ModelDescription(
    family="llama",
    vocab_size=149,
    hidden_size=44,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_size=77,
    max_position=64,
    norm_eps=1e-5,
    rope=Rope(dim=6),
    layer_windows=(0, 0),
    attention_scale=0.4,
)
"""Odd sizes."""


def rich(plain: ModelDescription) -> ModelDescription:
    """The same with all that Gemma adds; head_dim and the number of layers, 3, stay."""
    return replace(
        plain,
        family="gemma3",
        num_kv_heads=1,
        activation="gelu_tanh",
        post_norms=True,
        local_rope=Rope(dim=plain.head_dim, theta=300.0),
        layer_windows=(7, 0, 11),
        embedding_scale=6.6,
        attention_soft_cap=20.0,
        logit_soft_cap=5.0,
        tied_head=True,
    )


def biased(plain: ModelDescription) -> ModelDescription:
    """The same with every bias that there is."""
    return replace(plain, family="internlm3", qk_norm=False, qkv_bias=True, output_bias=True, ffn_bias=True)


@dataclass
class Sequence:
    """Token ids, how many of them are computed, and the blocks they live in."""

    ids: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Driver:
    """A decoder with a small cache whose blocks are handed out in random order."""

    def __init__(
        self,
        description: ModelDescription,
        parameters: Parameters[HostWeight],
        session_len: int,
        group: Group | None = None,
        tp: int = 1,
        rank: int = 0,
        num_blocks: int = 64,
        block_size: int = 4,
    ) -> None:
        shard = split(description, tp, rank)
        cache = KVCache(description, shard, parameters.dtype, num_blocks, block_size)
        self._decoder = Decoder(description, shard, parameters, cache, group or SoloGroup(), session_len)
        self._free = random.Random(num_blocks).sample(range(num_blocks), num_blocks)
        self._block_size = block_size

    def step(self, rows: Ordered[tuple[Sequence, int]]) -> Tensor | None:
        """Computes ``count`` more tokens of each sequence; logits of all of them on rank 0."""
        inputs = self._begin(rows)
        self._decoder.compute(inputs)
        logits = self._decoder.logits(inputs.sample_indices)
        return None if logits is None else torch.from_numpy(logits.copy())

    def states(self, rows: Ordered[tuple[Sequence, int]], wanted: Ordered[int] | None = None) -> Tensor:
        """The same, but their hidden states, of the last ``wanted`` tokens of each row."""
        inputs = self._begin(rows)
        if wanted is not None:
            pairs = zip(inputs.query_starts[1:].tolist(), wanted, strict=True)
            tokens = [token for end, count in pairs for token in range(end - count, end)]
            starts = np.cumsum([0, *wanted], dtype=np.int32)
            inputs = dataclasses.replace(inputs, state_starts=starts, state_tokens=np.array(tokens, np.int64))
        self._decoder.compute(inputs)
        return torch.from_numpy(self._decoder.hidden.copy())

    def logits(self, rows: Ordered[tuple[Sequence, int]]) -> Tensor:
        logits = self.step(rows)
        assert logits is not None
        return logits

    def share(self, owner: Sequence, ids: list[int]) -> Sequence:
        """A sequence that begins with the owner's full blocks as far as the ids agree, computed already."""
        agreed = 0
        while agreed < min(owner.computed, len(ids) - 1) and owner.ids[agreed] == ids[agreed]:
            agreed += 1
        shared = agreed // self._block_size
        return Sequence(ids, shared * self._block_size, owner.blocks[:shared])

    def _begin(self, rows: Ordered[tuple[Sequence, int]]) -> StepInputs:
        """The step's inputs, with blocks for its tokens; they count as computed from now on."""
        for sequence, count in rows:
            while len(sequence.blocks) * self._block_size < sequence.computed + count:
                sequence.blocks.append(self._free.pop())
        inputs = self._inputs(rows)
        for sequence, count in rows:
            sequence.computed += count
        return inputs

    def _inputs(self, rows: Ordered[tuple[Sequence, int]]) -> StepInputs:
        size = self._block_size
        places = [
            (sequence, position)
            for sequence, count in rows
            for position in range(sequence.computed, sequence.computed + count)
        ]
        widest = max((len(sequence.blocks) for sequence, _ in rows), default=0)
        tables = [sequence.blocks + [0] * (widest - len(sequence.blocks)) for sequence, _ in rows]
        starts = np.cumsum([0] + [count for _, count in rows], dtype=np.int32)
        return StepInputs(
            token_ids=np.array([s.ids[position] for s, position in places], np.int64),
            positions=np.array([position for _, position in places], np.int32),
            cache_slots=np.array([s.blocks[p // size] * size + p % size for s, p in places], np.int64),
            query_starts=starts,
            context_lens=np.array([s.computed + count for s, count in rows], np.int32),
            block_tables=np.array(tables, np.int32).reshape(len(rows), widest),
            state_starts=starts,
            state_tokens=np.arange(len(places)),
            sample_indices=np.arange(len(places)),
        )


class MemorySource:
    """Tensors by name, in memory; counts how many numbers were read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.numbers_read = 0

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def nbytes(self, name: str) -> int:
        return self.tensors[name].nbytes

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def format_of(self, name: str, columns: slice | None = None) -> None:
        """Floats."""

    def read_fp8(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Fp8Rows:
        raise NotImplementedError

    def cache_scale(self, attention: str, which: str, kv_heads: int) -> None:
        pass

    def read_groups(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> QuantisedGroups:
        raise AssertionError(name)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        part = self.tensors[name][rows or slice(None)]
        if columns is not None:
            part = part[:, columns]
        self.numbers_read += part.numel()
        return part.clone()


def random_checkpoint(description: ModelDescription, seed: int, *, gguf: bool = False) -> MemorySource:
    generator = torch.Generator().manual_seed(seed)
    embeddings = ("token_embd",) if gguf else ("model.embed_tokens", "model.tok_embeddings")
    names = frozenset(f"{name}.weight" for name in embeddings)
    shapes = expected_shapes(description, choose_layout(description.family, names))
    tensors = {}
    for name, shape in shapes.items():
        centre = 1.0 if "norm" in name else 0.0
        spread = 0.3 if len(shape) == 1 else shape[1] ** -0.5
        tensors[name] = centre + spread * torch.randn(shape, generator=generator)
    return MemorySource(tensors)


def load_whole(
    source: MemorySource,
    description: ModelDescription,
    tp: int = 1,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = "auto",
) -> Parameters[HostWeight]:
    shard = split(description, tp, rank)
    return load_parameters(source, description, shard, HostPlace(dtype), lambda done, total: None, quantization)


def load_file_or_folder(
    path: Path, quantization: Quantization = "none"
) -> tuple[ModelDescription, Parameters[HostWeight]]:
    """As floats, unless told otherwise: what references compute with."""
    location = locate_model(str(path))
    description = describe(location)
    shard = split(description, 1, 0)
    parameters = load_parameters(
        open_source(location),
        description,
        shard,
        HostPlace(torch.float32),
        lambda done, total: None,
        quantization,
    )
    return description, parameters
