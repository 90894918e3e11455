// Drawing one token a row: temperature, top-k, top-p, min-p, then the inverse of the distribution function at
// the row's uniform number, over the kept tokens in order of their ids.
#include <algorithm>
#include <cstring>

#include "arena.h"
#include "level.h"
#include "library.h"
#include "parallel.h"

namespace {

bool before(const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
}

struct DrawScratch {
    float* weights;         // [vocabulary]
    double* sums;           // [blocks]
    Candidate* candidates;  // [vocabulary]
};

DrawScratch carve(Carver& from, int64_t vocabulary) {
    return {from.take<float>(vocabulary), from.take<double>(vocabulary / kDrawBlock + 1),
            from.take<Candidate>(vocabulary)};
}

double sum_of(const Candidate* candidates, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += candidates[i].weight;
    return sum;
}

// Weights in [0, 1] fall into 16 buckets an octave.
constexpr int kBuckets = (0x3f800000 >> 19) + 1;

int bucket_of(const Candidate& c) {
    uint32_t bits;
    std::memcpy(&bits, &c.weight, sizeof bits);
    return int(bits >> 19);
}

// The last candidate, best first, of the shortest run that weighs ``target``: the bucket that holds it is found
// by the buckets' sums, and only that bucket is sorted. Candidates are moved about.
Candidate boundary_of_mass(Candidate* candidates, int64_t count, double target) {
    double sums[kBuckets] = {};
    for (int64_t i = 0; i < count; i++) sums[bucket_of(candidates[i])] += candidates[i].weight;
    int bucket = kBuckets - 1, last_used = bucket;
    double mass = 0;
    for (; bucket >= 0; bucket--) {
        if (sums[bucket] > 0) last_used = bucket;
        if (sums[bucket] > 0 && mass + sums[bucket] >= target) break;
        mass += sums[bucket];
    }
    if (bucket < 0) {  // rounding kept the sum below the target
        bucket = last_used;
        target = mass + sums[bucket];
    }
    Candidate* end = std::partition(candidates, candidates + count,
                                    [&](const Candidate& c) { return bucket_of(c) == bucket; });
    std::sort(candidates, end, before);
    for (; candidates + 1 < end; candidates++) {
        mass += candidates->weight;
        if (mass >= target) break;
    }
    return *candidates;
}

// The worst token that top-k and top-p keep. Candidates are taken above a threshold that falls until there are
// enough of them, since the usual distribution has few.
Candidate boundary_of(const DrawScratch& s, int64_t vocabulary, double total, int64_t top_k, float top_p) {
    constexpr float kThresholds[] = {1.0f / 16, 1.0f / 256, 1.0f / 8192, 1.0f / (1 << 20), 1e-45f};
    int64_t count = 0;
    for (float threshold : kThresholds) {
        count = current_level().collect(s.weights, vocabulary, threshold, s.candidates);
        const bool enough =
            top_k > 0 ? count >= top_k : sum_of(s.candidates, count) >= double(top_p) * total;
        if (enough) break;
    }
    if (top_k > 0 && count > top_k) {
        std::nth_element(s.candidates, s.candidates + top_k - 1, s.candidates + count, before);
        count = top_k;
    }
    const double kept = top_k > 0 ? sum_of(s.candidates, count) : total;
    if (top_p < 1.0f) return boundary_of_mass(s.candidates, count, double(top_p) * kept);
    return *std::max_element(s.candidates, s.candidates + count, before);
}

int64_t draw_kept(const Candidate* kept, int64_t count, double uniform) {
    const double target = uniform * sum_of(kept, count);
    double mass = 0;
    for (int64_t i = 0; i < count; i++) {
        mass += kept[i].weight;
        if (mass > target) return kept[i].id;
    }
    return kept[count - 1].id;
}

int64_t draw_any(const DrawScratch& s, int64_t vocabulary, double total, double uniform) {
    const double target = uniform * total;
    double mass = 0;
    int64_t block = 0;
    const int64_t blocks = (vocabulary + kDrawBlock - 1) / kDrawBlock;
    while (block + 1 < blocks && mass + s.sums[block] <= target) mass += s.sums[block++];
    int64_t last = -1;
    for (int64_t i = block * kDrawBlock; i < vocabulary; i++) {
        mass += s.weights[i];
        if (s.weights[i] > 0) last = i;
        if (mass > target && last == i) return i;
    }
    while (last < 0 || s.weights[last] == 0) last = last < 0 ? vocabulary - 1 : last - 1;
    return last;
}

int64_t draw_row(const DrawArgs& a, int64_t row, const DrawScratch& s) {
    const float* logits = a.logits + row * a.row_stride;
    const Peak peak = current_level().find_peak(logits, a.vocabulary);
    if (peak.id < 0 || a.temperature[row] == 0) return peak.id;

    const float temperature = std::max(a.temperature[row], 1e-10f);
    current_level().weigh_logits(logits, a.vocabulary, peak.value, temperature, s.weights, s.sums);
    double total = 0;
    for (int64_t block = 0; block * kDrawBlock < a.vocabulary; block++) total += s.sums[block];

    const int64_t top_k = a.top_k[row] < a.vocabulary ? a.top_k[row] : 0;
    const bool cut = top_k > 0 || a.top_p[row] < 1.0f;
    if (!cut && a.min_p[row] <= 0) return draw_any(s, a.vocabulary, total, a.uniform[row]);

    const Candidate worst = cut ? boundary_of(s, a.vocabulary, total, top_k, a.top_p[row]) : Candidate{0, 0};
    const float least = std::max(worst.weight, std::min(a.min_p[row], 1.0f));
    int64_t count = current_level().collect(s.weights, a.vocabulary, least, s.candidates);
    if (cut)
        count = std::remove_if(s.candidates, s.candidates + count,
                               [&](const Candidate& c) { return before(worst, c); }) -
                s.candidates;
    return draw_kept(s.candidates, count, a.uniform[row]);
}

}  // namespace

extern "C" EXPORT int shoal_draw(const DrawArgs* args) {
    static Arena arena;
    const DrawArgs& a = *args;
    Carver measure(nullptr);
    carve(measure, a.vocabulary);
    char* memory = arena.reserve(measure.taken() * thread_count());
    if (!memory) return kNoMemory;
    bool any_drawn = false;
    for (int64_t row = 0; row < a.rows; row++) any_drawn |= a.temperature[row] != 0;
    const bool worth_it = any_drawn || a.rows * a.vocabulary > 1 << 18;
    parallel_items(a.rows, worth_it, [&](int64_t row, int thread) {
        Carver mine(memory + thread * measure.taken());
        a.ids[row] = draw_row(a, row, carve(mine, a.vocabulary));
    });
    return kOk;
}
