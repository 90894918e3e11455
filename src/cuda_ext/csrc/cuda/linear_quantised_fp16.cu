// linear_quantised of half-precision rows.
#include "linear_quantised.h"

int start_quantised_fp16(const QuantisedLinearArgs& a) { return start_quantised<fp16>(a); }
