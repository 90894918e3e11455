// Some rows of a matrix, one behind the other. No more than memory moves, so one thread does it.
#include <cstring>

#include "shoal_cpu.h"

extern "C" EXPORT int shoal_take_rows(const TakeRowsArgs* a) {
    const auto* x = static_cast<const char*>(a->x);
    auto* out = static_cast<char*>(a->out);
    for (int64_t i = 0; i < a->count; i++, out += a->row_bytes) {
        const int64_t row = a->rows[i];
        if (row >= 0 && row < a->x_rows) std::memcpy(out, x + row * a->row_stride, a->row_bytes);
    }
    return kOk;
}
