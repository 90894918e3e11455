// linear_quantised on the tiles of AMX (Intel, "Intel Architecture Instruction Set Extensions", chapter 3), with results
// equal to the bit to those of the other levels: a tile holds the exact sums of one block of inputs.
#pragma once

#include "linear_plan.h"
#include "shoal_cpu.h"

void linear_quantised_amx(const QuantisedLinearArgs& a, const QuantisedSpan& span);
