// Drawing one token a row: temperature, top-k, top-p, min-p, then the inverse of the distribution function at the row's
// uniform number, over the kept tokens in order of their ids. A cluster of blocks a row, or a block.
//
// Nothing is sorted. The worst kept token is found by radix selection: a weight's bits order it, so a histogram of their
// first ten, of the next ten among those that share the first, and of the last ten lead to it. Masses are integers, in
// units of 2^-44 of the best token's weight: added in any order they come to the same. What weighs less than a unit can
// neither be drawn nor keep others from it, and is left out from the beginning.
#include "logit_row.h"

namespace {

constexpr int kDigitBits = 10;
constexpr int kBins = 1 << kDigitBits;

using Mass = unsigned long long;
constexpr float kUnits = 0x1p44f;
constexpr uint32_t kLeastKey = uint32_t(127 - 44) << 23;  // of a weight of one unit
constexpr int kKeyBits = 3 * kDigitBits;

template <int Blocks>
struct alignas(16) Shared {
    Exchange exchange;
    // A histogram's sums in two halves: shared memory adds up 32 bits at a time.
    uint32_t low[kBins], high[kBins];
    // The cluster's, of this block's part of the bins, and of 32 bins at a time.
    Mass sums[kBins / Blocks], groups[kBins / Blocks / kWarpSize];
    // what the first warp found for all; kBins where it found none
    uint32_t digit;
    Mass above, here;
};

__device__ __forceinline__ Mass mass_of(float weight) { return Mass(weight * kUnits); }

// In the order of weights from one unit on, below 2^kKeyBits.
__device__ __forceinline__ uint32_t key_of(float weight) { return (bits_of(weight) - kLeastKey) << 1; }
__device__ __forceinline__ float weight_of(uint32_t key) { return float_of((key >> 1) + kLeastKey); }
static_assert(((0x3f800000u - kLeastKey) << 1) >> kKeyBits == 0);

// The worst kept token: weights above this one, and such ones up to ``last_id``.
struct Boundary {
    float weight;
    int last_id;
    __device__ __forceinline__ bool keeps(float other, int id) const {
        return other > weight || (other == weight && id <= last_id);
    }
};

// What is added up of tokens: their masses, or that they are there, or that they weigh as much as the boundary.
enum Measure { kMass, kCount, kEquals };

// mine, and that of all lanes before.
__device__ __forceinline__ Mass sum_up_to(Mass mine) {
    const int lane = int(threadIdx.x) % kWarpSize;
    KEEP_LOOP for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const Mass before = __shfl_up_sync(kAllLanes, mine, distance);
        if (lane >= distance) mine += before;
    }
    return mine;
}

template <int Blocks>
struct Drawing {
    Shared<Blocks>& shared;
    RowTeam<Blocks>& team;
    float peak, scale;
    Boundary boundary;

    __device__ __forceinline__ FourLogits weigh(FourLogits four) const {
        UNROLL for (float& x : four.of) x = exp_two((x - peak) * scale);
        return four;
    }

    __device__ __forceinline__ FourLogits cut(FourLogits four, int id) const {
        UNROLL for (int e = 0; e < 4; e++)
            if (!boundary.keeps(four.of[e], id + e)) four.of[e] = 0.0f;
        return four;
    }

    // Weights of four ids, 0 where they are not kept: a cluster's blocks hold them so.
    __device__ __forceinline__ FourLogits kept(int id) const {
        const FourLogits four = team.four_at(id);
        if constexpr (Blocks > 1) return four;
        else return cut(weigh(four), id);
    }

    // Of a kept token.
    __device__ __forceinline__ Mass measured(float weight, Measure measure) const {
        return measure == kMass ? mass_of(weight) : measure == kCount || weight == boundary.weight;
    }

    // Of what is measured of the tokens that are kept since the boundary was last moved.
    __device__ __forceinline__ Joined<Mass> sum(Measure measure) {
        Mass mine = 0;
        team.walk([&](int id) { return kept(id); }, [&](int id, FourLogits four) {
            if constexpr (Blocks > 1) team.held_at(id) = four = cut(four, id);
            UNROLL for (float weight : four.of)
                if (weight > 0.0f) mine += measured(weight, measure);
        });
        return team.join(mine, Mass(0), Sum());
    }

    // One thread calls found with the id at which the sum, in order of ids, reaches the goal; right after sum.
    template <typename Found>
    __device__ __forceinline__ void reach(Mass goal, Measure measure, Mass before, const Found& found) {
        KEEP_LOOP for (int i = 0; i < team.warp(); i++) before += team.of_warps()[i];
        if (before >= goal || before + team.of_warps()[team.warp()] < goal) return;
        team.walk_together([&](int id) { return kept(id); }, [&](int id, const FourLogits& four) {
            Mass values[4], mine = 0;
            UNROLL for (int e = 0; e < 4; e++) {
                values[e] = four.of[e] > 0.0f ? measured(four.of[e], measure) : 0;
                mine += values[e];
            }
            const Mass up_to = before + sum_up_to(mine);
            const uint32_t reached = __ballot_sync(kAllLanes, up_to >= goal);
            before = __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
            if (reached && team.lane() == __ffs(reached) - 1) {
                Mass here = up_to - mine;
                int e = 0;
                UNROLL for (int i = 0; i < 3; i++) e += (here += values[i]) < goal;
                found(id + e);
            }
            return reached != 0;
        });
    }

    __device__ __forceinline__ void clear_bins() {
        KEEP_LOOP for (int bin = int(threadIdx.x); bin < kBins; bin += kRowThreads) shared.low[bin] = shared.high[bin] = 0;
    }

    // Fills the histogram, whose bins are 0, of the digit at ``shift`` of the keys that begin with ``prefix``.
    __device__ __forceinline__ void count_digits(Measure measure, uint32_t prefix, int shift) {
        team.walk([&](int id) { return kept(id); }, [&](int, const FourLogits& four) {
            UNROLL for (float weight : four.of) {
                const uint32_t digits = key_of(weight) >> shift, bin = digits % kBins;
                if (digits >> kDigitBits != prefix) continue;  // so it is where the weight is 0
                if (measure == kCount) {
                    atomicAdd(&shared.low[bin], 1u);
                    continue;
                }
                const Mass mine = mass_of(weight);
                const uint32_t low = uint32_t(mine), old = atomicAdd(&shared.low[bin], low);
                const uint32_t high = uint32_t(mine >> 32) + (old + low < low);
                if (high) atomicAdd(&shared.high[bin], high);
            }
        });
    }

    // Each block adds up a part of the bins over all blocks; then the bin is looked for, from the highest on, at which what
    // lies above and in it reaches the goal. above: becomes what lies above it; here: in it. False where all together are
    // less. The histogram is empty again.
    __device__ __forceinline__ bool find_digit(Mass goal, uint32_t& digit, Mass& above, Mass& here) {
        constexpr int kPart = kBins / Blocks, kGroups = kPart / kWarpSize;
        static_assert(kBins == kWarpSize * kWarpSize, "a lane a group, then a lane a bin");
        team.meet();
        KEEP_LOOP for (int i = int(threadIdx.x); i < kPart; i += kRowThreads) {
            const int bin = team.rank() * kPart + i;
            Mass sum = 0;
            UNROLL for (int block = 0; block < Blocks; block++)
                sum += (Mass(*theirs<Blocks>(block, &shared.high[bin])) << 32) + *theirs<Blocks>(block, &shared.low[bin]);
            shared.sums[i] = sum;
            UNROLL for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
            if (team.lane() == 0) shared.groups[i / kWarpSize] = sum;
        }
        team.meet();
        clear_bins();
        if (team.warp() == 0) {
            const int last = kWarpSize - 1 - team.lane();
            const Mass in_group = *theirs<Blocks>(last / kGroups, &shared.groups[last % kGroups]);
            const Mass to_group = above + sum_up_to(in_group);
            const int found = __ffs(__ballot_sync(kAllLanes, to_group >= goal)) - 1;
            if (found < 0) {
                if (team.lane() == 0) shared.digit = kBins;
            } else {
                const int group = kWarpSize - 1 - found;
                const Mass over = __shfl_sync(kAllLanes, to_group - in_group, found);
                const Mass in_bin = *theirs<Blocks>(group / kGroups, &shared.sums[group % kGroups * kWarpSize + last]);
                const Mass to_bin = over + sum_up_to(in_bin);
                if (team.lane() == __ffs(__ballot_sync(kAllLanes, to_bin >= goal)) - 1) {
                    shared.digit = uint32_t(group * kWarpSize + last);
                    shared.above = to_bin - in_bin;
                    shared.here = in_bin;
                }
            }
        }
        __syncthreads();
        digit = shared.digit;
        above = shared.above;
        here = shared.here;
        return digit < kBins;
    }

    // Keeps the best tokens that come to the goal, or all where there are not so many.
    __device__ __forceinline__ void keep_best(Mass goal, Measure measure) {
        uint32_t key = 0, digit = 0;
        Mass above = 0, here = 0;
        KEEP_LOOP for (int shift = 2 * kDigitBits;; shift -= kDigitBits) {
            count_digits(measure, key, shift);
            if (!find_digit(goal, digit, above, here)) return;
            key = key << kDigitBits | digit;
            const float weight = weight_of(key << shift);  // the least in the bin
            const Mass each = measure == kMass ? mass_of(weight) : 1;
            const bool is_wanted_whole = above + here == goal || here < 2 * each;  // which then is one token
            if (!is_wanted_whole && shift > 0) continue;
            if (weight > boundary.weight) boundary = {weight, team.vocabulary};
            if (!is_wanted_whole) keep_first((goal - above + each - 1) / each, here / each);
            return;
        }
    }

    // Of ``there`` tokens of the boundary's weight as many as are wanted, those with the lower ids.
    __device__ __forceinline__ void keep_first(Mass wanted, Mass there) {
        if (wanted >= there) return;
        const Mass before = sum(kEquals).before;
        Mass last_id = 0;
        reach(wanted, kEquals, before, [&](int id) { last_id = Mass(id); });
        boundary.last_id = int(team.join(last_id, Mass(0), Sum()).row);
    }
};

__device__ __forceinline__ Mass share_of(Mass whole, double share) {
    const auto part = Mass(ceil(double(whole) * share));
    return part < 1 ? 1 : part > whole ? whole : part;
}

// The best token, id -1 where a logit is NaN or +inf, or none is above -inf; keeps this block's logits.
template <int Blocks>
__device__ __forceinline__ Ranked find_peak(RowTeam<Blocks>& team) {
    float best = -INFINITY;
    int best_id = 0;
    bool is_strange = false;
    team.template walk<4>([&](int id) { return team.load(id); }, [&](int id, const FourLogits& four) {
        UNROLL for (int e = 0; e < 4; e++) {
            is_strange |= !(four.of[e] < INFINITY);
            if (four.of[e] > best) {
                best = four.of[e];
                best_id = id + e;
            }
        }
        if constexpr (Blocks > 1) team.held_at(id) = four;
    });
    const Ranked mine = is_strange ? ~Ranked(0) : best == -INFINITY ? 0 : ranked(best, best_id);
    return team.join(mine, Ranked(0), Larger()).row;
}

template <int Blocks>
__device__ __forceinline__ void draw_token(const DrawArgs& a, Shared<Blocks>& shared, RowTeam<Blocks>& team) {
    const int row = int(blockIdx.x);
    const Ranked best = find_peak(team);
    const bool is_strange = best == 0 || best == ~Ranked(0);
    if (is_strange || a.temperature[row] == 0.0f) {
        if (team.rank() == 0 && threadIdx.x == 0) a.ids[row] = is_strange ? -1 : id_of(best);
        return;
    }
    const float scale = kLog2E / fmaxf(a.temperature[row], 1e-10f);
    Drawing<Blocks> drawing{shared, team, value_of(best), scale, {weight_of(0), team.vocabulary}};
    if constexpr (Blocks > 1)
        team.walk([&](int id) { return team.four_at(id); }, [&](int id, const FourLogits& four) {
            team.held_at(id) = drawing.cut(drawing.weigh(four), id);
        });
    drawing.clear_bins();
    __syncthreads();

    const int64_t top_k = a.top_k[row];
    const float top_p = a.top_p[row], least = fminf(a.min_p[row], 1.0f);
    KEEP_LOOP for (int cut = 0; cut < 2; cut++) {
        const Measure measure = cut == 0 ? kCount : kMass;
        const bool is_cut = measure == kCount ? top_k > 0 && top_k < team.vocabulary : top_p < 1.0f;
        if (!is_cut) continue;
        const Mass goal = measure == kCount ? Mass(top_k) : share_of(drawing.sum(kMass).row, double(top_p));
        drawing.keep_best(goal, measure);
    }
    if (least > drawing.boundary.weight) drawing.boundary = {least, team.vocabulary};
    const auto [total, before] = drawing.sum(kMass);
    const auto passed = Mass(double(total) * a.uniform[row]);
    drawing.reach(passed < total ? passed + 1 : total, kMass, before, [&](int id) { a.ids[row] = id; });
}

// Blocks of clusters that a processor is to have at once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kTogether = 3;
#else
constexpr int kTogether = 2;
#endif

template <int Blocks>
__global__ void __launch_bounds__(kRowThreads, Blocks > 1 ? kTogether : 1) draw_kernel(DrawArgs a, bool is_aligned) {
    begin_kernel();
    auto& shared = *reinterpret_cast<Shared<Blocks>*>(dynamic_shared());
    RowTeam<Blocks> team{shared.exchange, reinterpret_cast<FourLogits*>(&shared + 1),
                         a.logits + int64_t(blockIdx.x) * a.row_stride, int(a.vocabulary), is_aligned};
    draw_token(a, shared, team);
    team.meet();  // nobody leaves while others may read what it has told
}

}  // namespace

extern "C" EXPORT int shoal_draw(const DrawArgs* a) {
    return launch_rows<draw_kernel<kRowBlocks>, draw_kernel<1>>("draw", a->rows, sizeof(Shared<kRowBlocks>),
                                                                sizeof(Shared<1>), *a);
}
