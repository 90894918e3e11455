// Launcher of paged attention: checks the sequences, lists the work items, runs them on threads.
#include "arena.h"
#include "level.h"
#include "library.h"
#include "parallel.h"
#include "tiles.h"

namespace {

int64_t span_tokens(const AttentionArgs& a) {
    const int64_t tokens = kSpanRows / (a.heads / a.kv_heads);
    return tokens > 1 ? tokens : 1;
}

// Of one span, in whole tiles.
int64_t span_rows(const AttentionArgs& a) {
    return (span_tokens(a) * (a.heads / a.kv_heads) + kTileRows - 1) / kTileRows * kTileRows;
}

int64_t tokens_of(const AttentionArgs& a, int64_t sequence) {
    return a.query_starts[sequence + 1] - a.query_starts[sequence];
}

int check_sequence(const AttentionArgs& a, int64_t sequence) {
    const int64_t tokens = tokens_of(a, sequence), context = a.context_lens[sequence];
    if (tokens < 0 || tokens > context || context > a.table_width * a.block_size) return kContextTooShort;
    const int64_t unseen = a.window > 0 ? context - tokens + 1 - a.window : 0;
    const int32_t* table = a.block_tables + sequence * a.table_stride;
    for (int64_t i = unseen > 0 ? unseen / a.block_size : 0; i * a.block_size < context; i++)
        if (table[i] < 0 || table[i] >= a.blocks) return kBlockOutside;
    return kOk;
}

struct Work {
    int64_t spans = 0;
    int64_t products = 0;  // queries × keys, one head
    int64_t sections = 0;  // of all spans
};

int64_t sections_of(const AttentionArgs& a, int64_t sequence) {
    return (a.context_lens[sequence] + kSection - 1) / kSection;
}

int measure(const AttentionArgs& a, Work& work) {
    const int64_t step = span_tokens(a);
    if (a.query_starts[0] != 0 || a.query_starts[a.sequences] != a.tokens) return kContextTooShort;
    for (int64_t sequence = 0; sequence < a.sequences; sequence++) {
        if (const int status = check_sequence(a, sequence)) return status;
        const int64_t tokens = tokens_of(a, sequence);
        work.spans += (tokens + step - 1) / step * a.kv_heads;
        work.products += tokens * a.context_lens[sequence];
        work.sections += sections_of(a, sequence) * ((tokens + step - 1) / step * a.kv_heads);
    }
    return kOk;
}

void list_spans(const AttentionArgs& a, AttentionSpan* next) {
    const int64_t step = span_tokens(a);
    for (int64_t sequence = 0; sequence < a.sequences; sequence++) {
        const int64_t end = a.query_starts[sequence + 1];
        for (int64_t token = a.query_starts[sequence]; token < end; token += step)
            for (int64_t head = 0; head < a.kv_heads; head++)
                *next++ = {sequence, head, token, token + step < end ? step : end - token, 0, INT64_MAX / kSection, nullptr};
    }
}

AttentionScratch carve(Carver& from, const AttentionArgs& a) {
    const int64_t rows = span_rows(a);
    const int64_t padded_dim = (a.dim + kWidestVec - 1) / kWidestVec * kWidestVec;
    AttentionScratch scratch;
    scratch.positions = from.take<int32_t>(rows);
    scratch.q = from.take<float>(rows * a.dim);
    scratch.columns = from.take<float>(kTile * padded_dim);
    scratch.scores = from.take<float>(rows * kTile);
    scratch.sums = from.take<float>(rows * padded_dim);
    scratch.queries = from.take<uint16_t>(rows * a.dim);
    scratch.weights = from.take<uint16_t>(kTileRows * kTile);
    scratch.peak = from.take<float>(rows);
    scratch.total = from.take<float>(rows);
    scratch.lanes = from.take<float>(rows * kWidestVec);
    scratch.values = from.take<float>(kTile * padded_dim);
    scratch.value_rows = from.take<const float*>(kTile);
    scratch.whole_sums = from.take<float>(rows * padded_dim);
    scratch.whole_peak = from.take<float>(rows);
    scratch.whole_total = from.take<float>(rows);
    return scratch;
}

constexpr int64_t kSpansAThread = 3;
constexpr int64_t kItemsAThread = 4;  // so that a thread that is held up has less to do

int attend_by_section(const AttentionArgs& a, const Work& work, int64_t scratch_bytes, char* memory) {
    static Arena span_memory, item_memory, part_memory;
    const int64_t padded_dim = (a.dim + kWidestVec - 1) / kWidestVec * kWidestVec;
    const int64_t part = span_rows(a) * (padded_dim + 2);  // floats, at most
    auto* spans = reinterpret_cast<AttentionSpan*>(span_memory.reserve(work.spans * int64_t(sizeof(AttentionSpan))));
    auto* items = reinterpret_cast<AttentionSpan*>(item_memory.reserve(work.sections * int64_t(sizeof(AttentionSpan))));
    auto* parts = reinterpret_cast<float*>(part_memory.reserve(work.sections * part * int64_t(sizeof(float))));
    if (!spans || !items || !parts) return kNoMemory;
    list_spans(a, spans);
    AttentionSpan* next = items;
    for (int64_t i = 0; i < work.spans; i++) {
        spans[i].parts = parts;
        const int64_t sections = sections_of(a, spans[i].sequence);
        parts += sections * part;
        for (int64_t section = 0; section < sections; section++) {
            *next = spans[i];
            next->first_section = section;
            next->last_section = section + 1;
            next++;
        }
    }
    const auto run = [&](const AttentionSpan* list, bool merges) {
        return [&a, list, memory, scratch_bytes, merges](int64_t item, int thread) {
            Carver mine(memory + thread * scratch_bytes);
            current_level().paged_attention(a, list + item, 1, carve(mine, a), merges);
        };
    };
    parallel_items(work.sections, true, run(items, false));
    parallel_items(work.spans, true, run(spans, true));
    return kOk;
}

}  // namespace

extern "C" EXPORT int shoal_paged_attention(const AttentionArgs* args) {
    static Arena span_memory, scratch_memory;
    const AttentionArgs& a = *args;
    if (a.cache_dtype == kBFloat16Pairs && !current_level().attends_pairs) return kOtherLayout;
    Work work;
    if (const int status = measure(a, work)) return status;
    Carver size(nullptr);
    carve(size, a);
    char* memory = scratch_memory.reserve(size.taken() * thread_count());
    if (!memory) return kNoMemory;
    const bool worth_it = work.products * a.heads * a.dim > 1 << 15;
    // Too few spans to go round: each section becomes an item.
    if (worth_it && work.spans < kSpansAThread * thread_count() && work.sections > work.spans)
        return attend_by_section(a, work, size.taken(), memory);
    auto* spans = reinterpret_cast<AttentionSpan*>(span_memory.reserve(work.spans * int64_t(sizeof(AttentionSpan))));
    if (!spans && work.spans) return kNoMemory;
    list_spans(a, spans);

    // The KV heads of one sequence's tokens, where there are enough of those; of single tokens several sequences: what an
    // item reads first it waits for.
    const int64_t together = work.spans / a.kv_heads < kSpansAThread * thread_count() ? 1 : a.kv_heads;
    const int64_t groups = work.spans / together, most = a.tokens == a.sequences ? kItemsAThread * thread_count() : groups;
    const int64_t items = groups < most ? groups : most;
    parallel_items(items, worth_it, [&](int64_t item, int thread) {
        const int64_t first = cut(groups, item, items), last = cut(groups, item + 1, items);
        Carver mine(memory + thread * size.taken());
        current_level().paged_attention(a, spans + first * together, (last - first) * together, carve(mine, a), false);
    });
    return kOk;
}
