// What log-probabilities are made of, so that no row of logits has to leave the device: the logarithm of the sum of
// exponentials, the best ids, and the logit of the id that was drawn. Sums are of doubles, in an order that depends on the
// number of logits alone. A cluster of blocks a row, or a block.
#include "logit_row.h"

namespace {

constexpr int kThreads = 512;

// That there is room for; an even number of them ends where a FourLogits may begin.
__host__ __device__ __forceinline__ int64_t tops_of(const ScoreLogitsArgs& a) { return (a.width + 1) / 2 * 2; }
static_assert(sizeof(Exchange) % sizeof(FourLogits) == 0);

// The best of this thread's candidates that come after ``last``.
template <int Blocks>
__device__ __forceinline__ Ranked next_best(const RowTeam<Blocks>& team, Ranked last) {
    Ranked best = 0;
    team.walk([&](int id) { return team.four_at(id); }, [&](int id, const FourLogits& four) {
        UNROLL for (int e = 0; e < 4; e++) {
            const Ranked one = four.of[e] > -INFINITY ? ranked(four.of[e], id + e) : 0;
            if (one < last && one > best) best = one;
        }
    });
    return best;
}

// Each block's best, and of those the row's.
template <int Blocks>
__device__ __forceinline__ void tell_best(const ScoreLogitsArgs& a, RowTeam<Blocks>& team, Ranked* tops, int top,
                                          Ranked mine) {
    for (int n = 0; n < top; n++) {
        const Ranked best = team.join_block(mine, Larger());
        if (threadIdx.x == 0) tops[n] = best;
        if (best && mine == best) mine = next_best(team, best);
    }
    team.meet();
    if (team.rank() > 0 || team.warp() > 0) return;
    const Ranked* of_block = theirs<Blocks>(team.lane() < Blocks ? team.lane() : 0, tops);
    int taken = 0;
    for (int n = 0; n < top; n++) {
        const Ranked next = team.lane() < Blocks ? of_block[taken] : 0;
        Ranked best = next;
        UNROLL for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
            best = Larger()(best, __shfl_xor_sync(kAllLanes, best, mask));
        taken += best && next == best;
        if (team.lane() > 0) continue;
        const int64_t place = int64_t(blockIdx.x) * a.width + n;
        a.top_ids[place] = best ? id_of(best) : -1;
        a.top_values[place] = best ? value_of(best) : -INFINITY;
    }
}

template <int Blocks>
__global__ void __launch_bounds__(kRowThreads, 3) score_logits_kernel(ScoreLogitsArgs a, bool is_aligned) {
    begin_kernel();
    const int64_t place = blockIdx.x, row = a.rows[place];
    if (row < 0 || row >= a.logits_rows) return;
    auto& exchange = *reinterpret_cast<Exchange*>(dynamic_shared());
    auto* tops = reinterpret_cast<Ranked*>(&exchange + 1);
    RowTeam<Blocks> team{exchange, reinterpret_cast<FourLogits*>(tops + tops_of(a)), a.logits + row * a.row_stride,
                         int(a.vocabulary), is_aligned};
    if constexpr (Blocks > 1)
        team.template walk<4>([&](int id) { return team.load(id); },
                              [&](int id, const FourLogits& four) { team.held_at(id) = four; });
    const Ranked best = next_best(team, ~Ranked(0));
    const Ranked peak = team.join(best, Ranked(0), Larger()).row;
    const float peak_value = peak ? value_of(peak) : -INFINITY;
    double sum = 0;
    team.walk([&](int id) { return team.four_at(id); }, [&](int, const FourLogits& four) {
        UNROLL for (float x : four.of) sum += double(expf(x - peak_value));
    });
    sum = team.join(sum, 0.0, Sum()).row;
    if (team.rank() == 0 && threadIdx.x == 0) a.totals[place] = log(sum) + double(peak_value);
    tell_best(a, team, tops, int(a.tops[place] < a.width ? a.tops[place] : a.width), best);
    team.meet();  // nobody leaves while others may read what it has told
}

__global__ void __launch_bounds__(kThreads) pick_logits_kernel(PickLogitsArgs a) {
    begin_kernel();
    const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (place >= a.count) return;
    const int64_t row = a.rows[place];
    if (row < 0 || row >= a.logits_rows) return;
    const int64_t id = a.ids[row];
    if (id >= 0 && id < a.vocabulary) a.values[place] = a.logits[row * a.row_stride + id];
}

}  // namespace

extern "C" EXPORT int shoal_score_logits(const ScoreLogitsArgs* a) {
    const size_t shared_bytes = sizeof(Exchange) + size_t(tops_of(*a)) * sizeof(Ranked);
    return launch_rows<score_logits_kernel<kRowBlocks>, score_logits_kernel<1>>("score_logits", a->count, shared_bytes,
                                                                                shared_bytes, *a);
}

extern "C" EXPORT int shoal_pick_logits(const PickLogitsArgs* a) {
    const dim3 grid(unsigned((a->count + kThreads - 1) / kThreads));
    return launch("pick_logits", pick_logits_kernel, grid, kThreads, 0, a->stream, *a);
}
