// Compiled once a level, with that level's instruction set and SHOAL_LEVEL naming its table.
#include "level.h"

#include "embed.h"
#include "gated_activation.h"
#include "linear.h"
#include "linear_quantised.h"
#include "paged_attention.h"
#include "quantise.h"
#include "rms_norm.h"
#include "rope_write_kv.h"
#include "weigh_logits.h"

extern const Level SHOAL_LEVEL = {
    rms_norm,
    add_rms_norm,
    rope_write_kv,
    gated_activation,
    embed<false>,
    embed<true>,
    pack_weight,
    lay_tiles,
    linear,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    find_outliers,
    linear_quantised,
    quantise,
    kMostRows,
    false,
    paged_attention,
    find_peak,
    weigh_logits,
    collect,
};
