// Paged attention where the tiles of AMX multiply a bfloat16 cache (attention_tiles.h). Its rows depend on as little as those of
// the other levels, from which it differs by rounding queries and weights to bfloat16.
#pragma once

#include "attention_plan.h"
#include "shoal_cpu.h"

void paged_attention_amx(const AttentionArgs& a, const AttentionSpan* spans, int64_t count,
                         const AttentionScratch& scratch, bool merges);
