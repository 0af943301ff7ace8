"""Selection against the published algorithm: a d x d inverse per prompt with Sherman-Morrison updates, O(k N d^2).

`python -m massdpo.benchmark selection` writes selection.json, and the growth over d, N and k as a table and a figure.
Suffixes: B prompts, N pool negatives, K selected, D features.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor

from massdpo.benchmark.measure import alternate, medians, origin
from massdpo.report.figures import save_pictures
from massdpo.selection.logdet import design_vectors, select_logdet
from massdpo.store import write_json, write_text

DIMENSIONS = (64, 128, 256, 512, 1024, 2048)
POOLS = (10, 20, 50, 100, 200)
PICKS = (1, 2, 4, 8, 16)


def sherman_morrison(vectors_BND: Tensor, k: int, ridge: float) -> Tensor:
    """The published greedy, one prompt after the other: picks `(B, K)`."""
    return torch.cat([sherman_morrison_batched(vectors_1ND, k, ridge) for vectors_1ND in vectors_BND.split(1)])


def sherman_morrison_batched(vectors_BND: Tensor, k: int, ridge: float) -> Tensor:
    """The same for all prompts of the batch at once; holds B inverses of D x D."""
    batch, _, size = vectors_BND.shape
    inverse_BDD = torch.eye(size, dtype=vectors_BND.dtype).repeat(batch, 1, 1) / ridge
    rows_B = torch.arange(batch)
    open_BN = torch.ones(vectors_BND.shape[:2], dtype=torch.bool)
    picked = []
    for step in range(k):
        weighted_BND = vectors_BND @ inverse_BDD
        gain_BN = (weighted_BND * vectors_BND).sum(-1)
        index_B = gain_BN.masked_fill(~open_BN, -torch.inf).argmax(-1)
        picked.append(index_B)
        if step == k - 1:
            break
        open_BN[rows_B, index_B] = False
        direction_BD1 = weighted_BND[rows_B, index_B][..., None]
        shrink_B11 = 1.0 / (1.0 + gain_BN[rows_B, index_B])[:, None, None]
        inverse_BDD.baddbmm_(direction_BD1 * -shrink_B11, direction_BD1.mT)
    return torch.stack(picked, dim=1)


def problem(batch: int, pool: int, size: int) -> tuple[Tensor, float]:
    """Design vectors of random features, float64, and a ridge of their mean squared length."""
    noise = torch.Generator().manual_seed(0)
    features_BCD = torch.randn(batch, pool + 1, size, generator=noise)
    rewards_BC = torch.randn(batch, pool + 1, generator=noise)
    vectors_BND, _ = design_vectors(features_BCD, rewards_BC, 0.5)
    return vectors_BND, float(vectors_BND.square().sum(-1).mean())


def median_seconds(action: Callable[[], object], rounds: int) -> float:
    """Median wall-clock seconds of `rounds` calls after a warm-up call."""
    return medians(alternate({"action": action}, rounds))["action"]


def compare(batch: int = 64, pool: int = 20, size: int = 2048, k: int = 4, rounds: int = 5) -> dict[str, Any]:
    """Both algorithms on one problem, warm, in alternation: milliseconds per prompt, speed-ups, equal picks or not.

    Both in float64, for the picks alone; `greedy_certified` adds the proved upper bound, which the published algorithm
    lacks. The latter is also timed in float32, and with prompts batched by 16 (an inverse of 2,048 x 2,048 is 34 MB).
    """
    vectors_BND, ridge = problem(batch, pool, size)
    single_BND = vectors_BND.float()
    exact_BND = vectors_BND[:16]
    sides: dict[str, Callable[[], object]] = {
        "greedy": lambda: median_seconds(lambda: select_logdet(vectors_BND, k, ridge, certify=False), 4 * rounds),
        "greedy_certified": lambda: median_seconds(lambda: select_logdet(vectors_BND, k, ridge), 4 * rounds),
        "greedy_float32_input": lambda: median_seconds(
            lambda: select_logdet(single_BND, k, ridge, certify=False), 4 * rounds
        ),
        "exact": lambda: median_seconds(lambda: select_logdet(exact_BND, k, ridge, solver="exact"), rounds),
        "sherman_morrison": lambda: sherman_morrison(vectors_BND, k, ridge),
        "sherman_morrison_float32": lambda: sherman_morrison(single_BND, k, ridge),
        "sherman_morrison_batched": lambda: [
            sherman_morrison_batched(part_BND, k, ridge) for part_BND in vectors_BND.split(16)
        ],
    }
    seconds = medians(alternate(sides, rounds))
    per_prompt = {name: 1e3 * second / (16 if name == "exact" else batch) for name, second in seconds.items()}
    ours_BK = select_logdet(vectors_BND, k, ridge).indices_BK
    return {
        "prompts": batch,
        "pool": pool,
        "dimension": size,
        "k": k,
        "same_picks": bool(torch.equal(ours_BK, sherman_morrison(vectors_BND, k, ridge))),
        "speedup_vs_sherman_morrison": seconds["sherman_morrison"] / seconds["greedy"],
        "certified_speedup_vs_sherman_morrison": seconds["sherman_morrison"] / seconds["greedy_certified"],
        "speedup_vs_sherman_morrison_batched": seconds["sherman_morrison_batched"] / seconds["greedy"],
        "speedup_vs_sherman_morrison_float32": seconds["sherman_morrison_float32"] / seconds["greedy_float32_input"],
        **{f"{name}_ms_per_prompt": milliseconds for name, milliseconds in per_prompt.items()},
    }


def growth(
    batch: int,
    dimensions: tuple[int, ...] = DIMENSIONS,
    pools: tuple[int, ...] = POOLS,
    picks: tuple[int, ...] = PICKS,
    rounds: int = 3,
) -> pd.DataFrame:
    """Milliseconds per prompt over d (N=20, k=4), N (d=512, k=4) and k (d=512, N=20)."""
    middle = dimensions[len(dimensions) // 2]
    cases: list[tuple[str, int, int, int]] = [("d", size, 20, 4) for size in dimensions]
    cases += [("N", middle, pool, 4) for pool in pools]
    cases += [("k", middle, 20, k) for k in picks]
    rows = []
    for axis, size, pool, k in cases:
        vectors_BND, ridge = problem(batch, pool, size)
        for algorithm, picks_of in (("greedy", select_logdet), ("sherman_morrison", sherman_morrison)):
            milliseconds = 1e3 * median_seconds(partial(picks_of, vectors_BND, k, ridge), rounds) / batch
            row = {"axis": axis, "d": size, "N": pool, "k": k, "algorithm": algorithm, "ms_per_prompt": milliseconds}
            rows.append(row)
    return pd.DataFrame(rows)


def draw_growth(frame: pd.DataFrame, out: Path) -> None:
    """One panel per axis, both algorithms, logarithmic, as PNG and SVG."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    names = {"sherman_morrison": "published (d x d inverse)", "greedy": "Gram form (here), certified"}
    titles = {"d": "features d (N=20, k=4)", "N": "pool N (k=4)", "k": "picked k (N=20)"}
    for panel, (axis, title) in zip(panels, titles.items(), strict=True):
        part = frame[frame["axis"] == axis]
        for algorithm, name in names.items():
            line = part[part["algorithm"] == algorithm]
            panel.plot(line[axis], line["ms_per_prompt"], marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel=title)
        panel.set_xticks(line[axis], line[axis].map(str))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds per prompt")
    panels[0].legend()
    save_pictures(figure, out / "selection_growth")


def run(out: Path) -> None:
    """Measure and write `selection.json` and `selection_growth.csv/png/svg` into the folder `out`."""
    result = {**compare(), **origin()}
    for key, value in result.items():
        print(f"{key:40} {value:.4g}" if isinstance(value, float) else f"{key:40} {value}")
    write_json(out / "selection.json", result)
    frame = growth(batch=8)
    write_text(out / "selection_growth.csv", frame.to_csv(index=False, lineterminator="\n"))
    draw_growth(frame, out)
