"""The engine against the plain way: one candidate at a time through the model's own forward."""

import ast
import copy
import itertools
import re
import socket
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from massdpo.errors import UserError
from massdpo.model import head, packing, probe, scoring
from massdpo.model.load import disable_dropout
from massdpo.model.scoring import PreferenceScorer
from massdpo.tensors import Batch, CandidateScores, Picks
from tests.conftest import ROOT

VOCABULARY = 61
ALL_SHORT = (
    10**6
)  # as SHORT_TOKENS: every prompt lies in one row with its responses; 0: each is encoded once, ahead of them
# Weights five times larger than usual, so that attention moves the log-probs by nats and a wrong mask cannot hide.
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings", "initializer_range")  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short: these batches are tiny."""
    monkeypatch.setattr(packing, "SHORT_TOKENS", 0)


def tiny(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """A model with random weights; biases and norms too, which would start at 0 and 1 and hide."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
        disable_dropout(model)
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
        return model


def make_batch(
    prompts: list[int],
    responses: list[list[int]],
    seed: int = 0,
    padding: tuple[int, int] = (0, 0),
    vocabulary: int = VOCABULARY,
) -> Batch:
    """Random tokens in the lengths asked for, with this many padding columns more than needed."""
    generator = torch.Generator().manual_seed(seed)
    candidates = max(map(len, responses))
    length_BC = torch.tensor([row + [0] * (candidates - len(row)) for row in responses])
    prompt_mask_BP = torch.arange(max(prompts) + padding[0]) < torch.tensor(prompts)[:, None]
    mask_BCT = torch.arange(int(length_BC.max()) + padding[1]) < length_BC[..., None]
    prompt_ids_BP = torch.randint(1, vocabulary, prompt_mask_BP.shape, generator=generator) * prompt_mask_BP
    ids_BCT = torch.randint(1, vocabulary, mask_BCT.shape, generator=generator) * mask_BCT
    names = [f"example-{i}" for i in range(len(prompts))]
    return Batch(names, torch.arange(len(prompts)), prompt_ids_BP, prompt_mask_BP, ids_BCT, mask_BCT)


RAGGED = make_batch([9, 3, 12], [[3, 1, 4, 2], [2, 5, 1], [1, 2, 3, 5]])


def rows(batch: Batch) -> list[tuple[int, int, Tensor, int]]:
    """(prompt, candidate, tokens of the concatenated text, length of the prompt) of each candidate there is."""
    found = []
    for b, c in batch.mask_BC.nonzero().tolist():
        prompt = batch.prompt_ids_BP[b][batch.prompt_mask_BP[b]]
        found.append(
            (b, c, torch.cat([prompt, batch.response_ids_BCT[b, c][batch.response_mask_BCT[b, c]]]), len(prompt))
        )
    return found


def plain_logp(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Log-probs by `transformers`' own loss on the concatenated text, a candidate at a time."""
    nothing = torch.zeros((), device=batch.mask_BC.device)
    logp_BC = [[nothing] * batch.mask_BC.shape[1] for _ in batch.ids]
    for b, c, ids, prompt_length in rows(batch):
        labels = ids.clone()
        labels[:prompt_length] = -100
        logp_BC[b][c] = -model(input_ids=ids[None], labels=labels[None]).loss * (len(ids) - prompt_length)
    return torch.stack([torch.stack(row) for row in logp_BC])


def pl_loss(logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logp_BC.masked_fill(~mask_BC, -torch.inf), torch.zeros(len(logp_BC), dtype=torch.int64, device=logp_BC.device)
    )


def gradient_of(model: torch.nn.Module, loss: Tensor) -> Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, materialize_grads=True)])


def pick_all(pool: CandidateScores) -> Picks:
    mask_BN = pool.mask_BC[:, 1:]
    return Picks(torch.arange(mask_BN.shape[1], device=mask_BN.device).expand(mask_BN.shape), mask_BN)


def assert_all_ways_agree(model: torch.nn.Module, batch: Batch, tolerance: float) -> None:
    """Log-probs, PL loss and gradient of each way to lay out tokens against the plain one."""
    expected_BC = plain_logp(model, batch)
    expected_loss = pl_loss(expected_BC, batch.mask_BC)
    expected_gradient = gradient_of(model, expected_loss)
    for way, select in itertools.product(("encoded once", "one row", "repeated", "checkpoints"), (None, pick_all)):
        scorer = PreferenceScorer(model, layout="repeated" if way == "repeated" else "packed")
        if way == "checkpoints":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with patch.object(packing, "SHORT_TOKENS", ALL_SHORT if way == "one row" else 0):
            scores = scorer(batch, select).scores
        loss = pl_loss(scores.logp_BC, scores.mask_BC)
        gradient = gradient_of(model, loss)
        assert (scores.logp_BC - expected_BC).abs().max() <= tolerance * expected_BC.abs().max(), (way, select)
        assert abs(loss - expected_loss) <= tolerance * expected_loss, (way, select)
        assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm(), (way, select)
    model.gradient_checkpointing_disable()
    model.eval()


def test_all_ways_agree_in_float32() -> None:
    assert_all_ways_agree(tiny(LLAMA), RAGGED, 1e-5)


def test_all_ways_agree_in_float64() -> None:
    # GPT-2's norms stay in float64; `transformers`' loss is computed in float32, hence a plain log-softmax here.
    model = tiny(GPT2).double()
    expected_BCT = torch.zeros(RAGGED.response_mask_BCT.shape, dtype=torch.float64)
    for b, c, ids, start in rows(RAGGED):
        logp_LV = model(ids[None]).logits[0].log_softmax(-1)
        expected_BCT[b, c, : len(ids) - start] = logp_LV[torch.arange(start - 1, len(ids) - 1), ids[start:]]
    expected_loss = pl_loss(expected_BCT.sum(-1), RAGGED.mask_BC)
    expected = gradient_of(model, expected_loss)
    ways = itertools.product(("packed", "repeated"), (None, pick_all), (0, ALL_SHORT))
    for layout, select, short in ways:
        with patch.object(packing, "SHORT_TOKENS", short):
            scores = PreferenceScorer(model, layout=layout)(RAGGED, select).scores
        loss = pl_loss(scores.logp_BC, scores.mask_BC)
        gradient = gradient_of(model, loss)
        assert (scores.token_logp_BCT - expected_BCT).abs().max() < 1e-10
        assert (scores.logp_BC - expected_BCT.sum(-1)).abs().max() < 1e-10
        assert abs(loss - expected_loss) < 1e-10
        assert (gradient - expected).norm() < 1e-10 * expected.norm()


# Two CPU cores: a few dozen shapes take some seconds.
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_ragged_shapes(data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    responses = [data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)) for _ in prompts]
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    batch = make_batch(prompts, responses, seed=data.draw(st.integers(0, 99)), padding=padding)
    with torch.no_grad():
        expected_BC = plain_logp(SHARED_LLAMA.model, batch)
        output = SHARED_LLAMA(batch, pick_all)
        packed = SHARED_LLAMA(batch).scores
        alone = SHARED_LLAMA(batch.chosen_only()).scores
    torch.testing.assert_close(alone.logp_BC, expected_BC[:, :1], rtol=1e-5, atol=1e-4)
    assert output.pool is not None
    for scores in (packed, output.pool, output.scores):
        torch.testing.assert_close(scores.logp_BC, expected_BC, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(scores.token_logp_BCT.sum(-1), scores.logp_BC)
        assert (scores.length_BC == batch.length_BC).all()
    assert (packed.token_logp_BCT[~batch.response_mask_BCT] == 0).all()


SHARED_LLAMA = PreferenceScorer(tiny(LLAMA), layout="packed")


@pytest.mark.parametrize("short", [0, ALL_SHORT])
@pytest.mark.parametrize("two_phase", [False, True])
def test_a_candidate_is_alone_with_its_prompt(two_phase: bool, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHORT_TOKENS", short)
    select = pick_all if two_phase else None
    with torch.no_grad():
        whole_BC = SHARED_LLAMA(RAGGED, select).scores.logp_BC
        for columns in ([0, 1], [2, 0, 1], [1, 1, 0, 2, 3]):  # removed, reordered, added
            part = replace(
                RAGGED,
                response_ids_BCT=RAGGED.response_ids_BCT[:, columns],
                response_mask_BCT=RAGGED.response_mask_BCT[:, columns],
            )
            torch.testing.assert_close(
                SHARED_LLAMA(part, select).scores.logp_BC, whole_BC[:, columns], rtol=1e-5, atol=1e-5
            )
        alone = [part.logp_BC for part in (SHARED_LLAMA(one, select).scores for one in split(RAGGED))]
    for row_1C, expected_C in zip(alone, whole_BC, strict=True):
        torch.testing.assert_close(row_1C[0], expected_C, rtol=1e-5, atol=1e-5)


def split(batch: Batch) -> list[Batch]:
    names = ("index_B", "prompt_ids_BP", "prompt_mask_BP", "response_ids_BCT", "response_mask_BCT")
    return [
        replace(batch, ids=[batch.ids[i]], **{name: getattr(batch, name)[i : i + 1] for name in names})
        for i in range(len(batch.ids))
    ]


def test_selection_sees_the_pool_and_the_picks_are_trained() -> None:
    """The k picks may differ in number and order from prompt to prompt."""
    picks = Picks(torch.tensor([[2, 0], [1, 0], [0, 2]]), torch.tensor([[True, True], [True, False], [True, True]]))
    seen: list[CandidateScores] = []

    def select(pool: CandidateScores) -> Picks:
        seen.append(pool)
        return picks

    output = SHARED_LLAMA(RAGGED, select)
    expected_BC = plain_logp(SHARED_LLAMA.model, RAGGED)
    assert output.pool is seen[0] and output.picks is picks and output.select_seconds > 0
    assert not output.pool.logp_BC.requires_grad
    torch.testing.assert_close(output.pool.logp_BC, expected_BC.detach(), rtol=1e-5, atol=1e-5)
    chosen_and_picks_BC = torch.stack([expected_BC[0, [0, 3, 1]], expected_BC[1, [0, 2, 1]], expected_BC[2, [0, 1, 3]]])
    chosen_and_picks_BC = chosen_and_picks_BC * torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(output.scores.logp_BC, chosen_and_picks_BC, rtol=1e-5, atol=1e-5)
    gradient = gradient_of(SHARED_LLAMA, pl_loss(output.scores.logp_BC, output.scores.mask_BC))
    expected = gradient_of(SHARED_LLAMA, pl_loss(chosen_and_picks_BC, output.scores.mask_BC))
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_one_token_responses() -> None:
    batch = make_batch([4, 2], [[1, 1, 1], [1, 1]])
    assert_all_ways_agree(tiny(LLAMA), batch, 1e-5)


def test_gradient_checkpointing_leaves_no_cache() -> None:
    """So the picks bring their prompt in one row; the pool, which needs no checkpoints, is scored off a cache."""
    model = tiny(LLAMA)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    scorer = PreferenceScorer(model, layout="packed")
    fed = lengths_fed(scorer)
    scorer(RAGGED, pick_all)
    assert fed == [12, 7, max(9 + 2 + 0 + 3 + 1, 3 + 1 + 4 + 0, 12 + 0 + 1 + 2 + 4)]
    assert all(module.training for module in scorer.modules())


def lengths_fed(scorer: PreferenceScorer) -> list[int]:
    """Fills with the length of each row that the model is given."""
    fed: list[int] = []
    scorer.model.model.embed_tokens.register_forward_hook(lambda _module, args, _output: fed.append(args[0].shape[1]))
    return fed


def test_lora() -> None:
    model = get_peft_model(tiny(LLAMA), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide half of the gradients
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.eval()
    assert_all_ways_agree(model, RAGGED, 1e-5)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("layout", ["packed", "repeated"])
def test_autocast_gives_float32(layout: str, checkpoints: bool) -> None:
    model = tiny(LLAMA)
    scorer = PreferenceScorer(model, "mean", layout)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with torch.autocast("cpu", torch.bfloat16):
        output = scorer(RAGGED, pick_all)
    assert output.pool is not None and output.pool.features_BCD is not None
    assert output.scores.logp_BC.dtype == output.pool.features_BCD.dtype == torch.float32
    gradient = gradient_of(model, pl_loss(output.scores.logp_BC, output.scores.mask_BC))
    # bfloat16 keeps eight bits: logits of a few nats are right to some hundredths a token.
    expected_BC = plain_logp(model, RAGGED)
    error_BC = (output.scores.logp_BC - expected_BC).abs()
    assert (error_BC <= 0.1 * RAGGED.length_BC).all() and error_BC.max() > 0
    # Autocast keeps its casts of weights: PyTorch before 2.11 kept those of the pool's pass without their gradients.
    expected = gradient_of(model, pl_loss(expected_BC, RAGGED.mask_BC))
    assert (gradient - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize(("layout", "short"), [("packed", 0), ("packed", ALL_SHORT), ("repeated", 0)])
@pytest.mark.parametrize("features", ["mean", "last"])
def test_features_are_the_states_that_predict_the_response(
    layout: str, short: int, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SHORT_TOKENS", short)
    scorer = PreferenceScorer(tiny(LLAMA), features, layout)
    with torch.no_grad():
        one_pass = scorer(RAGGED).scores.features_BCD
    assert scorer(RAGGED).scores.features_BCD is None  # gradients are recorded: a training pass
    pool = scorer(RAGGED, pick_all).pool
    assert pool is not None and pool.features_BCD is not None
    for b, c, ids, start in rows(RAGGED):
        with torch.no_grad():
            hidden_LD = scorer.model.model(ids[None]).last_hidden_state[0, start - 1 : -1]
        expected_D = hidden_LD.mean(0) if features == "mean" else hidden_LD[-1]
        torch.testing.assert_close(pool.features_BCD[b, c], expected_D, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one_pass[b, c], expected_D, rtol=1e-4, atol=1e-5)


HEADS = {
    "plain": LLAMA,
    "biased": PhiConfig(**{k: getattr(LLAMA, k) for k in SHAPE}),
    "scaled": GraniteConfig(**{k: getattr(LLAMA, k) for k in SHAPE}, logits_scaling=3.0, tie_word_embeddings=False),
    "capped": Gemma2Config(
        **{k: getattr(LLAMA, k) for k in SHAPE}, final_logit_softcapping=2.0, head_dim=8, tie_word_embeddings=False
    ),
}


@pytest.mark.parametrize("layout", ["packed", "repeated"])
@pytest.mark.parametrize("head", HEADS)
def test_head_features_are_gradients_at_the_output_matrix(layout: str, head: str) -> None:
    """Gram matrix against the gradients themselves, by autograd through the plain forward."""
    model = tiny(HEADS[head])
    pool = PreferenceScorer(model, "head", layout)(RAGGED, pick_all).pool
    assert pool is not None and pool.gram_BCC is not None
    logp_BC = plain_logp(model, RAGGED)
    for b in range(len(RAGGED.ids)):
        there = RAGGED.mask_BC[b].nonzero()[:, 0].tolist()
        gradients = [torch.autograd.grad(logp_BC[b, c], model.lm_head.weight, retain_graph=True)[0] for c in there]
        stacked = torch.stack(gradients).flatten(1).double()
        expected = stacked @ stacked.T
        gram = pool.gram_BCC[b][there][:, there].double()
        assert (gram - expected).norm() <= 1e-4 * expected.norm()


def test_head_features_refuse_an_adapted_output_matrix() -> None:
    model = get_peft_model(tiny(LLAMA), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match="output matrix without an adapter"):
        PreferenceScorer(model, "head")


def test_only_positions_that_predict_meet_the_output_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once: the prompt's last state serves all first tokens, and no chunk is larger than allowed."""
    monkeypatch.setattr(head, "STORED_ELEMENTS", 0)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    model = tiny(LLAMA)
    scorer = PreferenceScorer(model, layout="packed")
    met: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: met.append(args[0].shape[:-1].numel()))
    logp_BC = scorer(RAGGED).scores.logp_BC
    assert sum(met) == len(RAGGED.ids) + int((RAGGED.length_BC - RAGGED.mask_BC.long()).sum())
    assert max(met) == 4
    once = sum(met)
    gradient = gradient_of(model, logp_BC.sum())
    assert sum(met) == 2 * once  # the logits were not kept
    expected = gradient_of(model, plain_logp(model, RAGGED).sum())
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_few_logits_are_kept_for_backward() -> None:
    model = tiny(LLAMA)
    met: list[int] = []
    scorer = PreferenceScorer(model, layout="packed")
    model.lm_head.register_forward_hook(lambda _module, args, _output: met.append(args[0].shape[:-1].numel()))
    gradient_of(model, scorer(RAGGED).scores.logp_BC.sum())
    assert met == [len(RAGGED.ids) + int((RAGGED.length_BC - RAGGED.mask_BC.long()).sum())]


def test_prompts_are_fed_once_and_responses_lie_tight() -> None:
    """Prompts, the ragged pool end to end, then the picks, here all of it: no token is fed that predicts nothing."""
    scorer = PreferenceScorer(tiny(LLAMA), layout="packed")
    fed = lengths_fed(scorer)
    scorer(RAGGED)
    longest = max(2 + 0 + 3 + 1, 1 + 4 + 0, 0 + 1 + 2 + 4)
    assert fed == [12, longest]
    fed.clear()
    scorer(RAGGED, pick_all)
    assert fed == [12, longest, longest]


def test_long_responses_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of at most two responses of five tokens: the same log-probs, gradient and features as in one row."""
    for features in ("mean", "last", "head"):
        scorer = PreferenceScorer(tiny(LLAMA), features, layout="packed")
        whole = scorer(RAGGED, pick_all)
        expected = gradient_of(scorer, pl_loss(whole.scores.logp_BC, whole.scores.mask_BC))
        with monkeypatch.context() as patched:
            patched.setattr(packing, "ROW_TOKENS", 10)
            fed = lengths_fed(scorer)
            output = scorer(RAGGED, pick_all)
        assert fed == [12, 5, 6, 5, 6]
        assert whole.pool is not None and output.pool is not None
        for name in ("logp_BC", "token_logp_BCT", "gram_BCC" if features == "head" else "features_BCD"):
            value = getattr(whole.pool, name)
            torch.testing.assert_close(getattr(output.pool, name), value, rtol=1e-5, atol=1e-5)
        gradient = gradient_of(scorer, pl_loss(output.scores.logp_BC, output.scores.mask_BC))
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("layout", ["packed", "repeated"])
def test_a_part_that_no_prompt_has_a_candidate_in(layout: Literal["packed", "repeated"]) -> None:
    """Short pools, or a selector that takes fewer than k, leave the last picks of every prompt empty."""
    scorer = PreferenceScorer(tiny(LLAMA), "mean", layout)
    index_BK, mask_BK = torch.zeros(3, 4, dtype=torch.int64), torch.arange(4).expand(3, -1) < 1
    expected = scorer(RAGGED.take(Picks(index_BK[:, :1], mask_BK[:, :1]))).scores.logp_BC
    with patch.object(packing, "ROW_TOKENS", 5):
        found = scorer(RAGGED.take(Picks(index_BK, mask_BK))).scores.logp_BC
    torch.testing.assert_close(found, torch.nn.functional.pad(expected, (0, 3)), rtol=1e-5, atol=1e-5)


class DeviceWaits(TorchDispatchMode):
    """Counts what would have the host wait for a GPU: values read, and sizes that depend on values."""

    WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        booleans = function.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += booleans or function.overloadpacket in self.WAITS
        return function(*args, **kwargs or {})


class Kernels(TorchDispatchMode):
    """Counts operations that give new numbers: views and shapes launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += isinstance(found, Tensor) and not found._is_view()
        return found


def test_a_step_waits_for_the_device_where_a_size_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the length of the pool's row, of the longest pick and of the picks' row; backward never."""
    scorer = PreferenceScorer(tiny(LLAMA), "mean", "packed")
    lists: list[Tensor] = []
    plain = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: [lists.append(tensor), plain(tensor)][1])
    with DeviceWaits() as waits:
        logp_BC = scorer(RAGGED, pick_all).scores.logp_BC
        logp_BC.sum().backward()
    assert waits.count + len(lists) == 3


def test_short_prompts_lie_beside_their_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row for the pool and one for the picks, unless processes must take the same passes; SFT is plain text."""
    monkeypatch.setattr(packing, "SHORT_TOKENS", RAGGED.prompt_ids_BP.numel() + 1)
    scorer = PreferenceScorer(tiny(LLAMA), layout="packed")
    fed = lengths_fed(scorer)
    scorer(RAGGED, pick_all)
    assert fed == [max(9 + 2 + 0 + 3 + 1, 3 + 1 + 4 + 0, 12 + 0 + 1 + 2 + 4)] * 2
    fed.clear()
    scorer(RAGGED.chosen_only())
    assert fed == [max(9 + 2, 3 + 1, 12 + 0)]
    fed.clear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    scorer(RAGGED)
    assert fed == [12, max(2 + 0 + 3 + 1, 1 + 4 + 0, 0 + 1 + 2 + 4)]


def test_one_row_asks_for_hardly_more_kernels_than_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card a small model's step takes as long as its launches: a pass of their own for the prompts doubles it."""
    deeper = copy.deepcopy(LLAMA)
    deeper.num_hidden_layers = 12

    def kernels(layout: Literal["packed", "repeated"], short: int) -> int:
        monkeypatch.setattr(packing, "SHORT_TOKENS", short)
        scorer = PreferenceScorer(tiny(deeper), layout=layout)
        with Kernels() as kernels:
            scorer(RAGGED).scores.logp_BC.sum().backward()
        return kernels.count

    plain = kernels("repeated", 0)
    assert kernels("packed", ALL_SHORT) < 1.2 * plain
    assert kernels("packed", 0) > 1.8 * plain


@pytest.mark.parametrize("layout", ["packed", "repeated"])
def test_a_log_prob_that_is_not_finite_names_its_example(layout: str) -> None:
    scorer = PreferenceScorer(tiny(LLAMA), layout=layout)
    batch = make_batch([4, 3], [[2, 2], [2, 2]])
    poisoned = int(batch.response_ids_BCT[1, 1, 0])
    assert (batch.prompt_ids_BP != poisoned).all() and (batch.response_ids_BCT[0] != poisoned).all()
    with torch.no_grad():
        scorer.model.model.embed_tokens.weight[poisoned] = torch.nan
    with torch.no_grad(), pytest.raises(UserError, match="example-1") as error:
        scorer(batch)
    assert "example-0" not in str(error.value)


def test_the_probe_sees_a_mask_that_is_silently_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention adds whatever mask it is given, so a boolean one raises nothing and hides nothing."""
    model = tiny(LLAMA, "eager")
    assert PreferenceScorer(model).packed
    right = scoring.attention_mask

    def boolean(causal_lm: PreTrainedModel, *rows: object) -> Tensor:
        return right(causal_lm, *rows) == 0

    monkeypatch.setattr(scoring, "attention_mask", boolean)
    with pytest.warns(UserWarning, match="relative error"):
        assert not PreferenceScorer(model).packed


def test_the_probe_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right log-probs are not enough: here the cache is cut off from the prompt's weights."""
    encode = PreferenceScorer._encode

    def detached(scorer: PreferenceScorer, batch: Batch) -> object:
        prompt = encode(scorer, batch)
        for layer in prompt.cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return prompt

    monkeypatch.setattr(PreferenceScorer, "_encode", detached)
    with pytest.warns(UserWarning, match="relative error"):
        assert not PreferenceScorer(tiny(LLAMA)).packed


def test_the_probe_packs_a_new_adapter_whichever_of_its_weights_it_compares() -> None:
    """Of `up_proj` the smaller half is A, whose gradients are 0 while B is."""
    adapted = get_peft_model(tiny(LLAMA), LoraConfig(target_modules=["up_proj"], r=4))
    for elements in (1, 10**6):
        with patch.object(probe, "GRADIENT_ELEMENTS", elements):
            assert PreferenceScorer(adapted, layout="packed").packed


def test_the_probe_leaves_no_trace() -> None:
    model = tiny(LLAMA)
    model.train()
    before = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PreferenceScorer(model).packed
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def train_distributed(rank: int, way: str, port: int, place: str) -> None:
    """Three steps of the two-phase scorer, each process on its half of the batch; rank 0 writes the mean losses."""
    torch.set_num_threads(1)
    here = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", here, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    scorer: torch.nn.Module = PreferenceScorer(tiny(LLAMA), "mean", "packed")
    if way == "ddp":
        scorer = DistributedDataParallel(scorer)
    else:
        for layer in scorer.model.model.layers:
            fully_shard(layer)
        fully_shard(scorer)
    losses = torch.tensor(train(scorer, [HALVES[rank]]))
    dist.all_reduce(losses)
    if rank == 0:
        torch.save(losses / 2, place)
    del scorer  # before the group, or DDP's reducer would end it with the GIL held, which gloo's threads may wait for
    dist.destroy_process_group()


def train(scorer: torch.nn.Module, parts: list[Batch]) -> list[float]:
    optimizer = torch.optim.SGD(scorer.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            scores = scorer(part, pick_all).scores
            loss = pl_loss(scores.logp_BC, scores.mask_BC) / len(parts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


HALVES = [make_batch([9, 3], [[3, 1, 4, 2], [2, 5, 1]], seed=1), make_batch([5, 12], [[1, 1, 2], [4, 2, 3, 5]], seed=2)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_like_one(way: str, tmp_path: Path) -> None:
    """Both phases go through one forward of the wrapped module, so gradients are averaged and shards are gathered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_distributed, (way, port, str(tmp_path / "losses")), nprocs=2)
    found = torch.load(tmp_path / "losses")
    expected = torch.tensor(train(PreferenceScorer(tiny(LLAMA), "mean", "packed"), HALVES))
    assert expected[2] < expected[0] / 2  # it learned, so later losses depend on earlier gradients
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_no_generator_hands_over_with_gradients_off() -> None:
    """`torch.no_grad()` is the thread's: around a `yield` it would hold for whoever takes what is yielded."""

    def off(node: ast.AST) -> bool:
        heads = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
        heads += node.decorator_list if isinstance(node, ast.FunctionDef) else []
        return any(re.search("no_grad|inference_mode|set_grad_enabled", ast.unparse(head)) for head in heads)

    files = sorted((ROOT / "massdpo").rglob("*.py"))
    blocks = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))) if off(node)]
    assert len(blocks) > 5
    for file, node in blocks:
        assert not [part for part in ast.walk(node) if isinstance(part, ast.Yield | ast.YieldFrom)], file
