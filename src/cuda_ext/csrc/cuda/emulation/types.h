// The narrow floats, by their bits; conversions round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

// E4M3 without infinities.
struct fp8 {
    uint8_t bits;
};

inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float to_float(fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) return float_of(sign | 0x7f800000 | (rest & 0x007fffff));
    // The exponent's bias differs by 112; multiplying takes care of subnormals.
    return float_of(bits_of(float_of(rest) * 0x1p112f) | sign);
}

inline float to_float(fp8 x) {
    const uint32_t sign = uint32_t(x.bits & 0x80) << 24, rest = uint32_t(x.bits & 0x7f) << 20;
    if ((x.bits & 0x7f) == 0x7f) return float_of(sign | 0x7fc00000);
    return float_of(bits_of(float_of(rest) * 0x1p120f) | sign);
}

template <typename T>
T from_float(float x);

template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// A magnitude, given by its bits, in units of 2^-``places`` times 2^its exponent where that is at least ``least``.
inline uint32_t rounded(uint32_t bits, int mantissa, int least) {
    const int exponent = int(bits >> 23) - 127, drop = 23 - mantissa + (exponent < least ? least - exponent : 0);
    const uint64_t whole = drop > 40 ? 0 : (uint64_t(bits & 0x7fffff) | 0x800000);
    const uint64_t half = uint64_t(1) << (drop > 40 ? 40 : drop), kept = whole / half, rest = whole % half;
    const uint64_t up = rest * 2 > half || (rest * 2 == half && kept % 2 == 1);
    const uint32_t base = exponent < least ? 0 : uint32_t(exponent - least) << mantissa;
    return base + uint32_t(kept + up);
}

template <>
inline fp16 from_float<fp16>(float x) {
    const uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (size > 0x7f800000) return {0x7fff};
    const uint32_t code = size < 0x00800000 ? 0 : rounded(size, 10, -14);
    return {uint16_t(sign | (code > 0x7c00 ? 0x7c00 : code))};
}

// Beyond the range: the largest.
template <>
inline fp8 from_float<fp8>(float x) {
    const uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
    const uint8_t sign = uint8_t(bits >> 24 & 0x80);
    if (size > 0x7f800000) return {0x7f};
    const uint32_t code = size < 0x00800000 ? 0 : rounded(size, 3, -6);
    return {uint8_t(sign | (code > 0x7e ? 0x7e : code))};
}
