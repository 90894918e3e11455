// Compiled for AVX-512, VNNI and AMX where the compiler knows them; else there is nothing in it.
#include "paged_attention_amx.h"

#if defined(__AMX_BF16__)
#include "paged_attention.h"

void paged_attention_amx(const AttentionArgs& a, const AttentionSpan* spans, int64_t count,
                         const AttentionScratch& scratch, bool merges) {
    paged_attention(a, spans, count, scratch, merges);
}

#else

void paged_attention_amx(const AttentionArgs&, const AttentionSpan*, int64_t, const AttentionScratch&, bool) {}

#endif
