"""The engine against the usual ways: time and peak memory of a training step, and how the step grows with N, k and P.

The usual ways repeat the prompt for every response. `everywhere` makes logits at every token, as S-DPO's code does;
`lean` makes them at response tokens only. Both run under SDPA, on rows without padding, with the reference's
log-probs known beforehand, as ours are. `python -m massdpo.benchmark.engine SIDE` measures one side's memory.

Suffixes: B prompts, C = 1 + N candidates, P prompt tokens, T response tokens, R = B * C rows of L = P + T tokens,
V vocabulary, K picks, D hidden units.
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from massdpo.benchmark import measure
from massdpo.benchmark.engine_report import AT_LEAST, AT_MOST, SIDES, draw_growth, markdown, show
from massdpo.errors import UserError
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import machine
from massdpo.selection import Mass
from massdpo.store import write_json, write_text
from massdpo.tensors import Batch, Picks, PoolStatistics, Scores
from massdpo.training.losses import pl

BETA = 0.1


@dataclass(frozen=True)
class Setting:
    """What is measured: the shape of the model, the batch and the pool."""

    layers: int = 4
    width: int = 256
    inner: int = 688
    heads: int = 4
    key_value_heads: int = 4
    vocabulary: int = 8_000
    prompt: int = 256
    response: int = 8
    negatives: int = 20
    k: int = 4
    prompts: int = 8
    tied: bool = False
    dtype: str = "float32"  # bfloat16: autocast over float32 weights
    device: str = "cpu"


CPU = Setting()
GPU = Setting(
    16, 2048, 8192, 32, 8, 128_256, prompt=512, negatives=19, prompts=4, dtype="bfloat16", device="cuda"
)  # unmeasured so far

GROWTH: dict[str, tuple[int, ...]] = {
    "negatives": (5, 20, 50, 100),
    "k": (1, 2, 4, 8, 16),
    "prompt": (64, 128, 256, 512),
}


def build_model(setting: Setting) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.width,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=setting.tied,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(setting.device)


def build_batch(setting: Setting) -> Batch:
    """Random tokens; every prompt and every response is full length, which leaves the usual ways nothing to pad."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (setting.prompts, setting.prompt), (setting.prompts, 1 + setting.negatives, setting.response)
    return Batch(
        [str(prompt) for prompt in range(setting.prompts)],
        torch.arange(setting.prompts),
        torch.randint(setting.vocabulary, prompts, generator=generator),
        torch.ones(prompts, dtype=torch.bool),
        torch.randint(setting.vocabulary, responses, generator=generator),
        torch.ones(responses, dtype=torch.bool),
    ).to(setting.device)


def build_sides(setting: Setting, model: PreTrainedModel) -> dict[str, Callable[[], object]]:
    """One forward and backward pass of each side, under the PL loss."""
    batch, scorer = build_batch(setting), PreferenceScorer(model, "mean", layout="packed")
    noise_BN = torch.rand(batch.mask_BC[:, 1:].shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    index_BK = noise_BN.argsort(-1)[:, : setting.k]
    small = batch.take(Picks(index_BK, torch.ones_like(index_BK, dtype=torch.bool)))
    mass, ref_logp_BC = Mass(setting.k), torch.zeros(batch.mask_BC.shape, device=setting.device)

    def select(pool: Scores) -> Picks:
        return mass(PoolStatistics(pool, ref_logp_BC, BETA, noise_BN, batch.ids))

    def step(logp: Callable[[], Tensor]) -> Callable[[], object]:
        def timed() -> None:
            model.zero_grad(set_to_none=True)
            with autocast(setting):
                logp_BC = logp()
            pl(BETA * logp_BC, logp_BC, torch.ones_like(logp_BC, dtype=torch.bool)).mean().backward()

        return timed

    return {
        "full_everywhere": step(lambda: everywhere(model, batch)),
        "full_lean": step(lambda: lean(model, batch)),
        "full_packed": step(lambda: scorer(batch).scores.logp_BC),
        "random_everywhere": step(lambda: everywhere(model, small)),
        "random_lean": step(lambda: lean(model, small)),
        "random_packed": step(lambda: scorer(small).scores.logp_BC),
        "mass": step(lambda: scorer(batch, select).scores.logp_BC),
    }


def autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16")


def everywhere(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probs `(B, C)` with prompts repeated and logits at every token."""
    ids_RL = _repeat(batch)
    logits_RLV = model(input_ids=ids_RL, attention_mask=torch.ones_like(ids_RL), use_cache=False).logits.float()
    token_logp_RL = logits_RLV[:, :-1].log_softmax(-1).gather(-1, ids_RL[:, 1:, None])[..., 0]
    answer_L = torch.arange(1, ids_RL.shape[1], device=ids_RL.device) >= batch.prompt_ids_BP.shape[1]
    return (token_logp_RL * answer_L).sum(-1).view(len(batch.ids), -1)


def lean(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probs `(B, C)` with prompts repeated and logits at response tokens only."""
    ids_RL, prompt = _repeat(batch), batch.prompt_ids_BP.shape[1]
    options = {"attention_mask": torch.ones_like(ids_RL), "use_cache": False}
    logits_RTV = model(input_ids=ids_RL, logits_to_keep=ids_RL.shape[1] - prompt + 1, **options).logits[:, :-1].float()
    token_logp_RT = logits_RTV.log_softmax(-1).gather(-1, ids_RL[:, prompt:, None])[..., 0]
    return token_logp_RT.sum(-1).view(len(batch.ids), -1)


def _repeat(batch: Batch) -> Tensor:
    prompt_BCP = batch.prompt_ids_BP[:, None].expand(-1, batch.response_ids_BCT.shape[1], -1)
    return torch.cat([prompt_BCP, batch.response_ids_BCT], dim=-1).flatten(0, 1)


def ratios(seconds: dict[str, float], memory: dict[str, int]) -> dict[str, float]:
    """The numbers that goals are set for."""
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
    """Seconds a step of our sides, and of the leaner usual way with k negatives, along N, k and P."""
    rows = []
    model = build_model(setting)
    for axis, values in GROWTH.items():
        for value in values:
            changed: dict[str, Any] = {axis: value}
            sides = build_sides(replace(setting, **changed), model)
            ours = {name: sides[name] for name in ("full_packed", "mass", "random_packed", "random_lean")}
            rows.append({"axis": axis, "value": value, **measure.medians(measure.alternate(ours, rounds))})
    return rows


def against_trl(setting: Setting, rounds: int, steps: int = 5) -> dict[str, list[float]]:
    """Seconds a training step on pairs (k=1; clipping and AdamW included) of TRL's `DPOTrainer` and of ours."""
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
        raise UserError("this benchmark compares with TRL: install it with `pip install -e .[bench]`")
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
    show(report)


def shares(setting: Setting, seconds: dict[str, float]) -> dict[str, float]:
    """Share of the card's measured bfloat16 matrix rate that each side reaches, by the operations that it cannot avoid.

    Six operations a weight and token, forward and backward: the layers for each token fed, the output matrix for each
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
