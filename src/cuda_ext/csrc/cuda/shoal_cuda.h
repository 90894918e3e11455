// The C interface of the CUDA library: what cuda_binding.py mirrors as ctypes structures, field by field.
//
// Every operator takes one pointer to a struct of device pointers, sizes and strides (in elements) and a stream, starts
// its kernels on that stream and returns a Status without waiting. The structs themselves are host memory. Sizes are
// 64 bits wide. "Rows" of a matrix may be strided, their elements are contiguous. ``dtype`` is that of activations:
// bfloat16 or half precision. The residual, norm weights, biases and rope tables are float32.
//
// What only a kernel can see to be out of range it leaves out, and writes a Status to ``fault``, which the caller
// zeroes and reads when it likes.
#pragma once

#include <cstdint>

#define EXPORT __attribute__((visibility("default")))

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kFloat16 = 3, kFloat8 = 4 };
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };
enum Status : int {
    kOk = 0,
    kPositionOutside = 1,
    kSlotOutside = 2,
    kBlockOutside = 3,
    kNoMemory = 4,
    kContextTooShort = 5,
    kPeerLost = 6,
    kNotSupported = 7,
    kLaunchFailed = 8,
};

// x: [outer, inner, dim] of x_dtype (also float32) → out: contiguous
struct RmsNormArgs {
    void* out;
    const void* x;
    const float* weight;
    int64_t outer, inner, dim, outer_stride, inner_stride, x_dtype, dtype;
    double eps;
    void* stream;
};

// residual: float32 [rows, dim] += x; out: [rows, dim], contiguous: the normalised residual
struct AddRmsNormArgs {
    void* out;
    float* residual;
    const void* x;
    const float* weight;
    int64_t rows, dim, residual_stride, x_stride, dtype;
    double eps;
    void* stream;
};

// caches: [blocks, kv_heads, block_size, dim], contiguous; k_scales, v_scales: float32 [kv_heads], what an fp8 cache's
// elements are multiplied with when they are read, or null where they are as they are
struct RopeWriteKvArgs {
    void* q;
    const void* k;
    const void* v;
    const float* cos_sin;
    const int32_t* positions;
    void* k_cache;
    void* v_cache;
    const int64_t* cache_slots;
    int32_t* fault;
    const float* k_scales;
    const float* v_scales;
    int64_t tokens, heads, kv_heads, dim, rotary_dim, max_positions, blocks, block_size;
    int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    int64_t dtype, cache_dtype;
    void* stream;
};

// gate_up: [rows, 2 * dim], gates first → out: [rows, dim], contiguous
struct GatedActivationArgs {
    void* out;
    const void* gate_up;
    int64_t rows, dim, row_stride, kind, dtype;
    void* stream;
};

// table: bfloat16 or half precision [rows, dim], or panels of pack_quantised where bits is not 0; out: float32 [tokens,
// dim], contiguous
struct EmbedArgs {
    float* out;
    const int64_t* ids;
    const void* table;
    int64_t tokens, rows, dim, first_id, dtype, bits, group, has_offset;
    double scale;
    void* stream;
};

// x: [rows, inputs] of dtype; weight: [outputs, inputs] of weight_dtype: dtype, or fp8 without NaN; scales: float32
// [outputs], what each output's sum of fp8 weights is multiplied with, or null; out: [rows, outputs] of out_dtype (also float32), rows
// out_stride apart; bias: float32 [outputs] or null. is_deterministic: a row gets the same bits in any batch, whatever the
// chip's tensor cores do: neither wgmma nor cuBLAS is taken
struct LinearArgs {
    void* out;
    const void* x;
    const void* weight;
    const float* scales;
    const float* bias;
    int64_t rows, inputs, outputs, row_stride, weight_stride, out_stride, dtype, weight_dtype, out_dtype;
    int64_t is_deterministic;
    void* stream;
};

// As LinearArgs; panels: of pack_quantised
struct QuantisedLinearArgs {
    void* out;
    const void* x;
    const void* panels;
    const float* bias;
    int64_t rows, inputs, outputs, row_stride, out_stride, bits, group, has_offset, dtype, out_dtype;
    int64_t is_deterministic;
    void* stream;
};

// codes: [rows, groups, group]; scales and offsets: half precision [rows, groups], offsets or null → panels as quantised.h
// lays them out: tiles of 16 rows × 64 columns, both rounded up
struct PackQuantisedArgs {
    void* panels;
    const uint8_t* codes;
    const void* scales;
    const void* offsets;
    int64_t rows, groups, bits, group;
    void* stream;
};

// out: [rows, columns] of dtype, contiguous: for a library's product of many rows
struct DequantiseArgs {
    void* out;
    const void* panels;
    int64_t rows, columns, bits, group, has_offset, dtype;
    void* stream;
};

// q: [tokens, heads, dim] → out: as q, contiguous. Products are of the cache's type, bfloat16 for an fp8 cache. caches: as
// in RopeWriteKvArgs, a row's bytes a multiple of 16; dim: at most 256.
// query_starts: [sequences + 1]; context_lens: with the new tokens. most_tokens and most_context: no sequence has more
// new tokens or a longer context. workspace: float32, at least sequences · heads · (most_context / 256, rounded up) ·
// (dim + 2) of them. window: positions that a token sees, itself included, or 0. is_deterministic: as in LinearArgs.
struct AttentionArgs {
    void* out;
    const void* q;
    const void* k_cache;
    const void* v_cache;
    const int32_t* block_tables;
    const int32_t* query_starts;
    const int32_t* context_lens;
    float* workspace;
    int32_t* fault;
    const float* k_scales;
    const float* v_scales;
    int64_t tokens, sequences, heads, kv_heads, dim, blocks, block_size, table_width, table_stride;
    int64_t q_token_stride, q_head_stride, window, most_tokens, most_context, workspace_floats;
    int64_t dtype, cache_dtype, is_deterministic;
    double scale, soft_cap;
    void* stream;
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
    void* stream;
};

// token_ids: [tokens]; where sources[token] is not below 0 the token is drawn[sources[token]] (0 where that is below 0).
// drawn: [rows], of the step before
struct FeedTokensArgs {
    int64_t* token_ids;
    const int64_t* drawn;
    const int32_t* sources;
    int64_t tokens, rows;
    void* stream;
};

// x: [x_rows], rows of row_bytes, contiguous; out: [count], the given ones; rows outside of x are left out
struct TakeRowsArgs {
    void* out;
    const void* x;
    const int64_t* rows;
    int64_t count, x_rows, row_bytes;
    void* stream;
};

// logits: [rows, vocabulary], become cap * tanh(logits / cap)
struct CapLogitsArgs {
    float* logits;
    int64_t rows, vocabulary, row_stride;
    double cap;
    void* stream;
};

// logits: [rows, vocabulary]. Row r adds biases[i] to its bias_ids[i], i from bias_starts[r] to bias_starts[r + 1]; then
// its seen_ids, likewise, are penalised, seen_counts being how often each was generated. No id twice in a row's part.
struct AdjustLogitsArgs {
    float* logits;
    const int32_t* bias_starts;
    const int32_t* bias_ids;
    const float* biases;
    const int32_t* seen_starts;
    const int32_t* seen_ids;
    const float* seen_counts;
    const float* repetition;  // [rows]
    const float* presence;    // [rows]
    const float* frequency;   // [rows]
    int64_t rows, vocabulary, row_stride;
    void* stream;
};

// logits: [rows, vocabulary], become -inf where the row's mask has the id's bit, the lowest of a byte first; NaN and +inf
// stay. mask_of: [rows], a row of masks or -1; masks: mask_bytes each
struct MaskLogitsArgs {
    float* logits;
    const int32_t* mask_of;
    const uint8_t* masks;
    int64_t rows, vocabulary, row_stride, mask_bytes;
    void* stream;
};

// Of the rows of logits ([logits_rows, vocabulary]) that ``rows`` ([count]) names, those outside left out. totals: [count],
// the logarithm of the sum of exponentials. top_ids, top_values: [count, width], the best ids, as many as tops ([count])
// says and no more than width, and their logits, best first, the lower id first among equals; -1 where no logit above -inf
// is left.
struct ScoreLogitsArgs {
    double* totals;
    int32_t* top_ids;
    float* top_values;
    const float* logits;
    const int64_t* rows;
    const int32_t* tops;
    int64_t count, logits_rows, vocabulary, row_stride, width;
    void* stream;
};

// values: [count], of those rows the logit of the row's id; ids: [logits_rows], those outside left out.
struct PickLogitsArgs {
    float* values;
    const float* logits;
    const int64_t* rows;
    const int64_t* ids;
    int64_t count, logits_rows, vocabulary, row_stride;
    void* stream;
};

// x: [count] of dtype (also float32), becomes the sum of every rank's, rank 0's first. regions: host memory, one pointer
// a rank to device memory that every rank may read and write, zeroed before the first call: kRegionHeader bytes, then
// two slots of slot_bytes; more elements than a slot has go in parts. Every rank calls with the same count and steps,
// through the same regions with one dtype. steps: 1 or 2, with the same result, or 0: what should take less time. stop:
// memory that the host may write and the device reads, or null: where it is not 0, nobody waits any longer and fault
// tells of kPeerLost.
struct AllReduceArgs {
    void* x;
    void* const* regions;
    const int32_t* stop;
    int32_t* fault;
    int64_t count, rank, ranks, slot_bytes, dtype, steps;
    void* stream;
};

// x: [rows, the rank's width] of four-byte words, rows x_stride apart, and out: [rows, the sum of widths], rows out_stride
// apart, or null where the rank does not want it. widths: host memory, one a rank. regions, stop and fault: as in
// AllReduceArgs, regions of their own, slots for the rows of the widest rank. Every rank calls with the same rows and
// widths.
struct GatherColumnsArgs {
    void* out;
    const void* x;
    const int64_t* widths;
    void* const* regions;
    const int32_t* stop;
    int32_t* fault;
    int64_t rows, x_stride, out_stride, rank, ranks, slot_bytes;
    void* stream;
};

constexpr int64_t kMostRanks = 8;
constexpr int64_t kRegionHeader = 4096;
