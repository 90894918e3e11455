// Products by cuBLAS, which torch's CUDA build brings along: of large 16-bit matrices there is nothing faster.
// In what order it adds up is its own affair and differs by the number of rows, so nobody asks it who is to be
// deterministic.
#pragma once

#include "launch.h"

// out = x · weightᵀ + bias, as LinearArgs has them, of one 16-bit type; bias is rounded to out's type first.
struct LibraryProduct {
    void* out;
    const void* x;
    const void* weight;
    const float* bias;
    int64_t rows, inputs, outputs, row_stride, weight_stride, out_stride, dtype, out_dtype;
    void* stream;
};

// Of LinearArgs or QuantisedLinearArgs, but for the weight.
template <typename Args>
LibraryProduct product_of(const Args& a) {
    return {a.out,        a.x, nullptr,      a.bias,  a.rows,      a.inputs, a.outputs,
            a.row_stride, 0,   a.out_stride, a.dtype, a.out_dtype, a.stream};
}

// Whether it was found, for the current device. The first call may not be under capture.
bool has_product_library();

int multiply_by_library(const LibraryProduct& a);

// Memory of the current device for a part of a matrix that is made 16-bit floats for a product; null where there is no
// more. Work on one stream may use it, piece after piece. The first call may not be under capture.
void* product_scratch();

#if defined(__CUDACC__)
constexpr int64_t kScratchBytes = 64 << 20;  // so many outputs that a product of them fills the chip
#else
constexpr int64_t kScratchBytes = 48 << 10;
#endif

// How many outputs a piece has at most: whole panels of 16.
inline int64_t most_of_piece(int64_t inputs) { return kScratchBytes / (2 * inputs) / 16 * 16; }

// Of narrow weights, for more rows than are multiplied with them as they are: ``make(first, count, to)`` puts outputs
// [first, first + count) on the stream as 16-bit floats, one piece after the other.
template <typename Make>
int multiply_by_pieces(LibraryProduct a, const Make& make) {
    const int64_t outputs = a.outputs, out_bytes = a.out_dtype == kFloat32 ? 4 : 2, most = most_of_piece(a.inputs);
    const int64_t pieces = (outputs + most - 1) / most, outputs_of_piece = (outputs + 16 * pieces - 1) / (16 * pieces) * 16;
    auto* const out = static_cast<unsigned char*>(a.out);
    const float* const bias = a.bias;
    a.weight_stride = a.inputs;
    for (int64_t first = 0; first < outputs; first += outputs_of_piece) {
        a.outputs = outputs - first < outputs_of_piece ? outputs - first : outputs_of_piece;
        a.weight = product_scratch();
        a.out = out + first * out_bytes;
        a.bias = bias ? bias + first : nullptr;
        if (const int status = make(first, a.outputs, product_scratch())) return status;
        if (const int status = multiply_by_library(a)) return status;
    }
    return kOk;
}

// Whether narrow weights are multiplied by pieces: where as many rows are to pay for it that each weight is written and
// read once more.
inline bool takes_pieces(int64_t rows, int64_t inputs, int64_t is_deterministic) {
    constexpr int64_t kManyRows = 64;
    return rows > kManyRows && !is_deterministic && most_of_piece(inputs) > 0 && has_product_library() &&
           product_scratch();
}
