#include "read_ahead.h"

#include "arena.h"
#include "level.h"
#include "library.h"

extern "C" int shoal_linear_quantised(const QuantisedLinearArgs* args);
extern "C" int shoal_paged_attention(const AttentionArgs* args);

namespace {

constexpr int64_t kMostBytes = 12 << 20;  // of keys and values: the third-level cache has more, but not for these alone
constexpr int64_t kMostLines = 8;         // of keys, at once: where it takes more, products would wait as attention does

struct Pieces {
    const int64_t *begin, *end;  // where each begins in the key cache, in bytes
};

AskAhead asks_of[kMostThreads];
Pieces pieces_of_thread[kMostThreads];
Arena memory;

template <typename Args>
const Args* args_of(const Call& call, int (*function)(const Args*)) {
    return call.function == reinterpret_cast<int (*)(const void*)>(function) ? static_cast<const Args*>(call.args) : nullptr;
}

bool see_the_same(const AttentionArgs& a, const AttentionArgs& b) {
    return a.block_tables == b.block_tables && a.query_starts == b.query_starts && a.window == b.window &&
           a.sequences == b.sequences && a.kv_heads == b.kv_heads && a.dim == b.dim;
}

int64_t piece_bytes(const AttentionArgs& a) { return kPairedPositions * a.dim * int64_t(sizeof(uint16_t)); }

// Where the pieces begin that a sequence sees. What is out of range is for attention to refuse.
int64_t* list_sequence(const AttentionArgs& a, int64_t sequence, int64_t* to, const int64_t* to_end) {
    const int64_t tokens = a.query_starts[sequence + 1] - a.query_starts[sequence], room = a.table_width * a.block_size;
    const int64_t end = a.context_lens[sequence] < room ? a.context_lens[sequence] : room, first = end - tokens + 1 - a.window;
    const int32_t* table = a.block_tables + sequence * a.table_stride;
    int64_t at = a.window > 0 && first > 0 ? first / kPairedPositions * kPairedPositions : 0;
    for (; at < end && to < to_end; at += kPairedPositions)
        for (int64_t head = 0; head < a.kv_heads && to < to_end; head++) {
            const int64_t row = (table[at / a.block_size] * a.kv_heads + head) * a.block_size + at % a.block_size;
            *to++ = row * a.dim * int64_t(sizeof(uint16_t));
        }
    return to;
}

// Each thread asks for the sequences that it is the first to attend to, as paged_attention hands them out: the third-level
// cache may be another thread's.
void list_pieces(const AttentionArgs& a) {
    const int threads = thread_count();
    const int64_t most = kMostBytes / (2 * piece_bytes(a) * threads);
    auto* to = reinterpret_cast<int64_t*>(memory.reserve(threads * most * int64_t(sizeof(int64_t))));
    for (int thread = 0; thread < threads; thread++) {
        const int64_t* const begin = to;
        for (int64_t i = cut(a.sequences, thread, threads); to && i < cut(a.sequences, thread + 1, threads); i++)
            to = list_sequence(a, i, to, begin + most);
        pieces_of_thread[thread] = {begin, to};
    }
}

}  // namespace

ReadAhead::~ReadAhead() {
    for (int thread = 0; thread < thread_count(); thread++) asks_of[thread].lines = 0;
}

AskAhead* ReadAhead::of(int64_t rows, int thread) {
    return rows >= kLeastRowsToReadAhead && asks_of[thread].lines ? &asks_of[thread] : nullptr;
}

void ReadAhead::look_for_attention(int64_t index) {
    int64_t asks = 0;
    for (attention_ = index; attention_ < count_; attention_++) {
        if (const auto* a = args_of(calls_[attention_], shoal_paged_attention)) return start(*a, asks);
        const auto* product = args_of(calls_[attention_], shoal_linear_quantised);
        if (product && product->rows >= kLeastRowsToReadAhead)
            asks += product->rows * product->inputs * product->outputs / kProductsAnAsk;
    }
}

void ReadAhead::start(const AttentionArgs& a, int64_t asks) {
    if (a.cache_dtype != kBFloat16Pairs || asks == 0) return;
    if (!listed_ || !see_the_same(a, *listed_)) list_pieces(a);
    listed_ = &a;
    const int threads = thread_count();
    for (int thread = 0; thread < threads; thread++) {
        AskAhead& ask = asks_of[thread];
        const Pieces& mine = pieces_of_thread[thread];
        ask.keys = reinterpret_cast<uintptr_t>(a.k_cache);
        ask.values_apart = reinterpret_cast<uintptr_t>(a.v_cache) - ask.keys;
        ask.at = ask.end = 0;
        ask.next = mine.begin;
        ask.last = mine.end;
        ask.piece = piece_bytes(a);
        const int64_t lines = (mine.end - mine.begin) * ask.piece / 64, at_once = lines * threads / asks + 1;
        ask.lines = at_once > kMostLines ? 0 : at_once;
    }
}
