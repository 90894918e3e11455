// Where the keys and values lie that some spans of paged attention see, in the order in which they are read, and asking the
// memory for them some time before. Included by paged_attention.h.
#pragma once

#include "attention_plan.h"
#include "shoal_cpu.h"
#include "vec.h"

namespace {

constexpr int64_t kLine = 64;            // bytes of a cache line
constexpr int64_t kPositionsAhead = 64;  // of one KV head

// Of the time that a position takes: in 8 parts, what passes with its key, with the weights and with its value.
constexpr int64_t kKeysShare = 3, kWeightsShare = 3, kValuesShare = 2, kShares = 8;

template <typename Cache>
struct TileRows {
    static constexpr int64_t kStep = 1;  // positions that are asked for at once
    const Cache* keys[kTile];
    const Cache* values[kTile];
    int64_t first, last;  // the positions that are seen; the other entries repeat the first one

    INLINE void ask_for(int64_t position, int64_t dim) const {
        ask_for_row(keys[position], dim);
        ask_for_row(values[position], dim);
    }

    static INLINE void ask_for_row(const Cache* row, int64_t count) {
        for (int64_t i = 0; i < count; i += kLine / int64_t(sizeof(Cache))) __builtin_prefetch(row + i, 0, 2);
    }
};

template <>
struct TileRows<Paired> {
    static constexpr int64_t kStep = kPairedPositions;
    const bf16* keys[kTile / kStep] = {};  // where each 16 positions begin, of which some are seen
    const bf16* values[kTile / kStep] = {};
    int64_t first, last;  // the positions that are seen

    INLINE void ask_for(int64_t position, int64_t dim) const {
        TileRows<bf16>::ask_for_row(keys[position / kStep], kStep * dim);
        TileRows<bf16>::ask_for_row(values[position / kStep], kStep * dim);
    }
};

// The positions that a span sees: in tiles that begin at first_base() to last_base().
struct SpanView {
    const AttentionArgs& a;
    const AttentionSpan& span;
    int64_t first_position = a.context_lens[span.sequence] - a.query_starts[span.sequence + 1] + span.first_token;

    INLINE int64_t last_position() const { return first_position + span.tokens - 1; }

    INLINE int64_t seen_from(int64_t position) const {
        return a.window > 0 ? max_of(0, position - a.window + 1) : 0;
    }

    INLINE int64_t first_base() const {
        return max_of(seen_from(first_position) / kTile * kTile, span.first_section * kSection);
    }

    INLINE int64_t last_base() const {
        return min_of(last_position() / kTile * kTile, span.last_section * kSection - kTile);
    }

    // Of a tile.
    INLINE int64_t first_of(int64_t base) const { return max_of(0, seen_from(first_position) - base); }
    INLINE int64_t last_of(int64_t base) const { return min_of(kTile, last_position() + 1 - base); }

    void find_rows(int64_t base, TileRows<Paired>& tile) const {
        constexpr int64_t step = kPairedPositions;
        const int32_t* table = a.block_tables + span.sequence * a.table_stride;
        tile.first = first_of(base);
        tile.last = last_of(base);
        for (int64_t i = tile.first / step; i * step < tile.last; i++) {
            const int64_t position = base + i * step, block = table[position / a.block_size];
            const int64_t place = ((block * a.kv_heads + span.kv_head) * a.block_size + position % a.block_size) * a.dim;
            tile.keys[i] = static_cast<const bf16*>(a.k_cache) + place;
            tile.values[i] = static_cast<const bf16*>(a.v_cache) + place;
        }
    }

    template <typename Cache>
    void find_rows(int64_t base, TileRows<Cache>& tile) const {
        const int64_t first = first_of(base), last = last_of(base);
        const int32_t* table = a.block_tables + span.sequence * a.table_stride;
        const int64_t row = cache_row<Cache>(a.dim);
        int64_t index = (base + first) / a.block_size, offset = (base + first) % a.block_size;
        for (int64_t j = first; j < last; index++, offset = 0) {
            const int64_t end = min_of(last, j + a.block_size - offset);
            int64_t place = ((int64_t(table[index]) * a.kv_heads + span.kv_head) * a.block_size + offset) * row;
            for (; j < end; j++, place += row) {
                tile.keys[j] = static_cast<const Cache*>(a.k_cache) + place;
                tile.values[j] = static_cast<const Cache*>(a.v_cache) + place;
            }
        }
        const auto repeat = [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; j++) {
                tile.keys[j] = tile.keys[first];
                tile.values[j] = tile.values[first];
            }
        };
        repeat(0, first);
        repeat(last, kTile);
        tile.first = first;
        tile.last = last;
    }
};

// The tiles of some spans, one after the other. Blocks lie anywhere, so the processor does not foresee them.
template <typename Cache>
class TilesAhead {
  public:
    TilesAhead(const AttentionArgs& a, const AttentionSpan* spans, int64_t count) : a_(a), next_(spans), end_(spans + count) {
        start_span();
        if (find()) go_on(0);
    }

    // The next tile, which is the first one at first.
    INLINE const TileRows<Cache>& take() {
        if (taken_ == found_) find();
        const TileRows<Cache>& tile = tiles_[taken_++ % kHeld];
        due_ += owed_;
        owed_ = (tile.last - tile.first) * kShares;
        return tile;
    }

    // A part of a position was computed: asks the memory for as much.
    INLINE void go_on(int64_t shares) {
        due_ += shares;
        owed_ -= shares;
        while (due_ >= kStep * kShares && ask_for_step()) due_ -= kStep * kShares;
    }

  private:
    static constexpr uint64_t kHeld = 4;
    static constexpr int64_t kStep = TileRows<Cache>::kStep;

    INLINE bool ask_for_step() {
        if (position_ >= tiles_[(found_ - 1) % kHeld].last && (found_ - taken_ == kHeld - 1 || !find())) return false;
        tiles_[(found_ - 1) % kHeld].ask_for(position_, a_.dim);
        position_ += kStep;
        return true;
    }

    bool find() {
        if (base_ > last_base_) return false;
        TileRows<Cache>& tile = tiles_[found_++ % kHeld];
        SpanView{a_, *next_}.find_rows(base_, tile);
        position_ = tile.first / kStep * kStep;
        base_ += kTile;
        if (base_ > last_base_) {
            next_++;
            start_span();
        }
        return true;
    }

    // Spans without positions are passed over.
    void start_span() {
        for (; next_ < end_; next_++) {
            const SpanView view{a_, *next_};
            base_ = view.first_base();
            last_base_ = view.last_base();
            if (base_ <= last_base_) return;
        }
        base_ = 1;
        last_base_ = 0;
    }

    const AttentionArgs& a_;
    const AttentionSpan *next_, *end_;
    int64_t base_, last_base_;
    int64_t due_ = kPositionsAhead * kShares;
    int64_t owed_ = 0;      // what of the tile in use go_on was not yet called for
    int64_t position_ = 0;  // of the tile that was found last
    uint64_t found_ = 0, taken_ = 0;
    TileRows<Cache> tiles_[kHeld];
};

}  // namespace
