"""Which of a prompt's negatives to train on: one small class per selector, pool statistics in, picks out.

A selector is any object with `features` (what the scorer computes for it: "mean", "last", "head" or None),
`needs_scores` (False where it looks at no log-probability) and `__call__(pool) -> Picks`. Chance comes from
`pool.noise_BN` alone, which is keyed by (seed, epoch, example id): larger noise wins a tie.
"""

from massdpo.selection.diversity import Dpp, Farthest
from massdpo.selection.information import Adpo, Mass
from massdpo.selection.pools import Selector, check_selection, overlap, take_best
from massdpo.selection.representatives import Coreset, Herding, Medoids
from massdpo.selection.scores import (
    Dynamic,
    Full,
    Hardest,
    HardestLogp,
    Interleaved,
    Random,
    Sampled,
    TopRandom,
    hardest_overlap,
)
