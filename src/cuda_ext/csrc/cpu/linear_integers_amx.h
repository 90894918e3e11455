// linear with integer weights on the tiles of AMX: activations and weights become bfloat16 on their way (tile_weights.h), and
// each result is one chain: for each 32 inputs their products, added up in float32 as TDPBF16PS does it, the bias last. It
// depends neither on the other rows nor on threads; other levels, which multiply integers, differ by rounding.
#pragma once

#include "shoal_cpu.h"

// Launchers; they return a status. The second one takes rows that gated_linear made bfloat16.
int linear_integers_amx(const LinearArgs& a);
int linear_narrow_amx(const QuantisedLinearArgs& a);
