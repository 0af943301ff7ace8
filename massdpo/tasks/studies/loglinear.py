"""When does selecting pay? The setting of the theory: a log-linear policy, known theta*, Plackett-Luce choices.

Suffixes: B prompts, C candidates (column 0 is the chosen one), D features.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from massdpo.selection import Adpo, Full, Hardest, Mass, Random, Sampled, Selector
from massdpo.store import keyed_seed
from massdpo.tasks.studies.pools import clustered_pools, pools_of
from massdpo.tasks.studies.publish import panels, publish, style, with_interval

CASE = ["rounds", "prompts", "k"]
MEASURED = {"max_error": "maximum relative logit error", "mean_error": "mean relative logit error"}
WIDTH, FRESH = 10, 500  # features of a candidate; pools that errors are measured on
PRIOR = 1e-2
APART = "max_error less random"
CORRECTED = "sampled, is_pl"


def loglinear(
    out: Path,
    seeds: int = 40,
    prompts: Sequence[int] = (25, 50, 100, 200, 400, 800),
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    middle: tuple[int, int] = (100, 4),
    rounds: Sequence[int] = (1, 3),
    size: int = 20,
) -> pd.DataFrame:
    """Fit by maximum likelihood on the selected subsets and measure how far the logits are from the true ones.

    The chosen response is drawn from the softmax of phi . theta* (|theta*| = 1) over pools of clustered features. With
    `rounds` = 1 negatives are selected once, under the uniform reference; with more, after each fit too. `sampled` is
    fitted twice, the second time corrected for how its negatives were drawn (the loss is_pl).
    Errors are of the logits of fresh pools about their mean, relative to the largest (`max_error`) or the mean
    (`mean_error`) true one: over the number of prompts at k = middle[1], and over k at middle[0] prompts. Differences
    from random's are paired: the same world.
    """
    rows = []
    for count, k in sorted({(count, middle[1]) for count in prompts} | {(middle[0], k) for k in ks}):
        rivals: dict[str, Selector] = {"mass": Mass(k), "adpo": Adpo(k), "random": Random(k), "hardest": Hardest(k)}
        rivals |= {"full": Full(), "sampled": Sampled(k), CORRECTED: Sampled(k)}
        for seed in range(seeds):
            world = LoglinearWorld(count, size, seed, strength=1.0)
            for name, selector in rivals.items():
                for turns, theta_D in zip(rounds, world.fits(selector, rounds, name == CORRECTED), strict=True):
                    case = {"rounds": turns, "prompts": count, "k": k, "selector": name, "seed": seed}
                    rows.append({**case, **world.errors(theta_D)})
    frame = pd.DataFrame(rows)
    random = frame[frame["selector"] == "random"].set_index([*CASE, "seed"])["max_error"]
    frame = frame.join(random.rename("random"), on=[*CASE, "seed"])
    frame[APART] = frame["max_error"] - frame.pop("random")
    table = with_interval(frame, [*CASE, "selector"], [*MEASURED, APART])
    table = table.sort_values(CASE, kind="stable")
    figure, grid = panels(4 * len(rounds))
    for row, (turns, value) in enumerate(itertools.product(rounds, MEASURED)):
        part = table[table["rounds"] == turns]
        start = "selected once" if turns == 1 else f"selected {turns} times"
        _draw(grid[2 * row], part[part["k"] == middle[1]], "prompts", value, f"{start}, k={middle[1]}")
        _draw(grid[2 * row + 1], part[part["prompts"] == middle[0]], "k", value, f"{start}, {middle[0]} prompts")
    grid[0].legend(fontsize=7)
    note = (
        f"Mean of {seeds} worlds ± half-width of the 95% t interval. Errors are relative to the true logits: 1 is as "
        "bad as knowing nothing. Selected once, under the uniform reference, all scores tie and `hardest` is `random`. "
        f"`{APART}` is paired by world: below 0, the selector beats random. Fitted as if drawn uniformly, "
        f"picks that depend on the outcome lead away from the truth however many prompts there are; `{CORRECTED}`, "
        "corrected for its draws, goes to it."
    )
    publish(out, "loglinear", frame, table, figure, note)
    return frame


def _draw(panel: Axes, part: pd.DataFrame, axis: str, value: str, title: str) -> None:
    for place, name in enumerate(part["selector"].unique()):
        line = part[part["selector"] == name]
        panel.errorbar(line[axis], line[value], line[f"{value} ±"], label=name, **style(place))
    label = {"prompts": "prompts", "k": "negatives picked, k"}[axis]
    panel.set(xscale="log", yscale="log", xlabel=label, ylabel=MEASURED[value], title=title)
    numbers = sorted(part[axis].unique())
    panel.set_xticks(numbers, [str(number) for number in numbers])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


class LoglinearWorld:
    """One draw of theta*, training pools with choices, and fresh pools to measure on."""

    def __init__(self, prompts: int, size: int, seed: int, strength: float):
        noise = torch.Generator().manual_seed(keyed_seed("loglinear", seed))  # the same theta* for every case of a seed
        direction_D = torch.randn(WIDTH, generator=noise, dtype=torch.float64)
        self.theta_D = strength * direction_D / direction_D.norm()
        self.fresh_BCD = _features(FRESH, size, keyed_seed("fresh", seed))
        features_BCD = _features(prompts, size, keyed_seed("train", seed))
        noise = torch.Generator().manual_seed(keyed_seed("choices", seed, prompts))
        chance_BC = (features_BCD @ self.theta_D).softmax(-1)
        chosen_B1 = torch.multinomial(chance_BC, 1, generator=noise)
        order_BC = torch.arange(size + 1).expand(prompts, -1).clone()
        order_BC.scatter_(1, chosen_B1, 0)
        order_BC[:, 0] = chosen_B1[:, 0]
        self.features_BCD = features_BCD.gather(1, order_BC[..., None].expand_as(features_BCD))
        self.seed = seed

    def fits(self, selector: Selector, rounds: Sequence[int], corrected: bool = False) -> list[Tensor]:
        """Select with the current policy, fit, and repeat: theta after each of these numbers of rounds."""
        theta_D = torch.zeros_like(self.theta_D)
        after = {}
        for turn in range(1, max(rounds) + 1):
            logits_BC = self.features_BCD @ theta_D
            noise = torch.Generator().manual_seed(keyed_seed("selection", self.seed, turn))
            noise_BN = torch.rand(logits_BC[:, 1:].shape, generator=noise)
            picks = selector(pools_of(self.features_BCD.float(), logits_BC, noise_BN, beta=1.0))
            chosen_BCD = self.features_BCD.gather(1, picks.column_BC[..., None].expand(-1, -1, len(theta_D)))
            offset_BC = None
            if corrected:
                assert picks.log_inclusion_BK is not None
                offset_BC = torch.nn.functional.pad(-picks.log_inclusion_BK, (1, 0))
            theta_D = maximum_likelihood(chosen_BCD, offset_BC)
            after[turn] = theta_D
        return [after[turn] for turn in rounds]

    def errors(self, theta_D: Tensor) -> dict[str, float]:
        """Maximum and mean relative error of the fresh pools' logits about their mean."""
        centred_BCD = self.fresh_BCD - self.fresh_BCD.mean(1, keepdim=True)
        true_BC, error_BC = (centred_BCD @ self.theta_D).abs(), (centred_BCD @ (theta_D - self.theta_D)).abs()
        return {
            "max_error": float(error_BC.max() / true_BC.max()),
            "mean_error": float(error_BC.mean() / true_BC.mean()),
        }


def _features(prompts: int, size: int, seed: int) -> Tensor:
    pools = clustered_pools(prompts, size, seed, WIDTH)
    assert pools.scores.features_BCD is not None
    return pools.scores.features_BCD.double()


def maximum_likelihood(features_BCD: Tensor, offset_BC: Tensor | None = None) -> Tensor:
    """theta `(D,)` that makes column 0 likeliest under softmax(features . theta + offset), by Newton's halved steps.

    A prior (PRIOR / 2 |theta|^2, of the weight of a hundredth of a prompt) keeps it finite where the data separate.
    """
    features_BCD = features_BCD.double()
    offset_BC = torch.zeros_like(features_BCD[..., 0]) if offset_BC is None else offset_BC
    theta_D = features_BCD.new_zeros(features_BCD.shape[-1])

    def loss(theta_D: Tensor) -> Tensor:
        return -(features_BCD @ theta_D + offset_BC).log_softmax(-1)[:, 0].sum() + PRIOR / 2 * theta_D @ theta_D

    for _ in range(100):
        share_BC = (features_BCD @ theta_D + offset_BC).softmax(-1)
        mean_BD = torch.einsum("bc,bcd->bd", share_BC, features_BCD)
        gradient_D = (mean_BD - features_BCD[:, 0]).sum(0) + PRIOR * theta_D
        hessian_DD = torch.einsum("bc,bcd,bce->de", share_BC, features_BCD, features_BCD) - mean_BD.T @ mean_BD
        hessian_DD = hessian_DD + PRIOR * torch.eye(len(theta_D), dtype=theta_D.dtype)
        step_D = torch.linalg.solve(hessian_DD, gradient_D)
        decrease, length = gradient_D @ step_D, 1.0
        if decrease < 1e-14:
            break
        while loss(theta_D - length * step_D) > loss(theta_D) - 1e-4 * length * decrease and length > 1e-10:
            length /= 2
        theta_D = theta_D - length * step_D
    return theta_D
