"""Four studies of selection itself: how good greedy is, which features agree, when to select again, when it pays.

Each takes plain arguments and writes `<study>.csv` (rows), `<study>.md` (table) and `<study>.png/svg` into a folder.
Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, D features.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

from massdpo import fisher
from massdpo.batch import Batch, Picks, PoolStatistics, Scores
from massdpo.features import projected_gradients
from massdpo.report.figures import COLOURS, MARKERS, STYLE
from massdpo.scoring import PreferenceScorer
from massdpo.selectors import Adpo, Full, Hardest, Mass, Random, Selector, candidate_gram, overlap
from massdpo.store import keyed_seed, replacing, write_text

# optimality ----------------------------------------------------------------------------------------------------------


def optimality(
    out: Path,
    ks: Sequence[int] = (1, 2, 3, 4, 6),
    pools: Sequence[int] = (8, 12, 16, 20),
    prompts: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How far `greedy` and `swap` are from the optimum of the log-det, and how far from it they could prove to be.

    Random pools of clustered features and random rewards, the design of `selector=mass` with its defaults; `random` is
    there as the other end. Ratios are to the optimum found by `exact`; the certified one needs no optimum.
    """
    rows = []
    for size in pools:
        pool = clustered_pools(prompts, size, seed)
        gram_BNN, ridge_B = mass_design(pool)
        for k in (k for k in ks if k <= size):
            best_B = fisher.select_logdet_gram(gram_BNN, k, ridge_B, solver="exact").logdet_B
            for solver in ("greedy", "swap"):
                solved = fisher.select_logdet_gram(gram_BNN, k, ridge_B, solver=solver)
                rows.append(_ratios(size, k, solver, solved.logdet_B, best_B, solved.certified_ratio_B))
            value_B = value_of(gram_BNN, ridge_B, Random(k)(pool))
            rows.append(_ratios(size, k, "random", value_B, best_B, torch.full_like(best_B, math.nan)))
    frame = pd.DataFrame(rows)
    figure, panels = _panels(2)
    shown = {"worst_ratio": "worst share of the optimum", "certified_ratio": "mean share proved"}
    for panel, (value, title) in zip(panels, shown.items(), strict=True):
        for place, size in enumerate(pools):
            for solver, line in (("greedy", "-"), ("swap", "--")):
                part = frame[(frame["N"] == size) & (frame["solver"] == solver)]
                colour, marker, label = COLOURS[place], MARKERS[place], f"{solver}, N={size}"
                panel.plot(part["k"], part[value], line, color=colour, marker=marker, label=label)
        panel.set(xlabel="picked k", title=title)
    panels[0].legend(fontsize=7)
    _publish(
        out, "optimality", frame, frame, figure, f"{prompts} random pools a line; ratios to the optimum of `exact`."
    )
    return frame


def _ratios(size: int, k: int, solver: str, value_B: Tensor, best_B: Tensor, certified_B: Tensor) -> dict[str, object]:
    ratio_B = value_B / best_B
    return {
        "N": size,
        "k": k,
        "solver": solver,
        "logdet": float(value_B.mean()),
        "true_ratio": float(ratio_B.mean()),
        "worst_ratio": float(ratio_B.min()),
        "optimal_share": float((ratio_B > 1 - 1e-9).double().mean()),
        "certified_ratio": float(certified_B.mean()),
    }


def mass_design(pool: PoolStatistics, features: str = "mean") -> tuple[Tensor, Tensor]:
    """Gram matrix of the design vectors and the ridge, both as `selector=mass` has them by default."""
    gram_BCC, mask_BC = candidate_gram(pool, features), pool.scores.mask_BC
    gram_BNN, _ = fisher.design_gram(gram_BCC, pool.rewards_BC, pool.beta, mask_BC=mask_BC)
    return gram_BNN, fisher.mean_square(gram_BNN.diagonal(dim1=-2, dim2=-1), pool.mask_BN)


def value_of(gram_BNN: Tensor, ridge_B: Tensor, picks: Picks) -> Tensor:
    """The log-det `(B,)` that a given selection reaches."""
    chosen_BN = torch.zeros(gram_BNN.shape[:2], dtype=torch.int64, device=gram_BNN.device)
    chosen_BN.scatter_add_(1, picks.index_BK, picks.mask_BK.long())
    k = picks.index_BK.shape[1]
    return fisher.select_logdet_gram(gram_BNN, k, ridge_B, mask_BN=chosen_BN > 0).logdet_B


def clustered_pools(prompts: int, size: int, seed: int, width: int = 16, clusters: int = 5) -> PoolStatistics:
    """Pools whose features gather around a few centres, as near-duplicates do, with random log-probs."""
    noise = torch.Generator().manual_seed(keyed_seed("clustered pools", size, seed))
    centre_BSD = torch.randn(prompts, clusters, width, generator=noise)
    which_BC = torch.randint(clusters, (prompts, size + 1), generator=noise)
    features_BCD = centre_BSD[torch.arange(prompts)[:, None], which_BC]
    features_BCD = features_BCD + 0.3 * torch.randn(features_BCD.shape, generator=noise)
    logp_BC = 2 * torch.randn(prompts, size + 1, generator=noise)
    return _pool_of(features_BCD, logp_BC, torch.rand(prompts, size, generator=noise), beta=1.0)


def _pool_of(features_BCD: Tensor, logp_BC: Tensor, noise_BN: Tensor, beta: float) -> PoolStatistics:
    """Pool statistics of a world without text: the reference is uniform."""
    ones_BC = torch.ones_like(logp_BC, dtype=torch.int64)
    scores = Scores(logp_BC, logp_BC[..., None], ones_BC, ones_BC.bool(), features_BCD)
    names = [f"prompt {row}" for row in range(len(logp_BC))]
    return PoolStatistics(scores, torch.zeros_like(logp_BC), beta, noise_BN, names)


# loglinear -----------------------------------------------------------------------------------------------------------


def loglinear(
    out: Path,
    seeds: int = 20,
    prompts: Sequence[int] = (25, 50, 100, 200, 400, 800),
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    middle: tuple[int, int] = (100, 4),
    rounds: Sequence[int] = (1, 3),
    size: int = 20,
    strength: float = 1.0,
) -> pd.DataFrame:
    """The setting of the theory: known theta*, Plackett-Luce choices, maximum likelihood on the selected subsets.

    The chosen response is drawn from the softmax of phi . theta* (|theta*| = `strength`) over pools of clustered
    features. With `rounds` = 1 negatives are selected once, under the uniform reference; with more, after each fit too.
    Errors are of the logits of fresh pools about their mean, relative to the largest (`max_error`) or the mean
    (`mean_error`) true one: over the number of prompts at k = middle[1], and over k at middle[0] prompts.
    """
    cases = sorted({(count, middle[1]) for count in prompts} | {(middle[0], k) for k in ks})
    rows = []
    for count, k in cases:
        rivals: dict[str, Selector] = {"mass": Mass(k), "adpo": Adpo(k), "random": Random(k), "hardest": Hardest(k)}
        rivals["full"] = Full()
        for seed in range(seeds):
            world = LoglinearWorld(count, size, seed, strength)
            for name, selector in rivals.items():
                for turns, theta_D in zip(rounds, world.fits(selector, rounds), strict=True):
                    case = {"rounds": turns, "prompts": count, "k": k, "selector": name, "seed": seed}
                    rows.append({**case, **world.errors(theta_D)})
    frame = pd.DataFrame(rows)
    table = with_interval(frame, ["rounds", "prompts", "k", "selector"], ["max_error", "mean_error"])
    table = table.sort_values(["rounds", "prompts", "k"], kind="stable")
    figure, panels = _panels(2 * len(rounds))
    for place, turns in enumerate(rounds):
        part = table[table["rounds"] == turns]
        start = f"selected {turns} time{'s' if turns > 1 else ''}"
        _error_lines(panels[2 * place], part[part["k"] == middle[1]], "prompts", f"{start}, k={middle[1]}")
        _error_lines(panels[2 * place + 1], part[part["prompts"] == middle[0]], "k", f"{start}, {middle[0]} prompts")
    panels[0].legend(fontsize=7)
    _publish(out, "loglinear", frame, table, figure, f"Mean of {seeds} worlds ± half-width of the 95% t interval.")
    return frame


def _error_lines(panel: Axes, part: pd.DataFrame, axis: str, title: str) -> None:
    for place, name in enumerate(sorted(part["selector"].unique())):
        line = part[part["selector"] == name]
        style = {"marker": MARKERS[place], "color": COLOURS[place], "label": name}
        panel.errorbar(line[axis], line["max_error"], line["max_error ±"], **style)
    panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="maximum relative logit error", title=title)
    values = sorted(part[axis].unique())
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()


class LoglinearWorld:
    """One draw of theta*, training pools with choices, and fresh pools to measure on."""

    def __init__(self, prompts: int, size: int, seed: int, strength: float, width: int = 10, fresh: int = 500):
        noise = torch.Generator().manual_seed(keyed_seed("loglinear", seed))  # the same theta* for every case of a seed
        direction_D = torch.randn(width, generator=noise, dtype=torch.float64)
        self.theta_D = strength * direction_D / direction_D.norm()
        self.fresh_BCD = self._features(fresh, size, seed, "fresh", width)
        features_BCD = self._features(prompts, size, seed, "train", width)
        noise = torch.Generator().manual_seed(keyed_seed("choices", seed, prompts))
        chance_BC = (features_BCD @ self.theta_D).softmax(-1)
        chosen_B1 = torch.multinomial(chance_BC, 1, generator=noise)
        order_BC = torch.arange(size + 1).expand(prompts, -1).clone()
        order_BC.scatter_(1, chosen_B1, 0)
        order_BC[:, 0] = chosen_B1[:, 0]
        self.features_BCD = features_BCD.gather(1, order_BC[..., None].expand_as(features_BCD))
        self.seed = seed

    def _features(self, prompts: int, size: int, seed: int, use: str, width: int) -> Tensor:
        pools = clustered_pools(prompts, size, keyed_seed(use, seed), width)
        assert pools.scores.features_BCD is not None
        return pools.scores.features_BCD.double()

    def fits(self, selector: Selector, rounds: Sequence[int]) -> list[Tensor]:
        """Select with the policy there is, fit, and so on: theta after each of these numbers of rounds."""
        theta_D = torch.zeros_like(self.theta_D)
        after = {}
        for turn in range(1, max(rounds) + 1):
            logits_BC = self.features_BCD @ theta_D
            noise = torch.Generator().manual_seed(keyed_seed("selection", self.seed, turn))
            noise_BN = torch.rand(logits_BC[:, 1:].shape, generator=noise)
            picks = selector(_pool_of(self.features_BCD.float(), logits_BC, noise_BN, beta=1.0))
            columns_BC = torch.nn.functional.pad(picks.index_BK + 1, (1, 0))
            chosen_BCD = self.features_BCD.gather(1, columns_BC[..., None].expand(-1, -1, len(theta_D)))
            theta_D = maximum_likelihood(chosen_BCD)
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


def maximum_likelihood(features_BCD: Tensor, prior: float = 1e-2, steps: int = 100) -> Tensor:
    """theta `(D,)` that makes column 0 likeliest under softmax(features . theta), by Newton's method with halved steps.

    `prior` (prior / 2 |theta|^2, of the weight of a hundredth of a prompt) keeps it finite where the data separate.
    """
    features_BCD = features_BCD.double()
    theta_D = features_BCD.new_zeros(features_BCD.shape[-1])

    def loss(theta_D: Tensor) -> Tensor:
        return -(features_BCD @ theta_D).log_softmax(-1)[:, 0].sum() + prior / 2 * theta_D @ theta_D

    for _ in range(steps):
        share_BC = (features_BCD @ theta_D).softmax(-1)
        mean_BD = torch.einsum("bc,bcd->bd", share_BC, features_BCD)
        gradient_D = (mean_BD - features_BCD[:, 0]).sum(0) + prior * theta_D
        hessian_DD = torch.einsum("bc,bcd,bce->de", share_BC, features_BCD, features_BCD) - mean_BD.T @ mean_BD
        hessian_DD = hessian_DD + prior * torch.eye(len(theta_D), dtype=theta_D.dtype)
        step_D = torch.linalg.solve(hessian_DD, gradient_D)
        decrease, length = gradient_D @ step_D, 1.0
        if decrease < 1e-14:
            break
        while loss(theta_D - length * step_D) > loss(theta_D) - 1e-4 * length * decrease and length > 1e-10:
            length /= 2
        theta_D = theta_D - length * step_D
    return theta_D


# features ------------------------------------------------------------------------------------------------------------


def features(
    out: Path,
    stages: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    beta: float,
    k: int,
    sketch: int = 4_096,
    seed: int = 0,
) -> pd.DataFrame:
    """Do cheap features pick what full gradients would pick?

    `stages` are models by name, the first of them the reference (say, `before` and `after` training). For each prompt:
    the Jaccard overlap with the picks of `gradient` features (projected to `sketch` numbers), and the share of the best
    log-det under full gradients (by `swap`) that the picks of `mean`, `last`, `head`, `gradient` and `random` reach.
    """
    reference: list[Tensor] = []
    rows = []
    for stage, model in stages.items():
        model.eval()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for place, batch in enumerate(batches):
            scores = PreferenceScorer(model)(batch).scores
            if len(reference) == place:
                reference.append(scores.logp_BC.detach())
            noise = torch.Generator().manual_seed(keyed_seed("features", seed, list(batch.ids)))
            noise_BN = torch.rand(batch.mask_BC[:, 1:].shape, generator=noise).to(scores.logp_BC.device)
            sketches = [projected_gradients(logp_C, parameters, sketch, seed) for logp_C in scores.logp_BC]
            gradient_BCC = torch.stack([gram_of(sketch_CS) for sketch_CS in sketches])
            pools = {"gradient": replace(scores, logp_BC=scores.logp_BC.detach(), gram_BCC=gradient_BCC)}
            for name in ("mean", "last", "head"):
                with torch.no_grad():
                    pools[name] = PreferenceScorer(model, features=name)(batch).scores
            statistics = {
                name: PoolStatistics(part, reference[place], beta, noise_BN, batch.ids) for name, part in pools.items()
            }
            picks = {name: Mass(k, features=_field(name), short_pool="all")(pool) for name, pool in statistics.items()}
            picks["random"] = Random(k, short_pool="all")(statistics["gradient"])
            gram_BNN, ridge_B = mass_design(statistics["gradient"], "head")
            mask_BN = batch.mask_BC[:, 1:]
            best_B = fisher.select_logdet_gram(gram_BNN, k, ridge_B, mask_BN=mask_BN, solver="swap").logdet_B
            for name, selection in picks.items():
                share_B = value_of(gram_BNN, ridge_B, selection) / best_B
                same_B = overlap(selection, picks["gradient"])
                for row, prompt in enumerate(batch.ids):
                    rows.append(
                        {
                            "stage": stage,
                            "features": name,
                            "prompt": prompt,
                            "overlap": float(same_B[row]),
                            "logdet_share": float(share_B[row]),
                        }
                    )
    frame = pd.DataFrame(rows)
    table = with_interval(frame, ["stage", "features"], ["overlap", "logdet_share"])
    figure, panels = _panels(2)
    for panel, value in zip(panels, ("overlap", "logdet_share"), strict=True):
        for place, stage in enumerate(stages):
            part = table[table["stage"] == stage]
            panel.errorbar(
                part["features"], part[value], part[f"{value} ±"], fmt=MARKERS[place], color=COLOURS[place], label=stage
            )
        panel.set(title={"overlap": "overlap with full gradients", "logdet_share": "share of the best log-det"}[value])
    panels[0].legend(fontsize=7)
    note = f"Mean over {frame['prompt'].nunique()} prompts ± half-width of the 95% t interval; k={k}."
    _publish(out, "features", frame, table, figure, note)
    return frame


def gram_of(features_CD: Tensor) -> Tensor:
    wide_CD = features_CD.double()
    return wide_CD @ wide_CD.T


def _field(name: str) -> str:
    """Where a selector finds features of this kind: gradients come as inner products, as those of the head do."""
    return "head" if name == "gradient" else name


# refresh -------------------------------------------------------------------------------------------------------------


def refresh(out: Path, run: Callable[[str, int], Mapping[str, float]], seeds: Sequence[int]) -> pd.DataFrame:
    """What selecting again once, every epoch or every step gains and costs: `run(refresh, seed)` trains and measures.

    `run` returns numbers by name (metrics, seconds); every one of them becomes a column of the table and a panel.
    """
    kinds = ("once", "epoch", "step")
    frame = pd.DataFrame([{"refresh": kind, "seed": seed, **run(kind, seed)} for seed in seeds for kind in kinds])
    measured = [name for name in frame.columns if name not in ("refresh", "seed")]
    table = with_interval(frame, ["refresh"], measured)
    figure, panels = _panels(len(measured))
    for panel, name in zip(panels, measured, strict=True):
        panel.errorbar(table["refresh"], table[name], table[f"{name} ±"], fmt="o", color=COLOURS[0])
        panel.set(title=name)
    note = f"Mean over {len(seeds)} seeds ± half-width of the 95% t interval."
    _publish(out, "refresh", frame, table, figure, note)
    return frame


# Tables and figures --------------------------------------------------------------------------------------------------


def with_interval(frame: pd.DataFrame, axes: list[str], values: list[str]) -> pd.DataFrame:
    """Mean of each value and half-width of its 95% t interval over the rows that share `axes`."""
    groups = frame.groupby(axes, sort=False)
    table = groups[values].mean()
    count = groups.size()
    for value in values:
        quantile = pd.Series(stats.t.ppf(0.975, count - 1), index=count.index)
        table[f"{value} ±"] = quantile * groups[value].std() / count**0.5
    return table.reset_index()


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """`count` panels, two in a row."""
    rows = (count + 1) // 2
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, panels = plt.subplots(
            rows, min(count, 2), figsize=(4.4 * min(count, 2), 3.2 * rows), squeeze=False, layout="constrained"
        )
    for empty in panels.flat[count:]:
        empty.set_visible(False)
    return figure, list(panels.flat[:count])


def _publish(out: Path, name: str, rows: pd.DataFrame, table: pd.DataFrame, figure: Figure, note: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.csv", rows.to_csv(index=False, lineterminator="\n"))
    head = list(table.columns)
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in table.itertuples(index=False))]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    write_text(out / f"{name}.md", f"# {name}\n\n{note}\n\n{text}\n")
    for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        data = io.BytesIO()
        with plt.rc_context(STYLE):  # type: ignore[arg-type]
            figure.savefig(data, format=ending, metadata=metadata)
        with replacing(out / f"{name}.{ending}") as beside:
            beside.write_bytes(data.getvalue())
    plt.close(figure)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return str(value)
