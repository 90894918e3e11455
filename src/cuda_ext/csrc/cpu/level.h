// The kernels of one level. library.cpp picks one table for the processor and cuts the work into ranges.
#pragma once

#include "attention_plan.h"
#include "draw_plan.h"
#include "linear_plan.h"
#include "shoal_cpu.h"

struct Level {
    // Each computes items [begin, end): rows or tokens.
    void (*rms_norm)(const RmsNormArgs&, int64_t begin, int64_t end);
    void (*add_rms_norm)(const AddRmsNormArgs&, int64_t begin, int64_t end);
    void (*rope_write_kv)(const RopeWriteKvArgs&, int64_t begin, int64_t end);
    void (*gated_activation)(const GatedActivationArgs&, int64_t begin, int64_t end);
    void (*embed)(const EmbedArgs&, int64_t begin, int64_t end);
    void (*embed_for_tiles)(const EmbedArgs&, int64_t begin, int64_t end);  // the same where integers lie for tiles
    void (*pack_weight)(const PackWeightArgs&, int64_t begin, int64_t end);  // panels
    void (*lay_tiles)(const LinearArgs&, const LinearTiles&, float* to, int64_t begin, int64_t end);
    void (*linear)(const LinearArgs&, const LinearTiles&, const LinearSpan&);
    // All of linear with bfloat16 and with integer weights, of linear_quantised with narrow rows and of gated_linear, on tiles;
    // they return a status. Or null
    int (*linear_bf16)(const LinearArgs&);
    int (*linear_integers)(const LinearArgs&);
    int (*linear_narrow)(const QuantisedLinearArgs&);
    int (*gated_linear)(const GatedLinearArgs&);
    // Before linear_quantised for rows [first, last): the columns with outliers, tile by tile, and where each tile's begin.
    void (*find_outliers)(const QuantisedLinearArgs&, int64_t first, int64_t last, OutlierColumn* to,
                          const OutlierColumn** begins);
    void (*linear_quantised)(const QuantisedLinearArgs&, const QuantisedSpan&);
    void (*quantise)(const QuantiseArgs&, int64_t begin, int64_t end);
    int64_t linear_rows;  // at most in a tile
    bool attends_pairs;   // whether paged_attention takes kBFloat16Pairs
    // Some spans, one after the other. merges: puts their kept sections together
    void (*paged_attention)(const AttentionArgs&, const AttentionSpan*, int64_t count, const AttentionScratch&,
                            bool merges);
    Peak (*find_peak)(const float* logits, int64_t count);
    void (*weigh_logits)(const float* logits, int64_t count, float peak, float temperature, float* weights,
                         double* sums);
    int64_t (*collect)(const float* weights, int64_t count, float threshold, Candidate* into);
};

extern const Level kScalar;
#if defined(__x86_64__)
extern const Level kAvx2, kAvx512, kAvx512Vnni;
#endif
