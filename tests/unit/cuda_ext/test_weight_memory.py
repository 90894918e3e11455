"""Memory of weights: zeros, apart from each other, on cache lines, and gone with the last tensor."""

import gc
import mmap
import weakref

import torch

from shoal.cuda_ext import weight_memory
from shoal.cuda_ext.weight_memory import allocate


def test_pieces_are_zeros_on_cache_lines_and_do_not_overlap() -> None:
    shapes = [(513, 129), (3,), (70_001,), (128, 1024)]
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        pieces = [allocate(shape, dtype) for shape in shapes]
        for number, (shape, piece) in enumerate(zip(shapes, pieces, strict=True), 1):
            assert piece.shape == shape
            assert piece.dtype == dtype
            assert not piece.any()
            assert piece.data_ptr() % 64 == 0
            piece.fill_(number)
        for number, piece in enumerate(pieces, 1):
            assert (piece == number).all()


def test_one_larger_than_a_chunk_has_a_mapping_of_its_own() -> None:
    small, large = allocate((1 << 17,), torch.uint8), allocate((65 << 20,), torch.uint8)
    large[-1] = small[-1] = 7
    assert large[-1] == 7
    assert large[0] == 0
    assert large.data_ptr() % (2 << 20) == 0


def test_the_mapping_goes_with_its_last_tensor() -> None:
    piece = allocate((1 << 17,), torch.uint8)
    chunk = weight_memory._chunk
    assert chunk is not None
    mapping: weakref.ref[mmap.mmap] = chunk.mapping
    kept = [mapping() is not None]
    view = piece[5:10].view(5, 1)
    del piece
    kept.append(mapping() is not None)
    del view
    gc.collect()
    assert kept == [True, True]
    assert mapping() is None
