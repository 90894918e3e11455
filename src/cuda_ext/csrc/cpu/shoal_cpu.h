// The C interface of the CPU library: what binding.py mirrors as ctypes structures, field by field.
//
// Every operator takes one pointer to a struct of pointers, sizes and strides (in elements), and returns a
// Status. Sizes are 64 bits wide. "Rows" of a matrix may be strided, their elements are contiguous. Activations
// are float32; dtype is that of weights or of the cache.
#pragma once

#include <cstdint>

#define EXPORT __attribute__((visibility("default")))

// kBFloat16Pairs: a cache's only, where shoal_pairs_positions says so. Of a KV head each 16 positions of a block lie together: keys
// as pairs of elements, [dim / 2, 16, 2], values as pairs of positions, [8, dim, 2].
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kBFloat16Pairs = 3 };
constexpr int64_t kPairedPositions = 16;
constexpr int64_t kMostDim = 1024;  // of a head
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };
enum Status : int {
    kOk = 0,
    kPositionOutside = 1,
    kSlotOutside = 2,
    kBlockOutside = 3,
    kNoMemory = 4,
    kContextTooShort = 5,
    kPeerLost = 6,
    kOtherLayout = 7,
};

// x: [outer, inner, dim] → out: contiguous, or quantised rows of dim, or both; the other is null
struct RmsNormArgs {
    float* out;
    void* quantised;
    const float* x;
    const float* weight;
    int64_t outer, inner, dim, outer_stride, inner_stride;
    double eps;
};

// residual: [rows, dim] += x; out = normalised residual, as in RmsNormArgs
struct AddRmsNormArgs {
    float* out;
    void* quantised;
    float* residual;
    const float* x;
    const float* weight;
    int64_t rows, dim, residual_stride, x_stride;
    double eps;
};

// caches: [blocks, kv_heads, block_size, dim], contiguous; of int8, each row of dim codes is followed by
// its scales, a float for each 32
struct RopeWriteKvArgs {
    float* q;
    const float* k;
    const float* v;
    const float* cos_sin;
    const int32_t* positions;
    void* k_cache;
    void* v_cache;
    const int64_t* cache_slots;
    int64_t tokens, heads, kv_heads, dim, rotary_dim, max_positions, blocks, block_size;
    int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    int64_t cache_dtype;
};

// out: [tokens, heads, dim], contiguous
struct AttentionArgs {
    float* out;
    const float* q;
    const void* k_cache;
    const void* v_cache;
    const int32_t* block_tables;
    const int32_t* query_starts;
    const int32_t* context_lens;
    int64_t tokens, sequences, heads, kv_heads, dim, blocks, block_size, table_width, table_stride;
    int64_t q_token_stride, q_head_stride, window, cache_dtype;
    double scale, soft_cap;
};

// gate_up: [rows, 2 * dim] → out: [rows, dim], as in RmsNormArgs
struct GatedActivationArgs {
    float* out;
    void* quantised;
    const float* gate_up;
    int64_t rows, dim, row_stride, kind;
};

// The panels of a weight: for each 16 outputs, for each word of inputs, one word an output. A word is a float or
// two bfloat16. weight: whole words, of which the last may be padded; its first row is a panel's first.
struct PackWeightArgs {
    float* panels;
    const float* weight;
    int64_t rows, words, row_stride;
};

// out: [rows, outputs], rows out_stride apart; bias: [outputs] or null. Where bits is not 0 the panels are those of
// pack_quantised: levels with tiles take them here, the others in linear_quantised
struct LinearArgs {
    float* out;
    const float* x;
    const void* panels;
    const float* bias;
    int64_t rows, inputs, outputs, row_stride, out_stride, dtype, bits, group, has_offset;
};

// x: [rows, inputs] → quantised: rows as quantised.h lays them out
struct QuantiseArgs {
    void* quantised;
    const float* x;
    int64_t rows, inputs, row_stride;
};

// x: rows of quantise, or with tiles those of gated_linear; panels: of pack_quantised; out: [rows, outputs], rows out_stride
// apart; bias: [outputs] or null
struct QuantisedLinearArgs {
    float* out;
    void* x;
    const void* panels;
    const float* bias;
    int64_t rows, inputs, outputs, out_stride, bits, group, has_offset;
};

// gate, up: panels of pack_quantised of ``outputs`` outputs each, a multiple of 32; biases: [outputs] or null; out: rows in
// bfloat16 as tiles of AMX take them, for linear_quantised. Levels with tiles alone have it.
struct GatedLinearArgs {
    void* out;
    const float* x;
    const void* gate;
    const void* up;
    const float* gate_bias;
    const float* up_bias;
    int64_t rows, inputs, outputs, row_stride, kind, bits, group, has_offset;
};

// codes: [rows, groups, group]; scales and offsets: half precision [rows, groups], offsets or null
struct PackQuantisedArgs {
    void* panels;
    const uint8_t* codes;
    const uint16_t* scales;
    const uint16_t* offsets;
    int64_t rows, groups, bits, group;
};

// panels: of linear, or of linear_quantised where bits is not 0; out: [tokens, dim], contiguous
struct EmbedArgs {
    float* out;
    const int64_t* ids;
    const void* panels;
    int64_t tokens, rows, dim, first_id, dtype, bits, group, has_offset;
    double scale;
};

// x: rows of row_bytes, row_stride bytes apart → out: x[rows[0]] … x[rows[count - 1]], contiguous; those outside of x are
// left out
struct TakeRowsArgs {
    void* out;
    const void* x;
    const int64_t* rows;
    int64_t count, x_rows, row_bytes, row_stride;
};

constexpr int64_t kMostRanks = 64;

// A rank among those that share a region.
struct RegionMember {
    int64_t rank, ranks, chunk;  // chunk: floats that a rank puts into the region at once
    int64_t exits[kMostRanks];   // pidfds of the ranks' processes, or -1
};

// x: [rows, columns], contiguous; becomes the sum of every rank's. member: a RegionMember
struct AllReduceArgs {
    float* x;
    void* region;
    const void* member;
    int64_t rows, columns;
};

// x: [rows, the rank's width], contiguous → out: [rows, sum of widths], contiguous, or null where a rank needs it not.
// widths: one a rank; member: a RegionMember
struct GatherColumnsArgs {
    float* out;
    const float* x;
    const int64_t* widths;
    void* region;
    const void* member;
    int64_t rows;
};

// One operator's function and its struct; shoal_run runs many.
struct Call {
    int (*function)(const void* args);
    const void* args;
};

// logits: [rows, vocabulary]; the other inputs and ids: [rows]. ids: -1 where logits hold NaN, +inf or only -inf.
struct DrawArgs {
    int64_t* ids;
    const float* logits;
    const float* temperature;  // 0: the best token
    const int64_t* top_k;      // 0: off
    const float* top_p;        // 1: off
    const float* min_p;        // 0: off
    const double* uniform;     // in [0, 1)
    int64_t rows, vocabulary, row_stride;
};
