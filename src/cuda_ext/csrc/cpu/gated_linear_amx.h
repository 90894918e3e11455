// activation(x · gateᵀ + bias) · (x · upᵀ + bias) with integer weights on the tiles of AMX: the products of linear
// (linear_integers_amx.h) and the values of gated_activation, to the bit, rounded to bfloat16 where the next product wants
// them: as its tiles of rows.
#pragma once

#include "shoal_cpu.h"

// The launcher; returns a status.
int gated_linear_amx(const GatedLinearArgs& a);
