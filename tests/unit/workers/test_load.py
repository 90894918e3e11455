import random

import pytest
import torch
from decoding import load_whole, random_checkpoint
from msgspec.structs import replace
from torch.testing import assert_close

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.errors import ModelError
from shoal.workers import load
from shoal.workers.layers import Linear, Parameters
from shoal.workers.load import load_parameters
from shoal.workers.parallel import split
from shoal.workers.weights.places import HostPlace

DIM = 6
TINY = ModelDescription(
    family="llama",
    vocab_size=131,
    hidden_size=42,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=DIM,
    ffn_size=70,
    max_position=64,
    norm_eps=1e-5,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
    rope=Rope(dim=DIM),
    layer_windows=(0, 0),
    attention_scale=0.4,
)
SEED = random.randrange(1 << 30)


def only(linear: Linear) -> PackedWeight:
    """The weight of a matrix that is not of integers."""
    (part,) = linear.parts
    assert isinstance(part, PackedWeight)
    return part


def test_qkv_and_gate_up_are_fused_and_norms_offset() -> None:
    source = random_checkpoint(TINY, SEED)
    parameters = load_whole(source, replace(TINY, norm_weight_offset=1.0))
    layer, tensors = parameters.layers[1], source.tensors
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert_close(only(layer.attention.qkv).unpack(), torch.cat([tensors[f"{name}.weight"] for name in names]))
    assert layer.attention.qkv.bias is not None
    assert_close(layer.attention.qkv.bias, torch.cat([tensors[f"{name}.bias"] for name in names]))
    gate_up = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert_close(only(layer.ffn.gate_up).unpack(), torch.cat(gate_up))
    assert_close(layer.ffn.norm, tensors["model.layers.1.post_attention_layernorm.weight"] + 1)
    assert_close(parameters.head.unpack(), tensors["lm_head.weight"])
    assert numbers_held(parameters) == sum(tensor.numel() for tensor in tensors.values())


def numbers_held(parameters: Parameters) -> int:
    """Without the padding of packed matrices."""
    matrices = sum(weight.rows * weight.columns for weight in parameters.weights())
    return matrices + sum(vector.numel() for vector in parameters.vectors())


def test_bytes_are_those_in_memory() -> None:
    description = replace(TINY, tied_head=True)
    parameters = load_whole(random_checkpoint(description, SEED), description)
    storages = [tensor.untyped_storage() for tensor in parameters.tensors()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert parameters.nbytes == sum(storage.nbytes() for storage in storages)
    assert 4 * numbers_held(parameters) < parameters.nbytes < 4.4 * numbers_held(parameters)


def test_a_tied_head_is_the_embedding_and_a_stored_copy_of_it_is_not_read() -> None:
    source = random_checkpoint(TINY, SEED)
    parameters = load_whole(source, replace(TINY, tied_head=True))
    assert parameters.head is parameters.embedding
    assert source.numbers_read == sum(t.numel() for n, t in source.tensors.items() if n != "lm_head.weight")


@pytest.mark.parametrize("tp", [2, 3, 5])
def test_ranks_read_each_number_of_the_matrices_once_and_hold_their_share(tp: int) -> None:
    source = random_checkpoint(TINY, SEED)
    whole = numbers_held(load_whole(source, TINY))
    for rank in range(tp):
        part = random_checkpoint(TINY, SEED)
        parameters = load_whole(part, TINY, tp, rank)
        assert part.numbers_read == numbers_held(parameters)
        if tp <= TINY.num_kv_heads:
            assert numbers_held(parameters) < whole / tp * 1.1
        assert (parameters.layers[0].ffn.down.bias is not None) == (rank == 0)
        assert (parameters.layers[0].attention.output.bias is not None) == (rank == 0)


def test_rows_of_gguf_llama_are_reordered_from_pairs_to_halves() -> None:
    biased = replace(TINY, ffn_bias=False, output_bias=False)
    plain = random_checkpoint(biased, SEED)
    file = random_checkpoint(biased, SEED, gguf=True)
    for name, heads in (("q", 9), ("k", 3)):
        for kind in ("weight", "bias"):
            tensor = plain.tensors[f"model.layers.0.self_attn.{name}_proj.{kind}"]
            rows = [
                head * DIM + half * (DIM // 2) + pair
                for head in range(heads)
                for pair in range(DIM // 2)
                for half in (0, 1)
            ]
            file.tensors[f"blk.0.attn_{name}.{kind}"] = tensor[rows]
    for kind in ("weight", "bias"):
        file.tensors[f"blk.0.attn_v.{kind}"] = plain.tensors[f"model.layers.0.self_attn.v_proj.{kind}"]
    for rank in (0, 1):
        expected = load_whole(plain, biased, 2, rank).layers[0].attention.qkv
        found = load_whole(file, biased, 2, rank).layers[0].attention.qkv
        assert_close(only(found).unpack(), only(expected).unpack(), rtol=0, atol=0)
        assert_close(found.bias, expected.bias, rtol=0, atol=0)


@pytest.mark.parametrize("tp", [1, 2, 5])
def test_internlm2s_matrix_is_taken_apart_by_kv_head(tp: int) -> None:
    description = replace(TINY, family="internlm2", ffn_bias=False)
    source = random_checkpoint(description, SEED)
    grouped = source.tensors["model.layers.1.attention.wqkv.weight"].view(3, 5, DIM, 42)
    for rank in range(tp):
        shard = split(description, tp, rank)
        heads = [grouped[head // 3, head % 3] for head in shard.q_heads]
        heads += [grouped[head, 3] for head in shard.kv_heads] + [grouped[head, 4] for head in shard.kv_heads]
        found = only(load_whole(source, description, tp, rank).layers[1].attention.qkv).unpack()
        assert_close(found, torch.cat(heads), rtol=0, atol=0)


def test_tensors_are_read_in_pieces_and_progress_ends_at_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_PIECE_BYTES", 4 * 42 * 20)
    source = random_checkpoint(TINY, SEED)
    told: list[tuple[int, int]] = []
    shard = split(TINY, 2, 1)
    parameters = load_parameters(
        source, TINY, shard, HostPlace(torch.bfloat16), lambda done, total: told.append((done, total))
    )
    expected = source.tensors["model.embed_tokens.weight"][shard.vocab.start : shard.vocab.stop]
    assert_close(parameters.embedding.unpack(), expected.bfloat16(), rtol=0, atol=0)
    assert parameters.dtype == torch.bfloat16
    assert parameters.final_norm.dtype == torch.float32
    assert told == sorted(told)
    assert told[-1] == (len(source.tensors), len(source.tensors))


def test_a_missing_tensor_is_named() -> None:
    source = random_checkpoint(TINY, SEED)
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_whole(source, TINY)


def test_a_tensor_of_another_shape_is_named_with_both_shapes() -> None:
    source = random_checkpoint(TINY, SEED)
    source.tensors["model.norm.weight"] = torch.zeros(41)
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[41\] .* \[42\]"):
        load_whole(source, TINY)


def test_a_tensor_that_would_be_ignored_is_named() -> None:
    source = random_checkpoint(TINY, SEED)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_whole(source, replace(TINY, qkv_bias=False))
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    assert load_whole(source, TINY).dtype == torch.float32


def test_a_checkpoint_of_another_family_is_refused() -> None:
    with pytest.raises(ModelError, match="no checkpoint of a internlm2 model"):
        load_whole(random_checkpoint(TINY, SEED), replace(TINY, family="internlm2"))


@pytest.mark.parametrize("root", ["model.language_model.", "language_model.model."])
def test_the_language_half_of_a_model_that_sees_is_found(root: str) -> None:
    description = replace(
        TINY, family="gemma3", qkv_bias=False, output_bias=False, ffn_bias=False, tied_head=True
    )
    source = random_checkpoint(description, SEED)
    expected = load_whole(source, description)
    source.tensors = {name.replace("model.", root, 1): tensor for name, tensor in source.tensors.items()}
    source.tensors["vision_tower.encoder.weight"] = torch.zeros(3)
    found = load_whole(source, description)
    found_weight, expected_weight = (only(p.layers[1].ffn.down).unpack() for p in (found, expected))
    assert_close(found_weight, expected_weight, rtol=0, atol=0)
