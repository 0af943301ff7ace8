"""The picture of one prompt: its candidates' ranks before and after, what selectors take, how similar candidates are.

Suffixes: C = 1 + N candidates (column 0 is the chosen one).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from massdpo.report.methods import BLUE, GREY, ORANGE
from massdpo.store import replacing


@dataclass
class Prompt:
    """What is known of a prompt's candidates; picks are places in the pool, counted from 0, in pick order."""

    responses: Sequence[str]  # of the candidates, shortened
    before_C: Sequence[int]  # their ranks under the SFT start, 1 the likeliest per token
    after_C: Sequence[int]  # under the trained policy
    cosine_CC: Tensor  # of the hidden states, centred on the pool's mean
    takes: Mapping[str, Sequence[int]]  # by selector
    trained_on: Sequence[int]  # the run's own picks; empty for a test prompt

    @property
    def names(self) -> list[str]:
        """Of the candidates: negatives by their place in the pool."""
        return ["chosen", *map(str, range(len(self.responses) - 1))]


def draw_prompt(prompt: Prompt, title: str, file: Path) -> None:
    """Write the picture as a PNG."""
    size = len(prompt.responses)
    figure = Figure(figsize=(15, 2.2 + 0.27 * max(size, len(prompt.takes))), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=10, fontweight="bold")
    ranks, takes, alike = figure.subplots(1, 3, width_ratios=(1.2, 1, 1.1))
    _ranks(ranks, prompt)
    order = sorted(range(size), key=lambda place: prompt.after_C[place])
    _takes(takes, prompt, [place for place in order if place])
    _similarity(alike, prompt, order)
    with replacing(file) as beside:
        figure.savefig(beside, format="png", dpi=120)


def _ranks(axes: Axes, prompt: Prompt) -> None:
    """A line per candidate from its rank at the start to its rank now."""
    for place, (name, response) in enumerate(zip(prompt.names, prompt.responses, strict=True)):
        picked = place - 1 in prompt.trained_on
        colour = BLUE if place == 0 else ORANGE if picked else GREY
        width = 2.2 if place == 0 or picked else 0.9
        heights = [prompt.before_C[place], prompt.after_C[place]]
        axes.plot([0, 1], heights, marker="o", markersize=4, color=colour, linewidth=width)
        text = f"{name}  {response}".replace("$", r"\$")
        axes.text(1.04, prompt.after_C[place], text, va="center", fontsize=8, color=colour)
    axes.set_xlim(-0.1, 2.2)
    axes.set_ylim(len(prompt.names) + 0.5, 0.5)
    axes.set_xticks([0, 1], ["SFT start", "trained"])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    what = "blue: chosen" + (", orange: picked in training" if prompt.trained_on else "")
    axes.set_title(f"rank by log-prob per token ({what})", loc="left", fontsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _takes(axes: Axes, prompt: Prompt, order: Sequence[int]) -> None:
    """Selectors by negatives, likeliest first: a number is the place in the selector's pick order."""
    rows = dict(prompt.takes) | ({"in training": prompt.trained_on} if prompt.trained_on else {})
    taken = np.zeros((len(rows), len(order)))
    for row, picks in enumerate(rows.values()):
        for number, pick in enumerate(picks):
            column = order.index(pick + 1)
            taken[row, column] = 1
            axes.text(column, row, str(number + 1), ha="center", va="center", fontsize=7)
    axes.imshow(taken, cmap="Oranges", vmin=0, vmax=2, aspect="auto")
    axes.set_xticks(range(len(order)), [prompt.names[place] for place in order], fontsize=7)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_xlabel("place in the pool, likeliest first", fontsize=8)
    axes.set_title("what each selector would take now, in pick order", loc="left", fontsize=9)


def _similarity(axes: Axes, prompt: Prompt, order: Sequence[int]) -> None:
    labels = [prompt.names[place] for place in order]
    image = axes.imshow(prompt.cosine_CC[order][:, order].numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(order)), labels, fontsize=7, rotation=90)
    axes.set_yticks(range(len(order)), labels, fontsize=7)
    axes.set_title("similarity: cosine of hidden states, centred on the pool's mean", loc="left", fontsize=9)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
