"""Which of a prompt's negatives to train on: one small class a selector, pool statistics in, picks out.

A selector is any object with `features` (what the scorer computes for it: "mean", "last", "head" or None),
`needs_scores` (False where it looks at no log-probability) and `__call__(pool) -> Picks`. Chance comes from
`pool.noise_BN` alone, which is keyed by (seed, epoch, example id): larger noise wins a tie.
"""

from massdpo.selection.diversity import Dpp, Farthest, sample_dpp
from massdpo.selection.gram import candidate_gram, hidden_features, reorder, reorder_gram
from massdpo.selection.information import VARIANTS, Adpo, Mass, check_ridge
from massdpo.selection.pools import (
    LOGP_RESOLUTION,
    Selector,
    as_picks,
    check_finite,
    check_options,
    check_pools,
    check_selection,
    noise_order,
    overlap,
    take_best,
    to_resolution,
)
from massdpo.selection.scores import (
    ByScore,
    Dynamic,
    Full,
    Hardest,
    HardestLogp,
    Interleaved,
    Random,
    Sampled,
    hardest_overlap,
)

__all__ = [
    "LOGP_RESOLUTION",
    "VARIANTS",
    "Adpo",
    "ByScore",
    "Dpp",
    "Dynamic",
    "Farthest",
    "Full",
    "Hardest",
    "HardestLogp",
    "Interleaved",
    "Mass",
    "Random",
    "Sampled",
    "Selector",
    "as_picks",
    "candidate_gram",
    "check_finite",
    "check_options",
    "check_pools",
    "check_ridge",
    "check_selection",
    "hardest_overlap",
    "hidden_features",
    "noise_order",
    "overlap",
    "reorder",
    "reorder_gram",
    "sample_dpp",
    "take_best",
    "to_resolution",
]
