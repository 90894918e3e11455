// The exported functions: which level runs, and one launcher an operator, which checks indices, cuts the work
// into ranges and runs them on threads.
#include "library.h"

#include <cstring>

#include "gated_linear_amx.h"
#include "level.h"
#include "linear_amx.h"
#include "linear_integers_amx.h"
#include "paged_attention_amx.h"
#include "paged_attention_bf16.h"
#include "parallel.h"
#include "read_ahead.h"
#include "tiles.h"

namespace {

struct NamedLevel {
    const char* name;
    const Level* kernels;
    bool supported;
};

#if defined(__x86_64__)
Level with_tiles(Level level) {
    level.linear_bf16 = linear_amx;
    level.linear_integers = linear_integers_amx;
    level.linear_narrow = linear_narrow_amx;
    level.gated_linear = gated_linear_amx;
    level.embed = level.embed_for_tiles;
    level.paged_attention = paged_attention_amx;
    return level;
}

Level with_narrow_dots(Level level) {
    level.paged_attention = paged_attention_bf16;
    level.attends_pairs = true;
    return level;
}
#endif

const NamedLevel* levels() {
#if defined(__x86_64__)
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c");
    static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    static const Level tiles = with_tiles(kAvx512Vnni), narrow_dots = with_narrow_dots(kAvx512Vnni);
    static const NamedLevel all[] = {
        {"avx512_amx", &tiles, vnni && tiles_are_usable()},
        {"avx512_bf16", &narrow_dots, vnni && narrow_dots_are_usable()},
        {"avx512_vnni", &kAvx512Vnni, vnni},
        {"avx512", &kAvx512, avx512},
        {"avx2", &kAvx2, avx2},
        {"scalar", &kScalar, true},
        {},
    };
#else
    static const NamedLevel all[] = {{"scalar", &kScalar, true}, {}};
#endif
    return all;
}

const NamedLevel* best_level() {
    const NamedLevel* level = levels();
    while (!level->supported) level++;
    return level;
}

const NamedLevel* chosen = best_level();

constexpr int64_t kElementsAThread = 1 << 12;

int64_t rows_a_thread(int64_t elements_a_row) { return kElementsAThread / (elements_a_row + 1) + 1; }

int check_rope(const RopeWriteKvArgs& a) {
    for (int64_t token = 0; token < a.tokens; token++) {
        if (a.positions[token] < 0 || a.positions[token] >= a.max_positions) return kPositionOutside;
        if (a.cache_slots[token] < 0 || a.cache_slots[token] >= a.blocks * a.block_size) return kSlotOutside;
    }
    return kOk;
}

}  // namespace

const Level& current_level() { return *chosen->kernels; }

extern "C" {

// The CRC-32 of shoal_cpu.h as this was built: a caller with other structs must not go on.
EXPORT uint32_t shoal_interface() { return SHOAL_INTERFACE; }

EXPORT const char* shoal_level() { return chosen->name; }

// The name of the index-th level, best first; null after the last one.
EXPORT const char* shoal_level_name(int index) { return levels()[index].name; }

// Whether linear takes integer weights at this level, whose activations then stay floats.
EXPORT int shoal_has_tiles() { return current_level().linear_integers != nullptr; }

// Whether a bfloat16 cache of such heads and blocks is one of kBFloat16Pairs.
EXPORT int shoal_pairs_positions(int64_t dim, int64_t block_size) {
    return current_level().attends_pairs && dim % 32 == 0 && dim <= kMostDim && block_size % kPairedPositions == 0;
}

EXPORT int shoal_level_supported(int index) { return levels()[index].supported; }

// Whether the level exists and this processor has it; it is used from then on.
EXPORT int shoal_use_level(const char* name) {
    for (const NamedLevel* level = levels(); level->name; level++)
        if (std::strcmp(level->name, name) == 0 && level->supported) {
            chosen = level;
            return 1;
        }
    return 0;
}

// cpus: ``count`` processors that the threads stay on, or null.
EXPORT void shoal_set_threads(int count, const int* cpus) { set_threads(count, cpus); }

// Runs the calls in order. Returns 0, or where one fails its status + 256 · its index: those after it did not run.
EXPORT int shoal_run(const Call* calls, int64_t count) {
    ReadAhead ahead(calls, count);
    for (int64_t i = 0; i < count; i++) {
        ahead.before(i);
        if (const int status = calls[i].function(calls[i].args)) return status + int(i) * 256;
    }
    return kOk;
}

EXPORT int shoal_quantise(const QuantiseArgs* a) {
    parallel_ranges(a->rows, rows_a_thread(a->inputs),
                    [&](int64_t begin, int64_t end) { current_level().quantise(*a, begin, end); });
    return kOk;
}

EXPORT int shoal_rms_norm(const RmsNormArgs* a) {
    parallel_ranges(a->outer * a->inner, rows_a_thread(a->dim),
                    [&](int64_t begin, int64_t end) { current_level().rms_norm(*a, begin, end); });
    return kOk;
}

EXPORT int shoal_add_rms_norm(const AddRmsNormArgs* a) {
    parallel_ranges(a->rows, rows_a_thread(a->dim),
                    [&](int64_t begin, int64_t end) { current_level().add_rms_norm(*a, begin, end); });
    return kOk;
}

EXPORT int shoal_rope_write_kv(const RopeWriteKvArgs* a) {
    if (const int status = check_rope(*a)) return status;
    parallel_ranges(a->tokens, rows_a_thread((a->heads + 2 * a->kv_heads) * a->dim),
                    [&](int64_t begin, int64_t end) { current_level().rope_write_kv(*a, begin, end); });
    return kOk;
}

EXPORT int shoal_gated_activation(const GatedActivationArgs* a) {
    parallel_ranges(a->rows, rows_a_thread(a->dim * 4),
                    [&](int64_t begin, int64_t end) { current_level().gated_activation(*a, begin, end); });
    return kOk;
}

EXPORT int shoal_gated_linear(const GatedLinearArgs* a) {
    if (a->rows == 0) return kOk;
    return current_level().gated_linear ? current_level().gated_linear(*a) : kOtherLayout;
}

EXPORT int shoal_embed(const EmbedArgs* a) {
    parallel_ranges(a->tokens, rows_a_thread(a->dim),
                    [&](int64_t begin, int64_t end) { current_level().embed(*a, begin, end); });
    return kOk;
}

}  // extern "C"
