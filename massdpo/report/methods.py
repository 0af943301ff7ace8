"""Every method by its name in tables: its place, its colour and marker in figures, and what it does."""

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

GREY = "#6b6b6b"
COLOURS = (  # Okabe and Ito's, safe for colour-blind readers
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#000000"),
)
MARKERS = "osD^vP<X>*hp"
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BROWN, BLACK = COLOURS


@dataclass(frozen=True)
class Method:
    colour: str
    marker: str
    meaning: str
    dashes: str = "-"


METHODS = {  # in the order of tables
    "popularity": Method(GREY, "|", "the popularity of each item in the training data; no model", "--"),
    "lookup": Method(GREY, "_", "what the training data say about the words of a prompt, by table; no model", "-."),
    "sft": Method(GREY, "x", "the SFT start of every run: no preference stage", ":"),
    "random": Method(GREY, "o", "k negatives drawn uniformly, Plackett-Luce loss"),
    "sdpo": Method(
        GREY, "o", "S-DPO (Softmax-DPO, arXiv 2406.09215): k random negatives, Plackett-Luce loss; not TRL's SDPO"
    ),
    "dpo": Method(SKY, "D", "DPO (arXiv 2305.18290): one random negative"),
    "dmpo": Method(SKY, "s", "DMPO (arXiv 2405.16127): k random negatives, their mean reward"),
    "mppo": Method(SKY, "^", "MPPO (arXiv 2412.15244): k random negatives, no reference"),
    "pairwise": Method(SKY, "v", "k random negatives, one pair each"),
    "lipo": Method(SKY, "<", "LiPO-lambda (arXiv 2402.01878): k random negatives, pairs weighted by their ranks"),
    "is_pl": Method(
        *(SKY, "P", "k negatives in proportion to their share of the gradient, Plackett-Luce loss corrected for that")
    ),
    "ndcg": Method(SKY, ">", "ApproxNDCG: k random negatives, one minus a smooth NDCG"),
    "full": Method(BLACK, "s", "the whole pool, Plackett-Luce loss"),
    "hardest": Method(BLUE, "^", "the k negatives with the largest reward"),
    "hardest_logp": Method(BLUE, "v", "the k negatives that the policy itself finds likeliest"),
    "top_random": Method(BLUE, "P", "RoDPO's selection (arXiv 2603.29259): k negatives at random from the 3 k hardest"),
    "sampled": Method(GREEN, "o", "k negatives in proportion to their share of the gradient"),
    "dpp": Method(GREEN, "s", "k negatives sampled from the determinantal point process that mass maximises"),
    "farthest": Method(GREEN, "^", "the k negatives farthest from one another"),
    "coreset": Method(GREEN, "v", "AMPO's coreset (arXiv 2502.18293): the hardest negative of each of k clusters"),
    "medoids": Method(GREEN, "P", "AMPO's medoids (arXiv 2502.18293): k negatives nearest to the weighted pool"),
    "herding": Method(GREEN, "D", "kernel herding: k negatives whose mean matches the whole pool's gradient"),
    "dynamic": Method(
        PINK, "s", "DynamicPO (arXiv 2605.00327): its boundary set, at most k negatives, and its varying beta"
    ),
    "adpo": Method(PINK, "D", "Active DPO (arXiv 2503.01076): k negatives by log-det of pairwise vectors"),
    "interleaved": Method(YELLOW, "D", "three hardness scores take turns in picking k negatives"),
    "mass": Method(ORANGE, "o", "MASS-DPO (arXiv 2605.10784): k negatives by log-det of the Fisher information"),
}
START = "sft"  # label of the start that every run is measured from
UNTRAINED = (START, "popularity", "lookup")  # lines without a preference stage, from the `sft/...` metrics and so on
BASELINES = ("random", "sdpo")  # two names for one thing
OTHERS = [(colour, marker) for marker in "<>hp*X" for colour in (BROWN, PINK, SKY, YELLOW, GREEN, BLUE)]


def method(label: str) -> Method:
    """The entry of a method; one of your own gets a colour and marker from its name, so the same ones everywhere."""
    return METHODS.get(label, Method(*OTHERS[crc32(label.encode()) % len(OTHERS)], "a method of your own"))


def rank_in(known: Iterable[str], name: str) -> tuple[int, str]:
    """To sort by: known names in their order, then the others alphabetically."""
    order = list(known)
    return (order.index(name) if name in order else len(order), name)
