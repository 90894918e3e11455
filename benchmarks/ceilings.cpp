// What this processor and its memory can do at most. Compiled and called by ceilings.py, which knows the flags:
//
//   ceilings THREADS LARGE_BYTES KERNEL...
//
// Prints a line "KERNEL VALUE" for each: GB/s for reads, GFLOP/s or GOP/s for the rest, the best of several tries,
// since the machine may be shared. A multiply and an add are two operations.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kTries = 12;
constexpr double kTrySeconds = 0.04;
// Accumulators of one thread: two ports times the latency of the slowest instruction here, and some.
constexpr int kChains = 12;

using Clock = std::chrono::steady_clock;
// Does `rounds` rounds as thread `thread`.
using Work = std::function<void(int thread, long rounds)>;

volatile std::uint64_t g_sink;

double seconds_of(int threads, long rounds, const Work& work) {
    std::atomic<int> waiting{threads};
    std::atomic<bool> go{false};
    std::vector<std::thread> crew;
    for (int thread = 0; thread < threads; ++thread)
        crew.emplace_back([&, thread] {
            --waiting;
            while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
            work(thread, rounds);
        });
    while (waiting.load() != 0) std::this_thread::yield();
    const auto began = Clock::now();
    go.store(true, std::memory_order_release);
    for (auto& thread : crew) thread.join();
    return std::chrono::duration<double>(Clock::now() - began).count();
}

// Billions a second, where each thread's round is worth `amount`.
double best_rate(int threads, double amount, const Work& work) {
    long rounds = 1;
    double seconds = seconds_of(threads, rounds, work);
    while (seconds < kTrySeconds) {
        rounds *= seconds < kTrySeconds / 16 ? 8 : 2;
        seconds = seconds_of(threads, rounds, work);
    }
    for (int repeat = 1; repeat < kTries; ++repeat)
        seconds = std::min(seconds, seconds_of(threads, rounds, work));
    return amount * threads * rounds / seconds / 1e9;
}

#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#endif
std::uint64_t sum_of(const std::uint64_t* words, std::size_t count) {
    std::uint64_t lanes[64] = {};
    for (std::size_t at = 0; at + 64 <= count; at += 64)
        for (int lane = 0; lane < 64; ++lane) lanes[lane] += words[at + lane];
    std::uint64_t total = 0;
    for (const std::uint64_t lane : lanes) total += lane;
    return total;
}

double read_rate(int threads, std::size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 0.0;
    madvise(memory, bytes, MADV_HUGEPAGE);
    std::memset(memory, 1, bytes);
    const auto* words = static_cast<const std::uint64_t*>(memory);
    const std::size_t share = bytes / sizeof(std::uint64_t) / threads;
    const double rate = best_rate(threads, share * sizeof(std::uint64_t), [=](int thread, long rounds) {
        for (long round = 0; round < rounds; ++round) g_sink = sum_of(words + thread * share, share);
    });
    munmap(memory, bytes);
    return rate;
}

#if defined(__x86_64__)

// A value that the compiler takes for a new one, so that it hoists nothing out of the loop; costs no instruction.
#define AS_NEW(value) asm("" : "+x"(value))
#define AS_NEW_512(value) asm("" : "+v"(value))

__attribute__((target("avx2,fma"))) void fma_avx2(int, long rounds) {
    __m256 sums[kChains], a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm256_fmadd_ps(a, b, sums[chain]);
    for (auto& sum : sums) AS_NEW(sum);
}

__attribute__((target("avx512f"))) void fma_avx512(int, long rounds) {
    __m512 sums[kChains], a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_fmadd_ps(a, b, sums[chain]);
    for (auto& sum : sums) AS_NEW_512(sum);
}

__attribute__((target("avx512f,avx512bf16"))) void bf16_avx512(int, long rounds) {
    __m512 sums[kChains];
    __m512bh a, b;
    std::memset(&a, 0, sizeof a);
    std::memset(&b, 0, sizeof b);
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], a, b);
    for (auto& sum : sums) AS_NEW_512(sum);
}

__attribute__((target("avx2"))) void int8_avx2(int, long rounds) {
    __m256i sums[kChains], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
    const __m256i ones = _mm256_set1_epi16(1);
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) {
            AS_NEW(a);
            const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones);
            sums[chain] = _mm256_add_epi32(sums[chain], pairs);
        }
    for (auto& sum : sums) AS_NEW(sum);
}

__attribute__((target("avx2,avxvnni"))) void int8_avx_vnni(int, long rounds) {
    __m256i sums[kChains], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain)
            sums[chain] = _mm256_dpbusd_avx_epi32(sums[chain], a, b);
    for (auto& sum : sums) AS_NEW(sum);
}

__attribute__((target("avx512f,avx512vnni"))) void int8_avx512(int, long rounds) {
    __m512i sums[kChains], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain)
            sums[chain] = _mm512_dpbusd_epi32(sums[chain], a, b);
    for (auto& sum : sums) AS_NEW_512(sum);
}

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four sums of 16 × 16 in tiles 0 to 3, from two tiles of rows (4, 5) and two of columns (6, 7).
__attribute__((target("amx-tile,amx-int8"))) void int8_amx(int, long rounds) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    for (long round = 0; round < rounds; ++round) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
}

__attribute__((target("amx-tile,amx-bf16"))) void bf16_amx(int, long rounds) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    for (long round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
}

// Linux hands tiles out on request only.
bool tiles_allowed() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

double compute_rate(const std::string& kernel, int threads) {
    constexpr double kTileOps = 4 * 2.0 * 16 * 16;
    if (kernel == "fma_avx2") return best_rate(threads, kChains * 2 * 8, fma_avx2);
    if (kernel == "fma_avx512") return best_rate(threads, kChains * 2 * 16, fma_avx512);
    if (kernel == "bf16_avx512") return best_rate(threads, kChains * 2 * 32, bf16_avx512);
    if (kernel == "int8_avx2") return best_rate(threads, kChains * 2 * 32, int8_avx2);
    if (kernel == "int8_avx_vnni") return best_rate(threads, kChains * 2 * 32, int8_avx_vnni);
    if (kernel == "int8_avx512") return best_rate(threads, kChains * 2 * 64, int8_avx512);
    if (kernel == "int8_amx" && tiles_allowed()) return best_rate(threads, kTileOps * 64, int8_amx);
    if (kernel == "bf16_amx" && tiles_allowed()) return best_rate(threads, kTileOps * 32, bf16_amx);
    return 0.0;
}

#else

double compute_rate(const std::string&, int) { return 0.0; }

#endif

}  // namespace

int main(int count, char** words) {
    if (count < 4) return 2;
    const int threads = std::atoi(words[1]);
    const std::size_t large_bytes = std::strtoull(words[2], nullptr, 10);
    for (int at = 3; at < count; ++at) {
        const std::string kernel = words[at];
        const double rate = kernel == "read_large"   ? read_rate(threads, large_bytes)
                            : kernel == "read_100mb" ? read_rate(threads, 100'000'000)
                                                     : compute_rate(kernel, threads);
        std::printf("%s %.3f\n", kernel.c_str(), rate);
        std::fflush(stdout);
    }
    return 0;
}
