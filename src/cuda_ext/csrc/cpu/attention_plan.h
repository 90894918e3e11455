// What the launcher of paged attention hands to the kernel: a piece of work and the memory to do it in.
#pragma once

#include <cstdint>

constexpr int kTile = 64;           // positions
constexpr int64_t kSpanRows = 48;   // tokens × query heads of one work item, at most, where one token has fewer
constexpr int64_t kWidestVec = 16;  // floats

struct AttentionSpan {
    int64_t sequence, kv_head, first_token, tokens;
};

struct AttentionScratch {
    int64_t* positions;  // [rows]
    float* q;            // [rows, dim]
    float* columns;      // [dim, kTile]: keys
    float* scores;       // [rows, kTile]
    float* sums;         // [rows, dim rounded up]
    float* peak;         // [rows]
    float* total;        // [rows]
    float* values;       // [kTile, dim rounded up]
    const float** value_rows;  // [kTile]
};
