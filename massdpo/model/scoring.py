"""The shared-prefix engine: log-probs and features of a prompt's C candidate responses for the price of one prompt.

A prompt's responses share it, so it is encoded once, and the responses lie end to end in one row behind its cache: a
mask lets each see the prompt and itself, and positions restart at the prompt's end. A response's last token predicts
nothing, so it is never fed. With a selection the pool is scored off the cache without gradients, then the picks with
them. Gradient checkpointing leaves no cache: then prompt and responses share one row, and a selection takes two passes.

Suffixes: B prompts, C candidates (column 0 is the chosen one), P prompt tokens, T response tokens, L tokens of a row,
Q and K query and key tokens, D hidden units, V vocabulary (W columns of it), M tokens of a whole batch end to end,
R prompt-and-response pairs, U any positions.
"""

import copy
import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from massdpo.errors import UserError
from massdpo.model.features import head_kernel, last_features, mean_features
from massdpo.model.packing import Prompt, Row, attention_mask
from massdpo.model.trie import Catalogue
from massdpo.tensors import Batch, Picks, Scored, Scores

CHUNK_ELEMENTS = 2**24  # at most this many logits exist at a time: 64 MB in float32
STORED_ELEMENTS = 2**22  # so many are kept for backward, 16 MB, which is cheaper than to make them anew
SHORT_TOKENS = 256  # a batch's prompts with fewer tokens cost less beside the responses than in a pass of their own
PROBE_ELEMENTS = 2**22  # gradients of at most this many weights are compared when a scorer is built

Select = Callable[[Scores], Picks]


class PreferenceScorer(nn.Module):
    """Scores the candidate responses of a batch of prompts with a causal language model.

    `features` names what is computed of each candidate besides its log-prob: the `mean` or `last` of the hidden states
    that predict the response, the Gram matrix of the gradients at the output matrix (`head`), or nothing. `layout` is
    how tokens are laid out: `packed` shares the prompt, `repeated` feeds it once a response, `auto` packs where the
    architecture allows it and warns where it does not. Everything goes through `forward`, so that the scorer can be
    wrapped for distributed training.

    Raises `UserError` where the model allows no packing (`layout="packed"`) or has no plain output matrix (`head`).
    """

    def __init__(
        self,
        model: nn.Module,
        features: str | None = None,
        layout: Literal["auto", "packed", "repeated"] = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = self.causal_lm._no_split_modules  # Accelerate's FSDP asks which layers are units
        if features == "head" and not isinstance(self.causal_lm.get_output_embeddings(), nn.Linear):
            raise UserError("features=head needs an output matrix without an adapter: use mean or last")
        self.features = features
        self.packed = layout != "repeated"
        if self.packed and (misfit := _misfit(self)):
            name = f"{type(self.causal_lm).__name__} with {self.causal_lm.config._attn_implementation} attention"
            if layout == "packed":
                raise UserError(f"{name} cannot share prompts ({misfit}): set layout=auto or layout=repeated")
            warnings.warn(f"{name} cannot share prompts ({misfit}): each response repeats its prompt", stacklevel=1)
            self.packed = False

    def forward(self, batch: Batch, select: Select | None = None, catalogue: Catalogue | None = None) -> Scored:
        """Score every candidate of the batch, or, with `select`, the chosen response and the negatives it picks.

        `select` sees the scores of the whole pool, computed without gradients under the current weights, features
        included. Without `select`, features come with the scores where no gradients are recorded. With `catalogue`,
        its responses are scored behind each prompt instead of the batch's own (no log-probs of single tokens).

        Raises `UserError` naming the examples where a log-prob is not finite.
        """
        if catalogue is not None:
            return Scored(self._against(batch, catalogue))
        checkpoints = self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        prompt = self._encode(batch) if self.packed and not checkpoints and _worth_a_pass(batch) else None
        if select is None:
            return Scored(self._score(batch, None if torch.is_grad_enabled() else self.features, prompt))
        started = time.perf_counter()
        with torch.no_grad():
            pool = self._score(batch, self.features, prompt)
            with self._exact:
                picks = select(pool)
        seconds = time.perf_counter() - started
        return Scored(self._score(batch.take(picks), None, prompt), pool, picks, seconds)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The `transformers` model itself, under the adapter where there is one."""
        return self.model if isinstance(self.model, PreTrainedModel) else cast(Any, self.model).get_base_model()

    def _score(self, batch: Batch, features: str | None, prompt: Prompt | None) -> Scores:
        if self.packed:
            end_BD, rest_MD = self._one_row(batch) if prompt is None else self._continued(batch, prompt)
            token_logp_BCT = self._token_logp(batch, end_BD, rest_MD)
            hidden_BCTD = _spread(batch, end_BD, rest_MD) if features is not None else None
        else:
            token_logp_BCT, hidden_BCTD = self._repeated(batch, features is not None)
        logp_BC = token_logp_BCT.sum(-1)
        _check_finite(batch, logp_BC)
        scores = Scores(logp_BC, token_logp_BCT, batch.length_BC, batch.mask_BC)
        if hidden_BCTD is None:
            return scores
        with self._exact:
            self._add_features(scores, batch, features, hidden_BCTD)
        return scores

    def _against(self, batch: Batch, catalogue: Catalogue) -> Scores:
        """Every response of a catalogue behind each prompt, a part of them at a time."""
        size = len(batch.ids)
        logp_BI = torch.zeros(size, len(catalogue.length_I), device=batch.prompt_ids_BP.device)
        if self.packed:
            prompt = self._encode(batch)
            for part in catalogue.parts:
                row = part.row(prompt)
                hidden_BMD = self._decode(row, part.mask(self.causal_lm, prompt, row), prompt.branch())
                source_UD = torch.cat([prompt.end_BD[:, None], hidden_BMD], dim=1).flatten(0, 1)
                logp_UC = self._logp(source_UD, part.target_UC.repeat(size, 1))
                logp_BI[:, part.index_N] = part.response_logp(logp_UC.view(size, *part.target_UC.shape))
        else:
            for index_N, few in catalogue.behind(batch):
                logp_BI[:, index_N] = self._repeated(few, False)[0].sum(-1)
        _check_finite(batch, logp_BI)
        length_BI = catalogue.length_I.expand(size, -1)
        return Scores(logp_BI, logp_BI.new_zeros(*logp_BI.shape, 0), length_BI, length_BI > 0)

    @property
    def _exact(self) -> torch.autocast:
        """Autocast would round features and their Gram matrices to bfloat16."""
        return torch.autocast(self.causal_lm.device.type, enabled=False)

    def _add_features(self, scores: Scores, batch: Batch, features: str | None, hidden_BCTD: Tensor) -> None:
        if features == "head":
            output = cast(nn.Linear, self.causal_lm.get_output_embeddings())
            targets = batch.response_mask_BCT, batch.response_ids_BCT
            scores.gram_BCC = head_kernel(hidden_BCTD, *targets, output.weight, output.bias, self._logit_transform)
        else:
            pooled = mean_features if features == "mean" else last_features
            scores.features_BCD = pooled(hidden_BCTD, batch.response_mask_BCT)

    # Three ways to lay out tokens. The packed ones give the hidden states that predict a response's first token (the
    # prompt's last state, shared by all of a prompt's candidates) and its other tokens.

    def _encode(self, batch: Batch) -> Prompt:
        """The prompts alone, with their cache. Their padding is on the right, where a causal mask alone hides it."""
        row = Row.of(batch, prompt=True, responses=False)
        cache = DynamicCache()  # made without a config, it keeps every token in every layer: the masks do the windowing
        hidden_BPD = self._decode(row, None, cache)
        return Prompt(row, _prompt_end(batch, hidden_BPD), cache)

    def _continued(self, batch: Batch, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """All responses in one row, off the prompts' cache."""
        row = Row.of(batch, prompt=False, responses=True)
        hidden_BLD = self._decode(row, attention_mask(self.causal_lm, row, prompt.row, row), prompt.branch())
        return prompt.end_BD, hidden_BLD[row.fed_BL]

    def _one_row(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompt and all responses in one row, which asks for no cache. One response alone makes plain text."""
        row = Row.of(batch, prompt=True, responses=True)
        mask = None if batch.response_ids_BCT.shape[1] == 1 else attention_mask(self.causal_lm, row, row)
        hidden_BLD = self._decode(row, mask, None)
        return _prompt_end(batch, hidden_BLD), hidden_BLD[row.fed_BL]

    def _decode(self, row: Row, mask: Tensor | dict[str, Tensor] | None, cache: DynamicCache | None) -> Tensor:
        """The last hidden states of a row. Without a mask it is plain text, which the model masks and counts itself."""
        positions = {"position_ids": None if mask is None else row.position_BL}
        options = {"attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
        return self.causal_lm.base_model(input_ids=row.ids_BL, **positions, **options).last_hidden_state

    def _repeated(self, batch: Batch, states: bool) -> tuple[Tensor, Tensor | None]:
        """The plain way: every candidate behind a copy of its prompt, through the model's own forward."""
        b_R, c_R = batch.mask_BC.nonzero(as_tuple=True)
        prompt_length_R = batch.prompt_mask_BP.sum(-1)[b_R]
        length_R = prompt_length_R + batch.length_BC[b_R, c_R]
        longest = int(length_R.max())
        ids_RL = batch.prompt_ids_BP[:, :1].repeat(1, longest)[b_R]
        r_M, p_M = batch.prompt_mask_BP[b_R].nonzero(as_tuple=True)
        ids_RL[r_M, p_M] = batch.prompt_ids_BP[b_R[r_M], p_M]
        r_M, t_M = batch.response_mask_BCT[b_R, c_R].nonzero(as_tuple=True)
        target_M = batch.response_ids_BCT[batch.response_mask_BCT]
        column_M = prompt_length_R[r_M] + t_M
        ids_RL[r_M, column_M] = target_M
        mask_RL = (torch.arange(longest, device=ids_RL.device) < length_R[:, None]).long()
        options: dict[str, Any] = {"use_cache": False, "output_hidden_states": states}
        start = 0
        if "logits_to_keep" in inspect.signature(self.causal_lm.forward).parameters:
            start = int(prompt_length_R.min()) - 1  # the shortest prompt's last token: no logits are needed before it
            options["logits_to_keep"] = longest - start
        output = self.model(input_ids=ids_RL, attention_mask=mask_RL, **options)
        logp_M = _target_logp(output.logits[r_M, column_M - 1 - start], target_M[:, None])[:, 0]
        token_logp_BCT = _scatter(batch.response_mask_BCT, logp_M)
        if not states:
            return token_logp_BCT, None
        return token_logp_BCT, _scatter(batch.response_mask_BCT, output.hidden_states[-1][r_M, column_M - 1])

    # From hidden states to log-probs.

    def _token_logp(self, batch: Batch, end_BD: Tensor, rest_MD: Tensor) -> Tensor:
        """Log-probs of the response tokens `(B, C, T)`, 0 where there is none. Each position is scored once."""
        fed_BCT, ids_BCT = batch.response_mask_BCT[..., 1:], batch.response_ids_BCT
        # A prompt's last state predicts the first tokens of all its responses, every other state one token.
        rest_M = ids_BCT[..., 1:][fed_BCT]
        target_UC = torch.cat([ids_BCT[..., 0], rest_M[:, None].expand(-1, ids_BCT.shape[1])])
        logp_UC = self._logp(torch.cat([end_BD, rest_MD]), target_UC)
        first_BC = logp_UC[: len(end_BD)].masked_fill(~batch.mask_BC, 0.0)
        return torch.cat([first_BC[..., None], _scatter(fed_BCT, logp_UC[len(end_BD) :, 0])], dim=-1)

    def _logp(self, hidden_UD: Tensor, target_UC: Tensor) -> Tensor:
        """Log-probs of targets at each position; many logits exist a chunk at a time, and backward makes them anew."""
        vocabulary = self.causal_lm.config.get_text_config().vocab_size
        if len(hidden_UD) * vocabulary <= STORED_ELEMENTS:
            return self._chunk_logp(hidden_UD, target_UC)
        size = max(1, CHUNK_ELEMENTS // vocabulary)
        chunks = zip(hidden_UD.split(size), target_UC.split(size), strict=True)
        return torch.cat([checkpoint(self._chunk_logp, *chunk, use_reentrant=False) for chunk in chunks])

    def _chunk_logp(self, hidden_UD: Tensor, target_UC: Tensor) -> Tensor:
        return _target_logp(_forward_from(self.causal_lm, hidden_UD, {}), target_UC)

    def _logit_transform(self, raw_UW: Tensor) -> Tensor:
        """What the model does to some columns of the output matrix's products: soft-cap, scale."""
        output = self.causal_lm.get_output_embeddings()
        name = next(name for name, child in self.causal_lm.named_children() if child is output)
        return _forward_from(self.causal_lm, raw_UW, {name: nn.Identity()})


def _worth_a_pass(batch: Batch) -> bool:
    """Whether to encode the prompts once, ahead of their responses.

    Several processes answer alike, whatever prompts each of them holds: weights that are sharded layer by layer want
    the same passes from all.
    """
    if batch.response_ids_BCT.shape[1] == 1:
        return False
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several or batch.prompt_ids_BP.numel() >= SHORT_TOKENS


class _Given(nn.Module):
    """Stands in for a decoder whose output is known already."""

    def forward(self, input_ids: None = None, inputs_embeds: Tensor | None = None, **_: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=cast(Any, inputs_embeds))


def _forward_from(causal_lm: PreTrainedModel, hidden_UD: Tensor, replaced: dict[str, nn.Module]) -> Tensor:
    """Logits by the model's own forward over its own weights, but with its decoder's output given."""
    head = copy.copy(causal_lm)
    head._modules = {**causal_lm._modules, causal_lm.base_model_prefix: _Given(), **replaced}
    return head(inputs_embeds=hidden_UD[None]).logits[0]


def _check_finite(batch: Batch, logp_BC: Tensor) -> None:
    finite_B = torch.isfinite(logp_BC).all(-1)
    if not finite_B.all():
        names = ", ".join(name for name, finite in zip(batch.ids, finite_B.tolist(), strict=True) if not finite)
        raise UserError(f"log-probs that are not finite ({names}): lower the learning rate or check the weights")


def _target_logp(logits_UV: Tensor, target_UC: Tensor) -> Tensor:
    return _float(logits_UV).log_softmax(-1).gather(-1, target_UC)


def _prompt_end(batch: Batch, hidden_BLD: Tensor) -> Tensor:
    return hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), batch.prompt_mask_BP.sum(-1) - 1]


def _spread(batch: Batch, end_BD: Tensor, rest_MD: Tensor) -> Tensor:
    """The states that predict each response token, `(B, C, T, D)`."""
    first_BCD = _float(end_BD)[:, None].expand(*batch.mask_BC.shape, -1)
    return torch.cat([first_BCD[:, :, None], _scatter(batch.response_mask_BCT[..., 1:], rest_MD)], dim=2)


def _scatter(mask_BCT: Tensor, value_M: Tensor) -> Tensor:
    """Values where the mask is True, 0 elsewhere; a value may have further dimensions."""
    value_M = _float(value_M)
    tail = value_M.shape[1:]
    return value_M.new_zeros(mask_BCT.shape + tail).masked_scatter(
        mask_BCT.view(mask_BCT.shape + (1,) * len(tail)), value_M
    )


def _float(value: Tensor) -> Tensor:
    """Float32, or finer where the model is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _misfit(scorer: PreferenceScorer) -> str:
    """Why packed rows miss the log-probs and gradients of the model's own forward on a tiny batch, or nothing."""
    causal_lm = scorer.causal_lm
    device, training, features = causal_lm.device, scorer.model.training, scorer.features
    batch = _probe_batch(causal_lm.config.get_text_config().vocab_size).to(device)
    weight_BC = torch.linspace(1, 2, batch.mask_BC.numel(), device=device).view(batch.mask_BC.shape)
    # The smallest weights are enough: their gradients have passed through all that lies above them.
    weights: list[Tensor] = []
    for weight in sorted((w for w in scorer.model.parameters() if w.requires_grad), key=torch.numel):
        if not weights or sum(w.numel() for w in weights) + weight.numel() <= PROBE_ELEMENTS:
            weights.append(weight)

    def outcome(packed: bool, score: Callable[[], Scores]) -> list[Tensor]:
        scorer.packed = packed
        logp_BC = score().logp_BC
        if not weights:
            return [logp_BC]
        gradients = torch.autograd.grad((logp_BC * weight_BC).sum(), weights, materialize_grads=True)
        return [logp_BC.detach(), torch.cat([gradient.flatten() for gradient in gradients])]

    def two_phases() -> Scores:
        prompt = scorer._encode(batch)
        with torch.no_grad():
            scorer._score(batch, None, prompt)
        return scorer._score(batch, None, prompt)

    tolerance = max(torch.finfo(causal_lm.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    scorer.model.eval()
    scorer.features = None
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            own = outcome(False, lambda: scorer(batch).scores)
            try:
                ways = [outcome(True, two_phases), outcome(True, lambda: scorer._score(batch, None, None))]
            except Exception as error:  # whatever a stranger's forward raises when handed a mask that it does not know
                return f"{type(error).__name__}: {error}".splitlines()[0]
            errors = [((a - b).norm() / b.norm()).item() for way in ways for a, b in zip(way, own, strict=True)]
            return "" if all(error <= tolerance for error in errors) else f"relative error {max(errors):.1g}"
    finally:
        scorer.model.train(training)
        scorer.packed, scorer.features = True, features


def _probe_batch(vocabulary: int) -> Batch:
    """Two ragged prompts with three and two ragged responses."""
    prompt_mask_BP = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    response_mask_BCT = torch.arange(3) < torch.tensor([[3, 1, 2], [2, 3, 0]])[..., None]
    ids = (torch.arange(28) * 7 + 3) % vocabulary
    ids_BP, ids_BCT = ids[:10].view(2, 5), ids[10:].view(2, 3, 3)
    names = ["first prompt of the probe", "second prompt of the probe"]
    return Batch(names, torch.arange(2), ids_BP, prompt_mask_BP, ids_BCT, response_mask_BCT)
