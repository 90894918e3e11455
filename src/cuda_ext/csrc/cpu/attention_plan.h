// What the launcher of paged attention hands to the kernel: a piece of work and the memory to do it in.
#pragma once

#include <cstdint>

constexpr int kTile = 64;           // positions
constexpr int64_t kSpanRows = 144;  // tokens × query heads of one work item, at most, where one token has fewer
constexpr int64_t kWidestVec = 16;  // floats

constexpr int64_t kSection = 256;   // positions that are summed up by themselves: whole tiles

struct AttentionSpan {
    int64_t sequence, kv_head, first_token, tokens;
    int64_t first_section, last_section;
    float* parts;  // where each section's sums go when sections are items of their own, else null
};

// Rows are whole tiles of 16.
struct AttentionScratch {
    int32_t* positions;  // [rows]
    float* q;            // [rows, dim]
    float* columns;      // [dim, kTile]: keys
    float* scores;       // [rows, kTile]
    float* sums;         // [rows, dim rounded up]
    uint16_t* queries;   // [rows, dim] and
    uint16_t* weights;   // [16, kTile], in bfloat16 as tiles take them (attention_tiles.h)
    float* peak;         // [rows]
    float* total;        // [rows]
    float* lanes;        // [rows, kWidestVec]: a total's, before they are added up
    float* values;       // [kTile, dim rounded up]
    const float** value_rows;  // [kTile]
    float* whole_sums;   // as sums, peak and total: of the sections before
    float* whole_peak;
    float* whole_total;
};
