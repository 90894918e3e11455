// Compiled for AVX-512, VNNI and AVX-512's bfloat16 where the compiler knows them; else there is nothing in it.
#include "paged_attention_bf16.h"

#if defined(__AVX512BF16__)
#include "paged_attention.h"

void paged_attention_bf16(const AttentionArgs& a, const AttentionSpan* spans, int64_t count,
                          const AttentionScratch& scratch, bool merges) {
    paged_attention(a, spans, count, scratch, merges);
}

bool narrow_dots_are_usable() { return __builtin_cpu_supports("avx512bf16"); }

#else

void paged_attention_bf16(const AttentionArgs&, const AttentionSpan*, int64_t, const AttentionScratch&, bool) {}

bool narrow_dots_are_usable() { return false; }

#endif
