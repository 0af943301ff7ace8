"""The sides of the engine's benchmark: a training step of the shared-prefix engine and of the usual ways.

The usual ways repeat the prompt for every response. `everywhere` makes logits at every token, as S-DPO's code does;
`lean` makes them at response tokens only. Both use SDPA on rows without padding, and know the reference's log-probs
beforehand, as ours do.

Suffixes: B prompts, C = 1 + N candidates, P prompt tokens, T response tokens, R = B * C rows of L = P + T tokens,
V vocabulary, K picks, D hidden units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from massdpo.model.scoring import PreferenceScorer
from massdpo.selection import Mass
from massdpo.tensors import Batch, CandidateScores, Picks, PoolStatistics
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

    @property
    def token_bound(self) -> float:
        """How many times fewer tokens a whole pool takes if its prompt is shared."""
        size = 1 + self.negatives
        return size * (self.prompt + self.response) / (self.prompt + size * self.response)


CPU = Setting()
GPU = Setting(
    16, 2048, 8192, 32, 8, 128_256, prompt=512, negatives=19, prompts=4, dtype="bfloat16", device="cuda"
)  # unmeasured so far


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
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def build_batch(setting: Setting) -> Batch:
    """Random tokens; every prompt and every response has full length, so that the usual ways need no padding."""
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


def build_sides(setting: Setting, model: PreTrainedModel, flex: bool = True) -> dict[str, Callable[[], object]]:
    """One forward and backward pass of each side, under the PL loss; without `flex`, attention uses dense masks."""
    batch, scorer = build_batch(setting), PreferenceScorer(model, "mean", layout="packed")
    scorer.flex.fewest = None if flex else math.inf
    noise_BN = torch.rand(batch.mask_BC[:, 1:].shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    index_BK = noise_BN.argsort(-1)[:, : setting.k]
    small = batch.take(Picks(index_BK, torch.ones_like(index_BK, dtype=torch.bool)))
    mass, ref_logp_BC = Mass(setting.k), torch.zeros(batch.mask_BC.shape, device=setting.device)

    def select(pool: CandidateScores) -> Picks:
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
