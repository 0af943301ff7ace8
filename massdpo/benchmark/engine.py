"""The engine compared with the usual ways: time and memory of a training step, and its growth with N, k and P.

`sides.py` says what the sides are. Suffixes: B prompts, C = 1 + N candidates, K picks.
"""

import importlib.util
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from massdpo.benchmark import measure
from massdpo.benchmark.sides import BETA, CPU, GPU, Setting, autocast, build_batch, build_model, build_sides
from massdpo.console import markdown_table
from massdpo.errors import UserError
from massdpo.model.scoring import PreferenceScorer
from massdpo.report.figures import save_pictures
from massdpo.store import write_json, write_text
from massdpo.training.losses import pl

GROWTH: dict[str, tuple[int, ...]] = {
    "negatives": (5, 20, 50, 100),
    "k": (1, 2, 4, 8, 16),
    "prompt": (64, 128, 256, 512),
}
# Goals of a quiet machine: at least, or at most.
AT_LEAST = {
    "full_pool_speedup": 25.0,
    "full_pool_speedup_lean": 12.0,
    "random_k_speedup": 5.0,
    "random_k_speedup_lean": 3.0,
    "mass_speedup": 4.0,
    "mass_speedup_lean": 2.5,
    "trl_pairs_speedup": 1.3,
}
AT_MOST = {"full_pool_memory_ratio": 1 / 12, "mass_over_random": 1.4}
SIDES = {
    "full_everywhere": "full pool, prompts repeated, logits at every token",
    "full_lean": "full pool, prompts repeated, logits at response tokens",
    "full_packed": "full pool, packed",
    "random_everywhere": "random k, prompts repeated, logits at every token",
    "random_lean": "random k, prompts repeated, logits at response tokens",
    "random_packed": "random k, packed",
    "mass": "MASS, selected at this step, two-phase",
}

GROWN = {  # the sides that are measured along N, k and P
    "full_packed": "full pool, packed",
    "mass": "MASS, two-phase",
    "random_packed": "random k, packed",
    "random_lean": "random k, prompts repeated",
}


def ratios(seconds: dict[str, float], memory: dict[str, int]) -> dict[str, float]:
    """The ratios that have goals."""
    found = {
        "full_pool_speedup": seconds["full_everywhere"] / seconds["full_packed"],
        "full_pool_speedup_lean": seconds["full_lean"] / seconds["full_packed"],
        "random_k_speedup": seconds["random_everywhere"] / seconds["random_packed"],
        "random_k_speedup_lean": seconds["random_lean"] / seconds["random_packed"],
        "mass_over_random": seconds["mass"] / seconds["random_packed"],
        "mass_speedup": seconds["random_everywhere"] / seconds["mass"],
        "mass_speedup_lean": seconds["random_lean"] / seconds["mass"],
    }
    if memory:
        found["full_pool_memory_ratio"] = memory["full_packed"] / memory["full_everywhere"]
    return found


def grow(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Seconds per step of our sides, and of the leaner usual way with k negatives, along N, k and P."""
    rows = []
    model = build_model(setting)
    for axis, values in GROWTH.items():
        for value in values:
            changed: dict[str, Any] = {axis: value}
            sides = build_sides(replace(setting, **changed), model)
            ours = {name: sides[name] for name in GROWN}
            rows.append({"axis": axis, "value": value, **measure.medians(measure.alternate(ours, rounds))})
    return rows


def against_trl(setting: Setting, rounds: int, steps: int = 5) -> dict[str, list[float]]:
    """Seconds per training step on pairs (k=1; clipping and AdamW included) of TRL's `DPOTrainer` and of ours."""
    from massdpo.benchmark.trl_pairs import trl_trainer  # an extra

    pairs = replace(setting, negatives=1, k=1)
    batch, model = build_batch(pairs), build_model(pairs)
    scorer, mask_BC = PreferenceScorer(model, layout="packed"), torch.ones_like(batch.mask_BC)
    with torch.no_grad():
        ref_logp_BC = scorer(batch).scores.logp_BC
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def ours() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(setting):
            scores = scorer(batch).scores
        rewards_BC = BETA * (scores.logp_BC - ref_logp_BC)
        pl(rewards_BC, scores.mean_logp_BC, mask_BC).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        theirs = trl_trainer(build_model(pairs), batch, BETA, steps, Path(folder))
        return measure.alternate({"trl_pairs": theirs, "packed_pairs": ours}, rounds)


def need_trl() -> None:
    if importlib.util.find_spec("trl") is None:
        raise UserError("this benchmark compares with TRL: install it with `pip install -e .[trl]`")


def memory_of(side: str, setting: Setting) -> int:
    return measure.peak_bytes(build_sides(setting, build_model(setting))[side])


def run(out: Path, setting: Setting | None = None, rounds: int = 5) -> None:
    """Measure everything and write `engine.json`, `engine.md`, `engine_growth.csv` and the figure into `out`.

    The setting is the CPU's, or the GPU's where there is one. Raises `UserError` where TRL is not installed.
    """
    need_trl()
    setting = setting or (GPU if torch.cuda.is_available() else CPU)
    memory = {side: measure.in_fresh_process(memory_of, side, setting) for side in SIDES}
    rounds_of = measure.alternate(build_sides(setting, build_model(setting)), rounds)
    rounds_of |= against_trl(setting, rounds)
    seconds = measure.medians(rounds_of)
    growth = grow(setting, min(rounds, 3))
    report: dict[str, Any] = {
        **ratios(seconds, memory),
        "trl_pairs_speedup": seconds["trl_pairs"] / seconds["packed_pairs"],
        "goals": {"at_least": AT_LEAST, "at_most": AT_MOST},
        "seconds": seconds,
        "rounds": rounds_of,
        "peak_bytes": memory,
        "growth": growth,
        "setting": asdict(setting),
        **measure.origin(),
    }
    if setting.device == "cuda":
        report["share_of_matrix_rate"] = rate_shares(setting, seconds)
    write_json(out / "engine.json", report)
    write_text(out / "engine.md", markdown(report))
    draw_growth(growth, out)
    print(markdown(report))


def rate_shares(setting: Setting, seconds: dict[str, float]) -> dict[str, float]:
    """Share of the device's measured bfloat16 matrix rate that each side reaches, counting only unavoidable operations.

    Six operations per weight and token, forward and backward: the layers for each token fed, the output matrix for each
    token scored.
    """
    size = 8192 if setting.device == "cuda" else 512
    left, right = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * size**3 / min(measure.alternate({"matmul": lambda: left @ right}, rounds=20, warmup=5)["matmul"])
    key_value_width = setting.width * setting.key_value_heads // setting.heads
    layers = setting.layers * (
        2 * setting.width * (setting.width + key_value_width) + 3 * setting.width * setting.inner
    )
    head = setting.width * setting.vocabulary
    found = {}
    for side, count in {"full": 1 + setting.negatives, "random": 1 + setting.k}.items():
        whole, answers = count * (setting.prompt + setting.response), count * setting.response
        shared = setting.prompt + count * (setting.response - 1)
        for way, fed, scored in (
            ("everywhere", whole, whole),
            ("lean", whole, answers),
            ("packed", shared, 1 + count * (setting.response - 1)),
        ):
            operations = 6 * setting.prompts * (fed * layers + scored * head)
            if (name := f"{side}_{way}") in seconds:
                found[name] = operations / seconds[name] / rate
    return found


def markdown(report: dict[str, Any]) -> str:
    """Every number of the report as Markdown tables."""
    sides = [
        (meaning, f"{report['seconds'][side]:.3f}", f"{report['peak_bytes'][side] / 1e9:.2f}")
        for side, meaning in SIDES.items()
    ]
    goals = [
        (name, f"{report[name]:.3g}", f"{sign} {goal:.3g}")
        for sign, bounds in (("at least", AT_LEAST), ("at most", AT_MOST))
        for name, goal in bounds.items()
    ]
    growth = [(row["axis"], str(row["value"]), *(f"{row[side]:.3f}" for side in GROWN)) for row in report["growth"]]
    setting = ", ".join(f"{name} {value}" for name, value in report["setting"].items())
    return "\n\n".join(
        [
            markdown_table(["side", "step, s", "extra peak memory, GB"], sides),
            markdown_table(["ratio", "measured", "goal"], goals),
            markdown_table(["grows along", "value", *(f"{label}, s" for label in GROWN.values())], growth),
            f"Setting: {setting}.\n{measure.origin_in_words(report)}",
        ]
    )


def draw_growth(growth: list[dict[str, Any]], out: Path) -> None:
    """`engine_growth.png` and `.svg`: one panel per axis; and the numbers as `engine_growth.csv`."""
    titles = {"negatives": "negatives in the pool", "k": "negatives trained on (k)", "prompt": "prompt tokens"}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for panel, (axis, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        rows = [row for row in growth if row["axis"] == axis]
        values = [row["value"] for row in rows]
        for (side, label), marker in zip(GROWN.items(), "osD^", strict=True):
            panel.plot(values, [row[side] for row in rows], marker=marker, markersize=4, label=label)
        panel.set(xlabel=title, xscale="log", yscale="log")
        panel.set_xticks(values, list(map(str, values)))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds per step")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_pictures(figure, out / "engine_growth")
    table = pd.DataFrame(growth, columns=["axis", "value", *GROWN])
    write_text(out / "engine_growth.csv", table.to_csv(index=False, lineterminator="\n"))
