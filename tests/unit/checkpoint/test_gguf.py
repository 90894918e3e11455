"""The GGUF reader: right files read right, wrong ones refused by name, and nothing else ever happens."""

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from unit.checkpoint.gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    UINT64,
    Gguf,
    Tensor,
    array,
    packed,
    random_tensor,
    text,
)

from shoal.checkpoint.gguf import GgufFile, GgufType
from shoal.checkpoint.gguf_metadata import describe_gguf
from shoal.errors import ModelError


def written(folder: Path, file: Gguf) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(file.build())
    return path


def small(**changes: object) -> Gguf:
    tensors = [Tensor("a", GgufType.F32, (3, 5), bytes(60)), Tensor("b", GgufType.Q8_0, (2, 64), bytes(136))]
    file = Gguf([("general.name", STRING, "x"), ("n", UINT32, 7)], tensors)
    for name, value in changes.items():
        setattr(file, name, value)
    return file


def test_reads_what_the_reference_writer_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    words = [f"wört{number}" for number in range(1000)] + ["", "\N{GRINNING FACE}"]
    scores = rng.standard_normal(777).astype(np.float32)
    matrix = rng.standard_normal((7, 33)).astype(np.float32)
    half = rng.standard_normal(9).astype(np.float16)
    blocks = rng.integers(0, 256, (5, 3 * 34), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("words", words)
    writer.add_array("scores", scores.tolist())
    writer.add_array("flags", [True, False, True])
    writer.add_array("ids", [-3, 4])
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "line\nline")
    writer.add_tensor("matrix", matrix)
    writer.add_tensor("half", half)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GgufFile(tmp_path / "m.gguf") as file:
        metadata = file.metadata
        assert metadata["general.architecture"] == "llama"
        assert metadata["words"] == words
        assert np.array_equal(metadata["scores"], scores)
        assert metadata["flags"].tolist() == [True, False, True]
        assert metadata["ids"].tolist() == [-3, 4]
        plain = ["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64", "yes", "text"]
        extremes = [
            255,
            -128,
            65535,
            -32768,
            2**32 - 1,
            -(2**31),
            2**64 - 1,
            -(2**63),
            0.5,
            0.1,
            True,
            "line\nline",
        ]
        assert [metadata[name] for name in plain] == extremes
        assert metadata["yes"] is True
        assert set(file.tensors) == {"matrix", "half", "blocks"}
        assert file.tensors["matrix"].shape == (7, 33)
        assert file.tensors["half"].shape == (9,)
        assert file.tensors["blocks"].shape == (5, 96)
        assert file.tensors["blocks"].nbytes == blocks.size
        assert np.array_equal(file.raw("matrix", 2, 3).view(np.float32), matrix[2:5])
        assert np.array_equal(file.raw("half", 0, 1).view(np.float16)[0], half)
        assert np.array_equal(file.raw("blocks", 4, 1), blocks[4:])
        assert file.raw("blocks", 5, 0).shape == (0, 102)


def test_other_alignment_and_version(tmp_path: Path) -> None:
    data = np.random.default_rng().bytes(60)
    file = small(alignment=256, version=2)
    file.metadata.append(("general.alignment", UINT32, 256))
    file.tensors[0].data = data
    read = GgufFile(written(tmp_path, file))
    assert read.version == 2
    assert read.tensors["a"].offset % 256 == 0
    assert read.raw("a", 0, 3).tobytes() == data


def test_nested_arrays(tmp_path: Path) -> None:
    inner = [array(INT32, [packed(INT32, number)]) for number in (1, 2)]
    read = GgufFile(written(tmp_path, Gguf([("deep", ARRAY, array(ARRAY, inner))])))
    assert [item.tolist() for item in read.metadata["deep"]] == [[1], [2]]


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    words = [text(f"token{number}") for number in range(262144)]
    path = written(tmp_path, Gguf([("tokenizer.ggml.tokens", ARRAY, array(STRING, words))]))
    start = time.perf_counter()
    tokens = GgufFile(path).metadata["tokenizer.ggml.tokens"]
    assert time.perf_counter() - start < 1.0
    assert len(tokens) == 262144
    assert tokens[262143] == "token262143"


def deep_array(depth: int) -> bytes:
    return array(INT32, []) if depth == 0 else array(ARRAY, [deep_array(depth - 1)])


BAD_FILES = {
    "magic": (small(magic=b"GGML"), "does not start with GGUF"),
    "version 1": (small(version=1), "version 1"),
    "version 4": (small(version=4), "version 4"),
    "big-endian": (small(version=3 << 24), "big-endian"),
    "tensor count": (small(tensor_count=2**63), "tensor count"),
    "key count": (small(key_count=2**62), "metadata count"),
    "one key too many": (small(key_count=3), "tensor"),
    "duplicate key": (Gguf([("k", UINT32, 1), ("k", UINT32, 2)]), "'k' appears twice"),
    "value type": (Gguf([("k", 13, b"")]), "unknown type 13"),
    "string length": (Gguf([("k", STRING, b"\xff" * 7 + b"\x7f")]), "'k' claims"),
    "string past the end": (Gguf([("k", STRING, (40).to_bytes(8, "little"))]), "'k' runs past the end"),
    "key not UTF-8": (Gguf([(b"\xff\xfe", UINT32, 1)]), "metadata key is not UTF-8"),
    "value not UTF-8": (Gguf([("k", STRING, text(b"\xc3"))]), "'k' is not UTF-8"),
    "list not UTF-8": (Gguf([("k", ARRAY, array(STRING, [text("a"), text(b"\xe2\x82")]))]), "number 1"),
    "list of numbers too long": (Gguf([("k", ARRAY, array(FLOAT32, [], 2**61))]), "'k' runs past the end"),
    "list of strings too long": (Gguf([("k", ARRAY, array(STRING, [], 2**61))]), "'k' claims"),
    "list of strings cut": (
        Gguf([("k", ARRAY, array(STRING, [text("abcdefgh")] * 3, 5))], alignment=1),
        "'k' runs past",
    ),
    "string in list past the end": (
        Gguf([("k", ARRAY, array(STRING, [(2**63).to_bytes(8, "little")] * 2))]),
        "'k' has a string that runs past the end",
    ),
    "list of unknown type": (Gguf([("k", ARRAY, array(99, [bytes(16)]))]), "unknown type 99"),
    "lists too deep": (Gguf([("k", ARRAY, deep_array(9))]), "lists in lists"),
    "alignment 0": (Gguf([("general.alignment", UINT32, 0)]), "general.alignment"),
    "alignment 24": (Gguf([("general.alignment", UINT32, 24)]), "power of two"),
    "alignment text": (Gguf([("general.alignment", STRING, "32")]), "general.alignment"),
    "alignment huge": (Gguf([("general.alignment", UINT64, 2**60)]), "general.alignment"),
    "split": (Gguf([("split.count", UINT32, 3)]), "split.count"),
    "duplicate tensor": (
        Gguf([], [Tensor("t", GgufType.F32, (8,), bytes(32)), Tensor("t", GgufType.F32, (8,), bytes(32))]),
        "'t' appears twice",
    ),
    "tensor name not UTF-8": (Gguf([], [Tensor("\udcff", 0, (8,), b"")]), "tensor name is not UTF-8"),
    "no dimensions": (Gguf([], [Tensor("t", 0, (), bytes(4))]), "0 dimensions"),
    "five dimensions": (Gguf([], [Tensor("t", 0, (1, 1, 1, 1, 1), bytes(4))]), "5 dimensions"),
    "dimension 0": (Gguf([], [Tensor("t", 0, (4, 0), b"")]), "impossible shape"),
    "dimensions that overflow": (Gguf([], [Tensor("t", 0, (2**32, 2**32), b"")]), "impossible shape"),
    "beyond the file": (Gguf([], [Tensor("t", 0, (1000, 1000), bytes(64))]), "'t' runs past the end"),
    "offset beyond the file": (Gguf([], [Tensor("t", 0, (8,), bytes(32), 2**40)]), "'t' runs past the end"),
    "offset misaligned": (Gguf([], [Tensor("t", 0, (8,), bytes(64), 4)]), "not a multiple of 32"),
    "overlap": (
        Gguf([], [Tensor("t", 0, (16,), bytes(64)), Tensor("u", 0, (8,), bytes(32), 32)]),
        "'u' overlaps",
    ),
    "type known elsewhere": (Gguf([], [Tensor("t", 23, (256,), bytes(136))]), "IQ4_XS"),
    "type unknown": (Gguf([], [Tensor("t", 4, (32,), bytes(136))]), "type 4 (unknown)"),
    "row not in blocks": (Gguf([], [Tensor("t", GgufType.Q4_0, (2, 48), bytes(54))]), "Q4_0's 32"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_by_name(case: str, tmp_path: Path) -> None:
    file, expected = BAD_FILES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(surrogate_free(file))
    with pytest.raises(ModelError) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert str(path) in message
    assert expected in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def surrogate_free(file: Gguf) -> bytes:
    """A tensor name that is not UTF-8 is written as a lone surrogate above."""
    if any("\udcff" in tensor.name for tensor in file.tensors):
        file.tensors[0].name = "Q"
        return file.build().replace(text("Q"), text(b"\xff"))
    return file.build()


@pytest.mark.parametrize("size", [0, 3, 4, 23])
def test_a_stump_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small().build()[:size])
    with pytest.raises(ModelError, match="too few for a GGUF file"):
        GgufFile(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match="cannot be read"):
            GgufFile(path)


def test_a_file_that_shrinks_gives_an_error_not_a_signal(tmp_path: Path) -> None:
    path = written(tmp_path, small())
    file = GgufFile(path)
    with path.open("r+b") as shrunk:
        shrunk.truncate(file.tensors["b"].offset + 10)
    with pytest.raises(ModelError, match="'b' ends too early"):
        file.raw("b", 0, 2)


def whole_model(rng: np.random.Generator) -> bytes:
    """A file that describes a complete, tiny llama."""
    numbers = {
        "block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "context_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    metadata: list[tuple[str | bytes, int, object]] = [("general.architecture", STRING, "llama")]
    metadata += [(f"llama.{name}", UINT32, number) for name, number in numbers.items()]
    metadata += [
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("tokenizer.ggml.tokens", ARRAY, array(STRING, [text(f"t{number}") for number in range(48)])),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
        ("tokenizer.ggml.add_bos_token", BOOL, True),
    ]
    tensors = [random_tensor(rng, "token_embd.weight", GgufType.Q8_0, (48, 32))]
    tensors.append(Tensor("rope_freqs.weight", GgufType.F32, (4,), np.ones(4, np.float32).tobytes()))
    return Gguf(metadata, tensors).build()


def test_random_damage_gives_model_errors_only(tmp_path: Path) -> None:
    """Also in what the description makes of the damaged metadata."""
    seed = np.random.default_rng().integers(2**32)
    rng = np.random.default_rng(seed)
    whole = whole_model(rng)
    path = tmp_path / "model.gguf"
    messages: list[str] = []
    for _ in range(500):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole) - 1700, rng.integers(1, 4)):
            damaged[at] = rng.choice([rng.integers(256), 0xFF, 0, damaged[at] ^ (1 << rng.integers(8))])
        if rng.random() < 0.2:
            damaged = damaged[: rng.integers(len(whole))]
        path.write_bytes(damaged)
        try:
            with GgufFile(path) as file:
                describe_gguf(file)
                for tensor in file.tensors.values():
                    file.raw(tensor.name, 0, tensor.rows)
        except ModelError as error:
            messages.append(str(error))
    assert 50 < len(messages) < 500, f"seed {seed}"
    assert not any("\n" in message for message in messages), f"seed {seed}"
