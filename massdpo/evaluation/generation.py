"""The answers that the policy writes: greedy decoding, free and constrained to the candidates, as S-DPO does it.

Prompts are decoded in batches with a cache. When constrained, each next token is one that continues some candidate
of the prompt (a trie of their tokens, EOS included), so the answer is always one of them.

Suffixes: B prompts of a batch, P prompt tokens, L tokens of a row so far.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from massdpo.data.batches import collate
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.logps import SplitLogps, SplitScorer
from massdpo.tensors import Batch

Trie = dict[int, Any]  # token -> what may follow it; nothing follows EOS


@dataclass(frozen=True)
class Answer:
    """The candidates of a prompt (0: the chosen one) that greedy decoding names; more than one where they are alike."""

    free: list[int]  # those with the text that the model wrote and ended; none where it wrote something else
    constrained: list[int]  # those whose tokens it wrote when held to the candidates


def generate_split(
    scorer: nn.Module, rows: Sequence[TokenizedExample], score_split: SplitScorer, tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """The policy's answers to the prompts of a split, in its order; every process gets the whole."""
    accelerator = score_split.accelerator
    model: PreTrainedModel = accelerator.unwrap_model(scorer).causal_lm
    pad_id, context = cast(int, tokenizer.pad_token_id), model.config.get_text_config().max_position_embeddings
    parts = []
    with greedy_settings(model, cast(int, tokenizer.eos_token_id), pad_id), accelerator.autocast():
        for batch in score_split.batches(scorer, rows, "generate"):
            numbers = batch.index_B.tolist()
            batches = [batch]
            if batch.prompt_ids_BP.shape[1] + batch.response_ids_BCT.shape[2] > context:
                batches = [collate([(row, rows[row])], pad_id).to(accelerator.device) for row in numbers]  # each fits
            free = [ids for part in batches for ids in decode(model, part)]
            constrained = [ids for part in batches for ids in decode(model, part, constrained=True)]
            for row, wrote, held in zip(numbers, free, constrained, strict=True):
                parts.append((row, named(wrote, held, rows[row], tokenizer)))
    answers = dict(gather_object(parts))  # a batch that fills up unequal shares is answered twice
    return [answers[row] for row in range(len(rows))]


def generation_metrics(answers: Sequence[Answer], logps: SplitLogps) -> dict[str, float]:
    """Shares of the prompts, from 0 to 1; the chosen response counts only where it alone is named.

    `hr@1`: the free answer is the chosen response. `valid_ratio`: it is exactly one candidate. `hr@1_constrained`: the
    answer held to the candidates is the chosen response; `constrained_agreement`: it is the candidate with the largest
    summed log-prob, which greedy decoding can miss.
    """
    best_S = logps.logp_SC.masked_fill(~logps.mask_SC, -torch.inf).argmax(-1).tolist()
    hits = {
        "hr@1": [answer.free == [0] for answer in answers],
        "valid_ratio": [len(answer.free) == 1 for answer in answers],
        "hr@1_constrained": [answer.constrained == [0] for answer in answers],
        "constrained_agreement": [best in answer.constrained for best, answer in zip(best_S, answers, strict=True)],
    }
    return {name: sum(hit) / len(hit) for name, hit in hits.items()}


def decode(model: PreTrainedModel, batch: Batch, constrained: bool = False) -> list[list[int]]:
    """Greedy continuations of the prompts, inside `greedy_settings`: each as token ids up to and including its EOS.

    A prompt gets as many tokens as its longest candidate has: a longer answer cannot be any of them.
    """
    eos_id, pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    length_B = batch.prompt_mask_BP.sum(-1, keepdim=True)
    width = batch.prompt_ids_BP.shape[1]
    column_BP = (torch.arange(width, device=length_B.device) + length_B) % width  # padding moves to the left
    tries = [_trie(*candidates) for candidates in zip(batch.response_ids_BCT, batch.response_mask_BCT, strict=True)]

    def allowed(row: int, ids_L: Tensor) -> list[int]:
        place = tries[row]
        for token in ids_L[width:].tolist():
            place = place.get(token, {})
        return list(place) or [pad_id]  # after EOS

    limit_B = batch.length_BC.amax(-1).tolist()
    generate: Any = model.generate
    ids_BL = generate(
        batch.prompt_ids_BP.gather(1, column_BP),
        attention_mask=batch.prompt_mask_BP.gather(1, column_BP).long(),
        max_new_tokens=max(limit_B),
        prefix_allowed_tokens_fn=allowed if constrained else None,
    )
    answers = [ids[:limit] for ids, limit in zip(ids_BL[:, width:].tolist(), limit_B, strict=True)]
    return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in answers]


def named(
    free: list[int], constrained: list[int], example: TokenizedExample, tokenizer: PreTrainedTokenizerBase
) -> Answer:
    """Which candidates the two sequences name: the free one by its text, regardless of case and spaces."""

    def text(ids: list[int]) -> str:
        return " ".join(str(tokenizer.decode(ids[:-1])).casefold().split())  # without EOS

    written = text(free) if free[-1] == tokenizer.eos_token_id else None
    return Answer(
        [place for place, ids in enumerate(example.response_ids) if text(ids) == written],
        [place for place, ids in enumerate(example.response_ids) if ids == constrained],
    )


@contextmanager
def greedy_settings(model: PreTrainedModel, eos_id: int, pad_id: int, use_cache: bool = True) -> Iterator[None]:
    """Inside, the model generates greedily; `generate` would fill what we leave open from settings of the model's own
    (a repetition penalty, further end tokens), with which it would no longer follow the distribution that is scored."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=eos_id, pad_token_id=pad_id, use_cache=use_cache)
    try:
        yield
    finally:
        model.generation_config = own


def _trie(ids_CT: Tensor, mask_CT: Tensor) -> Trie:
    root: Trie = {}
    for ids_T, mask_T in zip(ids_CT, mask_CT, strict=True):
        place = root
        for token in ids_T[mask_T].tolist():
            place = place.setdefault(token, {})
    return root
