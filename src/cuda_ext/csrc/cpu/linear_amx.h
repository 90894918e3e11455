// linear with bfloat16 weights on the tiles of AMX (tile_product.h); the bias comes last. Rows depend neither on one another nor
// on threads; other levels, which multiply all 24 bits of x, differ by rounding.
#pragma once

#include "shoal_cpu.h"

// The launcher; returns a status.
int linear_amx(const LinearArgs& a);
