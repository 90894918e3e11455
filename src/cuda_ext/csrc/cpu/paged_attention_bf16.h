// Paged attention where AVX-512's dot products multiply a bfloat16 cache (attention_dots.h). Its rows depend on as little as
// those of the other levels, from which it differs by rounding queries and weights to bfloat16.
#pragma once

#include "attention_plan.h"
#include "shoal_cpu.h"

void paged_attention_bf16(const AttentionArgs& a, const AttentionSpan* spans, int64_t count,
                          const AttentionScratch& scratch, bool merges);

// Whether this was compiled, and this processor has them.
bool narrow_dots_are_usable();
