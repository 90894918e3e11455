// What drawing a token asks of the level's kernels.
#pragma once

#include <cstdint>

constexpr int64_t kDrawBlock = 256;  // weights that are summed together

struct Peak {
    float value;
    int64_t id;  // -1: the row holds NaN or +inf, or nothing above -inf
};

struct Candidate {
    float weight;
    int32_t id;
};
