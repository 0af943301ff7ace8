"""Real weights on a CPU: where selection saves time and memory, and where it only improves what is learned.

SmolLM2-135M in the precision that this CPU is fast in, each step forward and backward. Short answers behind long
prompts are multiple choice and recommendation; long answers are chat.

Suffixes: B prompts, P prompt tokens, T response tokens, L tokens of a row.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from transformers import PreTrainedModel

from massdpo.benchmark import measure
from massdpo.benchmark.sides import Setting, autocast, build_batch, build_model, build_sides
from massdpo.config import compose, fast_precision
from massdpo.console import markdown_table
from massdpo.model.scoring import PreferenceScorer
from massdpo.store import Cache, write_json, write_text

SIDES = {
    "sft_plain": "SFT, the plain Hugging Face step",
    "sft": "SFT",
    "random_packed": "random k",
    "mass": "MASS, selected at this step",
    "full_packed": "full pool",
    "pool": "scoring the pool, no gradients",
}
KEPT_IN_MEMORY = ("random_packed", "mass", "full_packed")
AT_MOST = {"sft_over_plain": 1.1, "mass_over_random": 1.25}  # goals where responses are short
PRECISION = fast_precision("cpu")
SHORT = [Setting(prompt=prompt, response=4, negatives=20, k=4, prompts=8, dtype=PRECISION) for prompt in (110, 300)]
LONG = [
    Setting(prompt=256, response=response, negatives=negatives, k=4, prompts=1, dtype=PRECISION)
    for response in (64, 256)
    for negatives in (8, 20, 100)
]
GRAPH_TOKENS = 1 << 13  # response tokens with gradients that fit into 16 GB at once: larger full pools are left out


def load(model: str, setting: Setting) -> tuple[PreTrainedModel, Setting]:
    """The model of that name in conf/model, with its vocabulary; without one, random weights in the setting's shape."""
    if not model:
        return build_model(setting), setting
    config = compose([f"model={model}"])
    loaded, _ = instantiate(config.model).load([], 0, Cache(Path(config.cache_dir)))
    return loaded, replace(setting, vocabulary=loaded.config.vocab_size)


def sides_of(model: PreTrainedModel, setting: Setting) -> dict[str, Callable[[], object]]:
    batch, scorer = build_batch(setting), PreferenceScorer(model, "mean", layout="packed")
    chosen = batch.chosen_only()
    ids_BL = torch.cat([chosen.prompt_ids_BP, chosen.response_ids_BCT[:, 0]], dim=1)
    labels_BL = ids_BL.clone()
    labels_BL[:, : setting.prompt] = -100

    def sft_plain() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(setting):
            output = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), labels=labels_BL, use_cache=False)
        output.loss.backward()

    def sft() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(setting):
            scores = scorer(chosen).scores
        (-scores.mean_logp_BC).mean().backward()

    def pool() -> None:
        with torch.no_grad(), autocast(setting):
            scorer(batch)

    ours = {"sft_plain": sft_plain, "sft": sft, "pool": pool, **build_sides(setting, model)}
    return {side: ours[side] for side in SIDES}


def memory_of(side: str, model_name: str, setting: Setting) -> int:
    return measure.peak_bytes(sides_of(*load(model_name, setting))[side])


def measured(model_name: str, setting: Setting, rounds: int) -> dict[str, Any]:
    """Medians of a setting's alternating sides, their ratios, and the memory of each in a fresh process."""
    full = setting.prompts * (1 + setting.negatives) * setting.response <= GRAPH_TOKENS
    memory = {  # first, while this process still holds nothing
        side: measure.in_fresh_process(memory_of, side, model_name, setting)
        for side in KEPT_IN_MEMORY
        if full or side != "full_packed"
    }
    sides = sides_of(*load(model_name, setting))
    if not full:
        del sides["full_packed"]
    seconds = measure.medians(measure.alternate(sides, rounds))
    return {
        **{name: getattr(setting, name) for name in ("prompt", "response", "negatives", "k", "prompts")},
        "seconds": seconds,
        "peak_bytes": memory,
        "sft_over_plain": seconds["sft"] / seconds["sft_plain"],
        "mass_over_random": seconds["mass"] / seconds["random_packed"],
        "full_over_mass": seconds["full_packed"] / seconds["mass"] if full else None,
        "full_over_mass_memory": memory["full_packed"] / max(1, memory["mass"]) if full else None,
        "pool_share_of_mass": seconds["pool"] / seconds["mass"],
        "token_bound": setting.token_bound,
    }


def run(
    out: Path, model: str = "smollm2_135m_q4", short: list[Setting] = SHORT, long: list[Setting] = LONG, rounds: int = 5
) -> None:
    """Measure everything and write `real.json` and `real.md` into `out`, again after each setting.

    Long responses get three rounds at most.
    """
    report: dict[str, Any] = {
        "model": model,
        "dtype": short[0].dtype,
        "goals": {"at_most": AT_MOST},
        "short": [],
        "long": [],
        **measure.origin(),
    }
    for name, settings, at_most in (("short", short, rounds), ("long", long, 3)):
        for setting in settings:
            report[name].append(measured(model, setting, min(rounds, at_most)))
            write_json(out / "real.json", report)
            write_text(out / "real.md", markdown(report))
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """Every number of the report as Markdown tables."""
    rows = [*report["short"], *report["long"]]

    def cells(values: Iterable[float | None]) -> list[str]:
        return ["left out" if value is None else f"{value:.2f}" for value in values]

    places = [f"{row['prompt']} + {row['response']}, N={row['negatives']}, batch {row['prompts']}" for row in rows]
    ratios = {
        "sft_over_plain": "SFT over plain SFT",
        "mass_over_random": "MASS over random k",
        "full_over_mass": "full pool over MASS",
        "full_over_mass_memory": "full pool over MASS, memory",
        "pool_share_of_mass": "scoring the pool, share of MASS",
        "token_bound": "tokens that sharing prompts saves, at most (times)",
    }
    lines = {
        "step, s": [(SIDES[side], *cells(row["seconds"].get(side) for row in rows)) for side in SIDES],
        "extra peak memory, GB": [
            (SIDES[side], *cells(row["peak_bytes"][side] / 1e9 if side in row["peak_bytes"] else None for row in rows))
            for side in KEPT_IN_MEMORY
        ],
        "ratio": [(meaning, *cells(row[name] for row in rows)) for name, meaning in ratios.items()],
    }
    tables = [markdown_table([head, *places], body) for head, body in lines.items()]
    goals = ", ".join(f"{ratios[name]} at most {goal:g}" for name, goal in AT_MOST.items())
    where = f"Model: {report['model'] or 'random weights'}, {report['dtype']}. Goals for short responses: {goals}.\n"
    return "\n\n".join([*tables, where + measure.origin_in_words(report)])
