"""Two small worlds made on the spot: large enough that the choice of negatives matters, small enough for a laptop.

Both depend on `seed` alone: every draw has a generator keyed by the seed and by what is drawn, so that asking for more
training prompts does not change the validation and test prompts.
"""

from massdpo.data.readers.synthetic.knowledge import SyntheticMCQA
from massdpo.data.readers.synthetic.viewers import SyntheticRec
