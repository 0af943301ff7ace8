"""Fisher information of a Plackett-Luce preference, and the subsets of negatives with the largest log-determinant.

Everything is batched over prompts and never builds a D x D matrix: with A = (scale / ridge) V V^T,
`log det(ridge I + scale sum_S v_i v_i^T) - D log ridge = log det(I + A_S)`, which `greedy`, `swap` and `exact` make
large for the design objective of MASS-DPO (arXiv 2605.10784). The small factor is float64 whatever the inputs are.
"""

from massdpo.selection.logdet import limits
from massdpo.selection.logdet.arguments import check_exact, check_name
from massdpo.selection.logdet.design import design_gram, design_vectors, inner_products, mean_square, unit_gram
from massdpo.selection.logdet.greedy import LogdetSelection
from massdpo.selection.logdet.solve import SOLVERS, select_logdet, select_logdet_gram
from massdpo.selection.logdet.subset import select_subset_fisher
