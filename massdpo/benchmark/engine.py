"""The engine compared with the usual ways: time and memory of a training step, and its growth with N, k and P.

`python -m massdpo.benchmark.engine SIDE` measures one side's memory; `sides.py` says what the sides are.

Suffixes: B prompts, C = 1 + N candidates, K picks.
"""

import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from massdpo.benchmark import measure
from massdpo.benchmark.engine_report import AT_LEAST, AT_MOST, GROWN, SIDES, draw_growth, markdown
from massdpo.benchmark.sides import BETA, CPU, GPU, Setting, autocast, build_batch, build_model, build_sides
from massdpo.errors import UserError
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import machine
from massdpo.store import write_json, write_text
from massdpo.training.losses import pl

GROWTH: dict[str, tuple[int, ...]] = {
    "negatives": (5, 20, 50, 100),
    "k": (1, 2, 4, 8, 16),
    "prompt": (64, 128, 256, 512),
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


def run(out: Path, setting: Setting | None = None, rounds: int = 5) -> None:
    """Measure everything and write `engine.json`, `engine.md`, `engine_growth.csv` and the figure into `out`.

    The setting is the CPU's, or the GPU's where there is one. Raises `UserError` where TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError("this benchmark compares with TRL: install it with `pip install -e .[trl]`")
    setting = setting or (GPU if torch.cuda.is_available() else CPU)
    memory = {side: int(measure.fresh_process(__name__, side, json.dumps(asdict(setting)))) for side in SIDES}
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
        "commit": machine.commit(),
        "machine": machine.machine(),
    }
    if setting.device == "cuda":
        report["share_of_matrix_rate"] = shares(setting, seconds)
    write_json(out / "engine.json", report)
    write_text(out / "engine.md", markdown(report))
    draw_growth(growth, out)
    print(markdown(report))


def shares(setting: Setting, seconds: dict[str, float]) -> dict[str, float]:
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


if __name__ == "__main__":  # the memory of one side, in a process of its own
    side, shape = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    print(measure.peak_bytes(build_sides(shape, build_model(shape))[side]))
