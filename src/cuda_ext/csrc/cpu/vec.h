// One vector register of floats at the level this file is compiled for, and the few functions on it.
//
// Everything here is in an unnamed namespace: the same source is compiled once a level into one library, and
// no function of a higher level may be merged with one of a lower level by the linker. For the same reason no
// kernel uses the C++ standard library.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));
typedef uint16_t bf16;

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

INLINE Vec broadcast(float x) { return x - Vec{}; }

// Whatever 32 bits hold, in every lane.
INLINE IntVec broadcast_word(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word - IntVec{};
}

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Rounded once at every level (fma only where that is one instruction).
INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) || defined(__AVX2__)
    return fma(a, b, c);
#else
    for (int i = 0; i < kWidth; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// The second argument wins where either is NaN.
INLINE Vec max_vec(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

INLINE Vec min_vec(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// --- memory ---

INLINE Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// What compilers make of __builtin_convertvector between widths takes many instructions.
INLINE BitVec widen_halves(HalfVec h) {
#if defined(__AVX512F__)
    return (BitVec)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
    return (BitVec)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, BitVec);
#endif
}

INLINE Vec widen(HalfVec h) { return (Vec)(widen_halves(h) << 16); }

INLINE Vec load(const bf16* p) {
    HalfVec h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h);
}

// kWidth numbers in half precision.
INLINE Vec load_half_precision(const uint8_t* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    HalfVec h;
    __builtin_memcpy(&h, p, sizeof h);
    const BitVec bits = widen_halves(h);
    const BitVec magnitude = bits & 0x7fff;
    // Exponent and mantissa move to their places; a product with 2^112 mends the exponent, subnormals included.
    const Vec scaled = (Vec)(magnitude << 13) * broadcast(5.192296858534828e33f);
    const BitVec special = (BitVec)(magnitude >= 0x7c00);
    const BitVec value = ((BitVec)scaled & ~special) | (((magnitude << 13) | 0x7f800000) & special);
    return (Vec)(value | (bits & 0x8000) << 16);
#endif
}

typedef int8_t ByteVec __attribute__((vector_size(kWidth)));

INLINE Vec load(const int8_t* p) {
#if defined(__AVX512F__)
    const IntVec codes = (IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    const IntVec codes = (IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    ByteVec bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    const IntVec codes = __builtin_convertvector(bytes, IntVec);
#endif
    return __builtin_convertvector(codes, Vec);
}

// Codes from -128 to 127.
INLINE void store_codes(int8_t* p, IntVec codes) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)codes),
                                           _mm256_extracti128_si256((__m256i)codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
#else
    const ByteVec bytes = __builtin_convertvector(codes, ByteVec);
    __builtin_memcpy(p, &bytes, sizeof bytes);
#endif
}

struct Paired {};  // of a cache as kBFloat16Pairs, in the place of its elements' type

constexpr int64_t kCacheGroup = 32;  // elements of an int8 cache under one scale

// Elements from one row of a cache to the next: an int8 row's scales lie behind its codes.
template <typename Cache>
INLINE int64_t cache_row(int64_t dim) {
    return sizeof(Cache) == 1 ? dim + (dim + kCacheGroup - 1) / kCacheGroup * int64_t(sizeof(float)) : dim;
}

// The first n (< kWidth) elements; the other lanes are zero.
template <typename T>
INLINE Vec load_part(const T* p, int64_t n) {
    T lanes[kWidth] = {};
    __builtin_memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}

INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// Rounds to nearest even and keeps NaN a NaN.
INLINE HalfVec narrow(Vec v) {
    const BitVec bits = (BitVec)v;
    const BitVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const BitVec quiet_nan = (bits >> 16) | 0x40;
    const BitVec is_nan = (BitVec)((bits & 0x7fffffff) > 0x7f800000);
    const BitVec halves = (rounded & ~is_nan) | (quiet_nan & is_nan);
#if defined(__AVX512F__)
    return (HalfVec)_mm512_cvtepi32_epi16((__m512i)halves);
#elif defined(__AVX2__)
    return (HalfVec)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)halves),
                                     _mm256_extracti128_si256((__m256i)halves, 1));
#else
    return __builtin_convertvector(halves, HalfVec);
#endif
}

#if defined(__AVX512BF16__)
// Two vectors as one of bfloat16.
INLINE __m512i narrow_both(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#endif

INLINE void store(bf16* p, Vec v) {
    const HalfVec h = narrow(v);
    __builtin_memcpy(p, &h, sizeof h);
}

template <typename T>
INLINE void store_part(T* p, Vec v, int64_t n) {
    T lanes[kWidth];
    store(lanes, v);
    __builtin_memcpy(p, lanes, n * sizeof(T));
}

// Calls body(offset, load, store) for each vector of a row of n elements, its ragged end included.
template <typename Body>
INLINE void for_each_vec(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) body(i, int64_t(kWidth));
    if (i < n) body(i, n - i);
}

template <typename T>
INLINE Vec load_n(const T* p, int64_t n) {
    return n == kWidth ? load(p) : load_part(p, n);
}

// Elements [i, i + n) of a cache's row; kWidth divides i, and so a scale's elements never lie in two vectors.
template <typename Cache>
INLINE Vec load_cached(const Cache* row, int64_t, int64_t i, int64_t n) {
    return load_n(row + i, n);
}

INLINE Vec load_cached(const int8_t* row, int64_t dim, int64_t i, int64_t n) {
    float scale;
    __builtin_memcpy(&scale, row + dim + i / kCacheGroup * int64_t(sizeof scale), sizeof scale);
    return load_n(row + i, n) * scale;
}

template <typename T>
INLINE void store_n(T* p, Vec v, int64_t n) {
    if (n == kWidth)
        store(p, v);
    else
        store_part(p, v, n);
}

// --- reductions, in one order ---

// Joins the upper half of the lanes with the lower one until one is left.
template <typename Vector, typename Join>
INLINE auto fold(Vector v, Join join) {
    typedef __typeof__(v[0] + v[0]) Element;
    typedef Element Four __attribute__((vector_size(16)));
    typedef int32_t Index __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    typedef Element Eight __attribute__((vector_size(32)));
    const Eight eight = join((Eight)_mm512_castsi512_si256((__m512i)v), (Eight)_mm512_extracti64x4_epi64((__m512i)v, 1));
#elif defined(__AVX2__)
    const Vector eight = v;
#endif
#if defined(__AVX2__)
    const Four four = join((Four)_mm256_castsi256_si128((__m256i)eight), (Four)_mm256_extracti128_si256((__m256i)eight, 1));
#else
    const Four four = v;
#endif
    const Four two = join(four, __builtin_shuffle(four, Index{2, 3, 0, 1}));
    return join(two, __builtin_shuffle(two, Index{1, 0, 3, 2}))[0];
}

INLINE float sum_of(Vec v) {
    return fold(v, [](auto a, auto b) { return a + b; });
}

// The upper lane wins where either is NaN.
INLINE float max_of_lanes(Vec v) {
    return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Of two vectors in segments of 2 · Half lanes, the lower and the upper halves of all segments: those of the first vector,
// then those of the second one.
template <int Half>
struct Halves {
    int32_t lower[kWidth] = {}, upper[kWidth] = {};
    constexpr Halves() {
        constexpr int own = kWidth / (2 * Half);  // segments of a vector
        for (int lane = 0; lane < kWidth; lane++) {
            const int segment = lane / Half, vector = segment / own;
            lower[lane] = vector * kWidth + segment % own * 2 * Half + lane % Half;
            upper[lane] = lower[lane] + Half;
        }
    }
};

template <int Half, typename Join>
INLINE void fold_halves(Vec (&v)[kWidth], Join join) {
    static constexpr Halves<Half> halves;
    IntVec lower, upper;
    __builtin_memcpy(&lower, halves.lower, sizeof lower);
    __builtin_memcpy(&upper, halves.upper, sizeof upper);
#pragma GCC unroll 16
    for (int i = 0; i < Half; i++)
        v[i] = join(__builtin_shuffle(v[i], v[i + Half], lower), __builtin_shuffle(v[i], v[i + Half], upper));
    if constexpr (Half > 1) fold_halves<Half / 2>(v, join);
}

// The place of each vector in fold_rows, so that its lane comes out where it should: its bits the other way round.
constexpr int fold_place(int row) {
    int place = 0;
    for (int bit = 1; bit < kWidth; bit *= 2) place = 2 * place + (row & bit ? 1 : 0);
    return place;
}

// Lane i: what fold gives for the vector that was put at fold_place(i). v is used up.
template <typename Join>
INLINE Vec fold_rows(Vec (&v)[kWidth], Join join) {
    fold_halves<kWidth / 2>(v, join);
    return v[0];
}

INLINE bool any_at_least(Vec v, float least) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)broadcast(least), _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)broadcast(least), _CMP_GE_OQ)) != 0;
#else
    bool any = false;
    for (int i = 0; i < kWidth; i++) any |= v[i] >= least;
    return any;
#endif
}

// --- functions: NaN in, NaN out ---

constexpr float kLog2E = 1.44269504f;

#if defined(__AVX512DQ__)
// x - floor(x).
INLINE Vec above_floor(Vec x) { return (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
#endif

INLINE Vec power_of_two(IntVec n) { return (Vec)((n + 127) << 23); }

// Within 2 units in the last place; 0 below -87, infinity above 89. What would be denormal is 0: an instruction that gives
// a denormal takes some hundred cycles, and masked scores would all do so.
INLINE Vec exp_vec(Vec x) {
    const IntVec is_nothing = (IntVec)(x < -87.0f);
    x = max_vec(broadcast(-87.0f), x);
    x = min_vec(broadcast(89.0f), x);
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec n = fma(x, broadcast(kLog2E), magic) - magic;
    Vec r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Vec p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
    const Vec power = (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const IntVec whole = __builtin_convertvector(n, IntVec);
    const IntVec half = whole >> 1;
    const Vec power = p * power_of_two(half) * power_of_two(whole - half);
#endif
    return (Vec)((IntVec)power & ~is_nothing);
}

INLINE float exp_one(float x) { return exp_vec(broadcast(x))[0]; }

INLINE Vec select(IntVec mask, Vec yes, Vec no) {
    return (Vec)(((IntVec)yes & mask) | ((IntVec)no & ~mask));
}

INLINE Vec tanh_vec(Vec x) {
    const Vec size = (Vec)((IntVec)x & 0x7fffffff);
    const Vec far = 1.0f - 2.0f / (exp_vec(size + size) + 1.0f);
    const Vec far_signed = (Vec)((IntVec)far | ((IntVec)x & (int32_t)0x80000000));
    const Vec z = x * x;
    Vec p = broadcast(-5.70498872745e-3f);
    p = fma(p, z, broadcast(2.06390887954e-2f));
    p = fma(p, z, broadcast(-5.37397155531e-2f));
    p = fma(p, z, broadcast(1.33314422036e-1f));
    p = fma(p, z, broadcast(-3.33332819422e-1f));
    const Vec near = fma(p * z, x, x);
    return select((IntVec)(size > 0.625f), far_signed, near);
}

}  // namespace
