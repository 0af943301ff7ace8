"""Limits of search and memory, read as `limits.NAME`, so that a change here takes effect in every file."""

EXACT_LIMIT = 200_000  # subsets per prompt that `exact` enumerates; C(20, 4) is 4,845
DENSE_POOL = 1_000  # above this many candidates no N x N matrix is built
SPECTRUM_POOL = 50  # above this many the eigenvalue bound, of order N^3, costs more than greedy itself and is left out
CHUNK_NUMBERS = 1 << 20  # float64 numbers held at a time while subsets are enumerated
CACHE_NUMBERS = 1 << 17  # float64 numbers, 1 MB, that fit a CPU core's cache
