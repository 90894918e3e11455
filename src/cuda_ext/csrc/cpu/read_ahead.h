// Keys and values that the next paged_attention of a program reads, asked of the memory by the products before it: those of
// many rows compute and leave the memory idle, attention of single tokens waits for it. They pass the second-level cache
// and are then in the third.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "shoal_cpu.h"

constexpr int64_t kLeastRowsToReadAhead = 9;  // of a product: with fewer it reads its weights as fast as it can
constexpr int64_t kProductsAnAsk = 6 * 32 * 64;   // about, of codes: of a tile of rows, two panels and kGroupsAnAsk groups

// A thread's part of what is to be asked for: pieces of the key cache, and what lies as far into the value cache.
struct alignas(64) AskAhead {
    uintptr_t keys, values_apart, at, end;  // at, end: of the keys' piece that is being asked for
    const int64_t *next, *last;             // where the other pieces begin
    int64_t piece, lines;                   // bytes of one, and lines of keys to ask for at once: 0 where nothing is left

    inline __attribute__((always_inline)) void ask() {
        for (int64_t i = 0; i < lines; i++, at += 64) {
            if (at == end) {
                if (next == last) {
                    lines = 0;
                    return;
                }
                at = keys + uintptr_t(*next++);
                end = at + uintptr_t(piece);
            }
            __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
            __builtin_prefetch(reinterpret_cast<const void*>(at + values_apart), 0, 2);
        }
    }
};

// Sees to it while a program runs; on levels that keep the cache in pairs.
class ReadAhead {
  public:
    ReadAhead(const Call* calls, int64_t count) : calls_(calls), count_(count) {}
    ~ReadAhead();
    // Is called before each call.
    void before(int64_t index) {
        if (index > attention_) look_for_attention(index);
    }
    // For a thread's products of so many rows; null where there is nothing to ask for.
    static AskAhead* of(int64_t rows, int thread);

  private:
    void look_for_attention(int64_t index);
    void start(const AttentionArgs& a, int64_t asks);

    const Call* calls_;
    const int64_t count_;
    int64_t attention_ = -1;  // the next call of paged_attention
    const AttentionArgs* listed_ = nullptr;
};
