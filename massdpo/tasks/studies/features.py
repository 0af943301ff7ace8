"""Do cheap features pick what full gradients would pick?

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), S size of a sketch.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from massdpo.model.features import FEATURES, projected_gradients
from massdpo.model.scoring import PreferenceScorer
from massdpo.selection import Mass, Random, logdet, overlap
from massdpo.store import keyed_seed
from massdpo.tasks.studies.pools import mass_design, value_of
from massdpo.tasks.studies.publish import legend_below, panels, publish, style, with_interval
from massdpo.tensors import Batch, PoolStatistics

RIDGES = (1.0, 0.01)  # relative; the first is the default of selector=mass
SKETCH = 4_096  # numbers that a gradient is projected to: inner products to about 1.6% of the norms
MEASURED = {
    "overlap": "overlap with full gradients' picks (Jaccard)",
    "logdet_share": "share of full gradients' best log-det",
}


def features(
    out: Path,
    models: Callable[[int], Mapping[str, nn.Module]],
    batches: Sequence[Batch],
    beta: float,
    k: int,
    seeds: Sequence[int],
    sketch: int = SKETCH,
) -> pd.DataFrame:
    """Compare picks by `mean`, `last` and `head` features, by full gradients and at random, prompt by prompt.

    `models(seed)` are models by stage, the first of them the reference (say, `before` and `after` training). Measured
    are the Jaccard overlap with the picks by gradients, and the share of the best log-det under gradients (by `swap`).
    """
    rows = []
    for seed in seeds:
        stages = {stage: PreferenceScorer(model.eval()) for stage, model in models(seed).items()}
        for batch in batches:
            reference_BC = None
            for stage, scorer in stages.items():
                pools = pools_by_features(scorer, batch, reference_BC, beta, sketch, seed)
                reference_BC = pools["gradient"].ref_logp_BC
                for ridge in RIDGES:
                    rows += [{"ridge": ridge, "seed": seed, "stage": stage, **row} for row in compared(pools, k, ridge)]
    frame = pd.DataFrame(rows)
    by_seed = frame.groupby(["ridge", "stage", "features", "seed"], sort=False)[list(MEASURED)].mean().reset_index()
    table = with_interval(by_seed, ["ridge", "stage", "features"], MEASURED)
    table = table.sort_values("ridge", kind="stable", ascending=False)
    figure, grid = panels(2 * len(RIDGES))
    kinds = list(table["features"].unique())
    for panel, (ridge, value) in zip(grid, itertools.product(RIDGES, MEASURED), strict=True):
        for place, stage in enumerate(table["stage"].unique()):
            part = table[(table["ridge"] == ridge) & (table["stage"] == stage)]
            at = [kinds.index(kind) + 0.16 * place - 0.08 for kind in part["features"]]
            line: dict[str, Any] = {"linestyle": "none", "capsize": 2, "label": f"{stage} training"}
            panel.errorbar(at, part[value], part[f"{value} ±"], **line, **style(place))
        panel.set_xticks(range(len(kinds)), kinds)
        panel.set(
            xlabel="features that the picks are made with", ylabel=MEASURED[value], title=f"ridge {ridge:g}, k={k}"
        )
    legend_below(figure, grid[0])
    note = (
        f"k={k}; {frame['prompt'].nunique()} prompts under the policy of each of {len(seeds)} training seeds: mean ± "
        "half-width of the 95% t interval over the seeds. `overlap`: Jaccard, with the picks that full gradients make. "
        "`logdet_share`: of the best log-det (by swap) under full gradients. The ridge is relative; 1 is the default."
    )
    publish(out, "features", frame, table, figure, note)
    return frame


def pools_by_features(
    scorer: PreferenceScorer, batch: Batch, reference_BC: Tensor | None, beta: float, sketch: int, seed: int
) -> dict[str, PoolStatistics]:
    """The batch's pools with features of each kind; without `reference_BC` the model itself is the reference."""
    parameters = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    scorer.features = None
    scores = scorer(batch).scores
    logp_BC = scores.logp_BC.detach()
    reference_BC = logp_BC if reference_BC is None else reference_BC
    noise = torch.Generator().manual_seed(keyed_seed("features", seed, list(batch.ids)))
    noise_BN = torch.rand(batch.mask_BC[:, 1:].shape, generator=noise).to(scores.logp_BC.device)
    sketches = [projected_gradients(logp_C, parameters, sketch, seed) for logp_C in scores.logp_BC]
    gradient_BCC = torch.stack([sketch_CS.double() @ sketch_CS.double().T for sketch_CS in sketches])
    scored = {"gradient": replace(scores, logp_BC=logp_BC, gram_BCC=gradient_BCC)}
    for name in FEATURES:
        scorer.features = name
        with torch.no_grad():
            scored[name] = scorer(batch).scores
    return {name: PoolStatistics(part, reference_BC, beta, noise_BN, batch.ids) for name, part in scored.items()}


def compared(pools: Mapping[str, PoolStatistics], k: int, ridge: float) -> list[dict[str, Any]]:
    """One row per prompt and kind of features: overlap and share of the best log-det under full gradients."""
    # Gradients come as inner products, which is where a selector finds features of the head.
    fields = {name: "head" if name == "gradient" else name for name in pools}
    picks = {name: Mass(k, features=fields[name], ridge=ridge, short_pool="all")(pool) for name, pool in pools.items()}
    picks["random"] = Random(k, short_pool="all")(pools["gradient"])
    gram_BNN, ridge_B = mass_design(pools["gradient"], "head")
    ridge_B, mask_BN = ridge * ridge_B, pools["gradient"].mask_BN
    best_B = logdet.select_logdet_gram(gram_BNN, k, ridge_B, mask_BN=mask_BN, solver="swap").logdet_B
    rows = []
    for name, selection in picks.items():
        same_B, share_B = overlap(selection, picks["gradient"]), value_of(gram_BNN, ridge_B, selection) / best_B
        for prompt, same, share in zip(pools["gradient"].ids, same_B.tolist(), share_B.tolist(), strict=True):
            rows.append({"features": name, "prompt": prompt, "overlap": same, "logdet_share": share})
    return rows
