"""The engine on one card: right in bfloat16, and how much of what sharing prompts can save it does save.

A model of SmolLM2-135M's shape with random weights, prompts of 256 to 4,096 tokens, each step forward and backward.
"""

import importlib.util
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from massdpo.benchmark import measure
from massdpo.benchmark.engine import against_trl, shares
from massdpo.benchmark.sides import Setting, autocast, build_batch, build_model, build_sides, lean
from massdpo.console import markdown_table
from massdpo.errors import UserError
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import machine
from massdpo.store import write_json, write_text

SMOLLM2 = Setting(
    30, 576, 1536, 9, 3, 49_152, response=32, negatives=20, prompts=2, tied=True, dtype="bfloat16", device="cuda"
)
PROMPTS = (256, 1024, 4000)  # the model has 4,096 positions
TIMED = ("full_lean", "full_packed", "full_dense", "random_lean", "random_packed", "mass")
BFLOAT16_ERROR = 0.1  # nats per token: it keeps eight bits
NUMBERS = {
    "full_speedup": "full pool, speed-up by sharing prompts",
    "token_bound": "the most that the tokens allow",
    "share_of_bound": "share of that",
    "flex_speedup": "full pool, speed-up by FlexAttention where rows are long enough",
    "mass_over_random": "MASS over random k",
    "trl_pairs_speedup": "pairs, speed-up over TRL",
}


def errors(setting: Setting) -> dict[str, float]:
    """How far packed scores are off the plain ones in float32, at most: log-probs in nats per token, in each precision,
    and the gradient of their sum, relative."""
    few = replace(setting, prompts=1, negatives=setting.k)  # the plain way's gradient in float32 takes much memory
    model, batch = build_model(few), build_batch(few)
    scorer = PreferenceScorer(model, layout="packed")
    expected_BC, found_BC = lean(model, batch), scorer(batch).scores.logp_BC
    expected, found = (torch.autograd.grad(logp_BC.sum(), [*model.parameters()]) for logp_BC in (expected_BC, found_BC))
    off = [(a - b).square().sum() for a, b in zip(found, expected, strict=True)]
    relative = (sum(off) / sum(b.square().sum() for b in expected)) ** 0.5
    with torch.no_grad(), autocast(setting):
        rough_BC = scorer(batch).scores.logp_BC
    return {
        "float32": float((found_BC - expected_BC).abs().max()) / setting.response,
        "bfloat16": float((rough_BC - expected_BC).abs().max()) / setting.response,
        "gradient": float(relative),
    }


def measured(setting: Setting, rounds: int) -> dict[str, Any]:
    """One length of prompts: medians of the sides in alternation, and what they come to."""
    model = build_model(setting)
    dense = build_sides(setting, model, flex=False)["full_packed"]
    sides = build_sides(setting, model) | {"full_dense": dense}
    seconds = measure.medians(measure.alternate({side: sides[side] for side in TIMED}, rounds))
    pairs = measure.medians(against_trl(setting, rounds=2))
    count = 1 + setting.negatives
    bound = count * (setting.prompt + setting.response) / (setting.prompt + count * setting.response)
    speedup = seconds["full_lean"] / seconds["full_packed"]
    return {
        "prompt": setting.prompt,
        "seconds": seconds | pairs,
        "full_speedup": speedup,
        "token_bound": bound,
        "share_of_bound": speedup / bound,
        "flex_speedup": seconds["full_dense"] / seconds["full_packed"],
        "mass_over_random": seconds["mass"] / seconds["random_packed"],
        "trl_pairs_speedup": pairs["trl_pairs"] / pairs["packed_pairs"],
        "share_of_matrix_rate": shares(setting, seconds),
    }


def run(out: Path, setting: Setting = SMOLLM2, prompts: tuple[int, ...] = PROMPTS, rounds: int = 5) -> None:
    """Check, measure and write `gpu.json` and `gpu.md` into `out`.

    Raises `UserError` where there is no card or no TRL, or where the packed log-probs are wrong.
    """
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this benchmark is for a GPU, and none is here: python -m massdpo.benchmark engine runs on a CPU"
        )
    if importlib.util.find_spec("trl") is None:
        raise UserError("this benchmark compares with TRL: install it with `pip install -e .[trl]`")
    found = [errors(replace(setting, prompt=prompt)) for prompt in prompts[:2]]  # of SDPA, of FlexAttention
    off = {name: max(each[name] for each in found) for name in found[0]}
    if max(off["float32"], off["gradient"]) > 1e-3 or off["bfloat16"] > BFLOAT16_ERROR:
        raise UserError(f"packed log-probs are wrong here: off by {off} nats per token (the gradient: relative)")
    rows = [measured(replace(setting, prompt=prompt), rounds) for prompt in prompts]
    report = {
        "error_per_token": off,
        "rows": rows,
        "setting": asdict(setting),
        "commit": machine.commit(),
        "machine": machine.machine(),
    }
    write_json(out / "gpu.json", report)
    write_text(out / "gpu.md", markdown(report))
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """Every number of the report as a Markdown table, a column for each length of prompts."""
    rows = report["rows"]
    lines = [(f"{side}, s", *(f"{row['seconds'][side]:.4f}" for row in rows)) for side in rows[0]["seconds"]]
    lines += [(meaning, *(f"{row[name]:.2f}" for row in rows)) for name, meaning in NUMBERS.items()]
    for side in rows[0]["share_of_matrix_rate"]:
        rates = (f"{row['share_of_matrix_rate'][side]:.2f}" for row in rows)
        lines.append((f"{side}, share of the matrix rate", *rates))
    table = markdown_table(["prompt tokens", *(str(row["prompt"]) for row in rows)], lines)
    off = ", ".join(f"{error:.2g} in {what}" for what, error in report["error_per_token"].items())
    where = f"Machine: {machine.in_words(report['machine'])}.\nCommit: {report['commit']}.\n"
    return f"{table}\n\nOff by at most, nats per token (the gradient: relative): {off}.\n{where}"
