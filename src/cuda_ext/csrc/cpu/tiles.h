// What the kernels on the tiles of AMX share (Intel, "Intel Architecture Instruction Set Extensions", chapter 3).
#pragma once

#include <cstdint>

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileLine = 64;  // bytes of a tile's row
constexpr int64_t kStrip = 32;     // inputs in bfloat16 that a tile takes

typedef uint16_t Narrow;  // the bits of a bfloat16

static inline int64_t strips_of(int64_t inputs) { return (inputs + kStrip - 1) / kStrip; }

// Whether this processor has tiles of int8 and of bfloat16, and AVX-512's bfloat16 and VBMI2, and the system lets this process use them.
bool tiles_are_usable();

// What _tile_loadconfig reads: palette 1, the bytes of a row and the rows of each of the eight tiles.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t count, int64_t bytes) {
        rows[tile] = uint8_t(count);
        row_bytes[tile] = uint16_t(bytes);
    }
};
