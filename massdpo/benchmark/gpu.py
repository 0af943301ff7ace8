"""The engine on one GPU: whether it is right in bfloat16, and how much of the possible saving it achieves.

Models of the shapes of SmolLM2-135M and Llama-3.2-1B with random weights, prompts of 256 to 4,000 tokens, each step
forward and backward, with as many prompts per step as let the plain way fit into 80 GB.
"""

import gc
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from massdpo.benchmark import measure
from massdpo.benchmark.engine import against_trl, need_trl, rate_shares
from massdpo.benchmark.sides import GPU, Setting, autocast, build_batch, build_model, build_sides, lean
from massdpo.console import markdown_table
from massdpo.errors import UserError
from massdpo.model.scoring import PreferenceScorer
from massdpo.store import write_json, write_text

SMOLLM2 = Setting(
    30, 576, 1536, 9, 3, 49_152, response=32, negatives=20, prompts=8, tied=True, dtype="bfloat16", device="cuda"
)
LLAMA_1B = replace(GPU, prompt=2048, response=32, negatives=8, prompts=1, tied=True)
SETTINGS = {
    "135M, prompts of 256": SMOLLM2,
    "135M, 1,024": replace(SMOLLM2, prompt=1024, prompts=2),
    "135M, 4,000": replace(SMOLLM2, prompt=4000, prompts=1, negatives=10),  # the models have 4,096 positions
    "1B, 2,048": LLAMA_1B,
}
TIMED = ("full_lean", "full_packed", "full_dense", "random_lean", "random_packed", "mass")
BFLOAT16_ERROR = 0.1  # nats per token: it keeps eight bits
NUMBERS = {
    "full_speedup": "full pool, speed-up by sharing prompts",
    "token_bound": "the most that the token counts allow",
    "share_of_bound": "share of that",
    "flex_speedup": "full pool, speed-up by FlexAttention where rows are long enough",
    "mass_over_random": "MASS over random k",
    "trl_pairs_speedup": "pairs, speed-up over TRL",
}


def errors(setting: Setting) -> dict[str, float]:
    """The largest errors of packed scores against plain ones in float32: log-probs in nats per token, in each
    precision, and the relative error of the gradient of their sum."""
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
        "float32": (found_BC - expected_BC).abs().max().item() / setting.response,
        "bfloat16": (rough_BC - expected_BC).abs().max().item() / setting.response,
        "gradient": float(relative),
    }


def measured(setting: Setting, rounds: int) -> dict[str, Any]:
    """One setting: medians of the alternating sides, and the numbers made from them."""
    pairs = measure.medians(against_trl(setting, rounds=2))
    free()
    model = build_model(setting)
    dense = build_sides(setting, model, flex=False)["full_packed"]
    sides = build_sides(setting, model) | {"full_dense": dense}
    seconds = measure.medians(measure.alternate({side: sides[side] for side in TIMED}, rounds))
    speedup = seconds["full_lean"] / seconds["full_packed"]
    return {
        "setting": asdict(setting),
        "seconds": seconds | pairs,
        "full_speedup": speedup,
        "token_bound": setting.token_bound,
        "share_of_bound": speedup / setting.token_bound,
        "flex_speedup": seconds["full_dense"] / seconds["full_packed"],
        "mass_over_random": seconds["mass"] / seconds["random_packed"],
        "trl_pairs_speedup": pairs["trl_pairs"] / pairs["packed_pairs"],
        "share_of_matrix_rate": rate_shares(setting, seconds),
    }


def free() -> None:
    """Give back the memory of models that are no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(out: Path, settings: Mapping[str, Setting] = SETTINGS, rounds: int = 5) -> None:
    """Check, measure and write `gpu.json`, after each setting, and `gpu.md` into `out`; names what does not fit.

    Raises `UserError` where there is no GPU or no TRL, where the packed log-probs are wrong, or where nothing fits.
    """
    first, second, *_ = settings.values()  # rows for SDPA, rows for FlexAttention
    if first.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this benchmark needs a GPU, and there is none here: python -m massdpo.benchmark engine runs on a CPU"
        )
    need_trl()
    found = [errors(setting) for setting in (first, second)]
    off = {name: max(each[name] for each in found) for name in found[0]}
    if max(off["float32"], off["gradient"]) > 1e-3 or off["bfloat16"] > BFLOAT16_ERROR:
        raise UserError(f"packed log-probs are wrong here: errors {off} in nats per token (gradient: relative)")
    report: dict[str, Any] = {"error_per_token": off, "rows": {}, "too_large": [], **measure.origin()}
    for name, setting in settings.items():
        free()
        try:
            report["rows"][name] = measured(setting, rounds)
        except torch.OutOfMemoryError:
            report["too_large"].append(name)
        write_json(out / "gpu.json", report)
    if not report["rows"]:
        raise UserError("no setting of this benchmark fits into this GPU's memory")
    write_text(out / "gpu.md", markdown(report))
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """Every number of the report as a Markdown table, a column for each setting."""
    names, rows = [*report["rows"]], [*report["rows"].values()]
    shape = {"negatives": "negatives per prompt", "prompts": "prompts per step"}
    lines = [(words, *(str(row["setting"][name]) for row in rows)) for name, words in shape.items()]
    lines += [(f"{side}, s", *(f"{row['seconds'][side]:.4f}" for row in rows)) for side in rows[0]["seconds"]]
    lines += [(meaning, *(f"{row[name]:.2f}" for row in rows)) for name, meaning in NUMBERS.items()]
    for side in rows[0]["share_of_matrix_rate"]:
        rates = (f"{row['share_of_matrix_rate'][side]:.2f}" for row in rows)
        lines.append((f"{side}, share of the matrix rate", *rates))
    off = ", ".join(f"{error:.2g} in {what}" for what, error in report["error_per_token"].items())
    notes = f"Largest errors, nats per token (of the gradient: relative): {off}.\n{measure.origin_in_words(report)}"
    if report["too_large"]:
        notes += f"Too large for this GPU: {'; '.join(report['too_large'])}.\n"
    return f"{markdown_table(['', *names], lines)}\n\n{notes}"
