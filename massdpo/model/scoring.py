"""The shared-prefix engine: log-probs and features of a prompt's C candidate responses for the price of one prompt.

A prompt's responses share it, so it is encoded once, and the responses lie end to end in one row behind its cache: a
mask lets each see the prompt and itself, and positions restart at the prompt's end. A response's last token predicts
nothing, so it is never fed. With a selection the pool is scored off the cache without gradients, then the picks with
them. Long responses are scored some at a time, which bounds memory and the attention wasted on what no token sees.
Gradient checkpointing leaves no cache: then the picks share one row with their prompt, which is encoded again for them.

Suffixes: B prompts, C candidates (column 0 is the chosen one), T response tokens, L tokens of a row, D hidden units,
M fed response tokens of a whole batch end to end.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel

from massdpo.errors import UserError
from massdpo.model.features import head_kernel, last_features, mean_features
from massdpo.model.flex import Flex
from massdpo.model.head import decoder_name, logit_transform, predicting_states, prompt_end, states_logp, token_logp
from massdpo.model.packing import Masks, Prompt, ResponseRow, Row, attention_mask, in_parts, precision, worth_a_pass
from massdpo.model.plain import repeated_prompts
from massdpo.model.probe import misfit
from massdpo.model.trie import Catalogue
from massdpo.tensors import Batch, CandidateScores, Picks, ScorerOutput

Select = Callable[[CandidateScores], Picks]
SomeRow = TypeVar("SomeRow", bound=Row)


class PreferenceScorer(nn.Module):
    """Scores the candidate responses of a batch of prompts with a causal language model.

    `features` names what is computed of each candidate besides its log-prob: the `mean` or `last` of the hidden states
    that predict the response, the Gram matrix of the gradients at the output matrix (`head`), or nothing. `layout` is
    how tokens are laid out: `packed` shares the prompt, `repeated` feeds it once per response, `auto` packs where the
    architecture allows it and warns where it does not. Everything goes through `forward`, so that the scorer can be
    wrapped for distributed training.

    Raises `UserError` where the model allows no packing (`layout="packed"`) or has no plain output matrix (`head`).
    """

    def __init__(
        self, model: nn.Module, features: str | None = None, layout: Literal["auto", "packed", "repeated"] = "auto"
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = self.causal_lm._no_split_modules  # Accelerate's FSDP asks which layers are units
        if features == "head" and not isinstance(self.causal_lm.get_output_embeddings(), nn.Linear):
            raise UserError("features=head needs an output matrix without an adapter: use mean or last")
        self.features = features
        self.flex = Flex()
        self.packed = layout != "repeated"
        if self.packed and (reason := self._misfit()):
            name = f"{type(self.causal_lm).__name__} with {self.causal_lm.config._attn_implementation} attention"
            if layout == "packed":
                raise UserError(f"{name} cannot share prompts ({reason}): set layout=auto or layout=repeated")
            warnings.warn(f"{name} cannot share prompts ({reason}): each response repeats its prompt", stacklevel=1)
            self.packed = False

    def forward(self, batch: Batch, select: Select | None = None, catalogue: Catalogue | None = None) -> ScorerOutput:
        """Score every candidate of the batch, or, with `select`, the chosen response and the negatives it picks.

        `select` sees the scores of the whole pool, computed without gradients under the current weights, features
        included. Without `select`, features come with the scores where no gradients are recorded. With `catalogue`,
        its responses are scored behind each prompt instead of the batch's own (no log-probs of single tokens).

        Raises `UserError` naming the examples where a log-prob is not finite; not where gradients are recorded, as the
        loss and the selectors check that, and looking here too would wait for the device once more.
        """
        if catalogue is not None:
            return ScorerOutput(self._score_catalogue(batch, catalogue))
        if select is None and torch.is_grad_enabled():
            tokens_B = self._tokens(batch)
            return ScorerOutput(self._score(batch, self._shared(batch)), fed_B=tokens_B, learned_B=tokens_B)
        if select is None:
            scores = self._without_gradients(batch, None)
            _check_finite(batch, scores.logp_BC)
            return ScorerOutput(scores, fed_B=self._tokens(batch))
        prompt = self._shared(batch)
        started = time.perf_counter()
        pool = self._without_gradients(batch, prompt)
        with torch.no_grad(), self._exact:
            picks = select(pool)
        picked = batch.take(picks)  # waits for the device, so that its time is counted
        seconds = time.perf_counter() - started
        learned_B = self._tokens(picked)
        fed_B = self._tokens(batch) + learned_B - (0 if prompt is None else batch.prompt_mask_BP.sum(-1))
        return ScorerOutput(self._score(picked, prompt), pool, picks, seconds, fed_B, learned_B)

    def _tokens(self, batch: Batch) -> Tensor:
        """Tokens that are fed for each prompt and its responses, `(B,)`."""
        times_B = 1 if self.packed else batch.mask_BC.sum(-1)
        return batch.prompt_mask_BP.sum(-1) * times_B + batch.length_BC.sum(-1)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The `transformers` model itself, under the adapter where there is one."""
        return self.model if isinstance(self.model, PreTrainedModel) else cast(Any, self.model).get_base_model()

    @property
    def _exact(self) -> torch.autocast:
        """Autocast would round features and their Gram matrices to bfloat16."""
        return torch.autocast(self.causal_lm.device.type, enabled=False)

    @property
    def _sharded(self) -> bool:
        return any(isinstance(weight, DTensor) for weight in self.parameters())

    def _misfit(self, times: int = 1) -> str:
        """Why prompts cannot be shared, or nothing."""

        def plain(batch: Batch) -> Tensor:
            return repeated_prompts(self.model, self.causal_lm, batch, states=False)[0].sum(-1)

        def one_row(batch: Batch) -> Tensor:
            return self._score(batch, None).logp_BC

        def two_phases(batch: Batch) -> Tensor:
            prompt = self._encode(batch)
            with torch.no_grad():
                self._score(batch, prompt)
            return self._score(batch, prompt).logp_BC

        return misfit(self.model, self.causal_lm, plain, [one_row, two_phases], times)

    @torch.no_grad()
    def _without_gradients(self, batch: Batch, prompt: Prompt | None) -> CandidateScores:
        """Scores and features of all candidates. In evaluation mode a model that checkpoints keeps its cache too."""
        training = self.model.training
        self.model.eval()
        scores = self._score(batch, prompt or self._shared(batch), self.features)
        self.model.train(training)
        return scores

    def _score(self, batch: Batch, prompt: Prompt | None, features: str | None = None) -> CandidateScores:
        parts = [self._score_some(some, prompt, features) for some in in_parts(batch, self._sharded)]
        token_logp_BCT = torch.cat([token_logp_BCT for token_logp_BCT, _ in parts], dim=1)
        logp_BC = token_logp_BCT.sum(-1)
        scores = CandidateScores(
            logp_BC, token_logp_BCT, batch.length_BC, batch.mask_BC, precision=precision(self.causal_lm)
        )
        if features == "head":
            output = cast(nn.Linear, self.causal_lm.get_output_embeddings())
            hidden_BCTD = torch.cat([cast(Tensor, hidden_BCTD) for _, hidden_BCTD in parts], dim=1)
            with self._exact:
                scores.gram_BCC = head_kernel(
                    hidden_BCTD,
                    batch.response_mask_BCT,
                    batch.response_ids_BCT,
                    output.weight,
                    output.bias,
                    partial(logit_transform, self.causal_lm),
                )
        elif features is not None:
            scores.features_BCD = torch.cat([cast(Tensor, features_BCD) for _, features_BCD in parts], dim=1)
        return scores

    def _score_catalogue(self, batch: Batch, catalogue: Catalogue) -> CandidateScores:
        """Every response of a catalogue behind each prompt, a part of them at a time."""
        size = len(batch.ids)
        logp_BI = torch.zeros(size, len(catalogue.length_I), device=batch.prompt_ids_BP.device)
        if self.packed:
            prompt = self._encode(batch)
            for part in catalogue.parts:
                row = part.row(prompt)
                hidden_BMD = self._decode(row, part.mask(self.causal_lm, prompt, row), prompt.branch())
                source_UD = torch.cat([prompt.end_BD[:, None], hidden_BMD], dim=1).flatten(0, 1)
                logp_UC = states_logp(self.causal_lm, source_UD, part.target_UC.repeat(size, 1))
                logp_BI[:, part.index_N] = part.response_logp(logp_UC.view(size, *part.target_UC.shape))
        else:
            for index_N, few in catalogue.behind(batch):
                logp_BI[:, index_N] = repeated_prompts(self.model, self.causal_lm, few, states=False)[0].sum(-1)
        _check_finite(batch, logp_BI)
        length_BI = catalogue.length_I.expand(size, -1)
        return CandidateScores(logp_BI, logp_BI.new_zeros(*logp_BI.shape, 0), length_BI, length_BI > 0)

    def _score_some(self, batch: Batch, prompt: Prompt | None, features: str | None) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the response tokens `(B, C, T)`, and features `(B, C, D)`, or for `head` what they are made of:
        the hidden states that predict each token, `(B, C, T, D)`."""
        if self.packed:
            row, end_BD, rest_MD = self._one_row(batch) if prompt is None else self._continued(batch, prompt)
            token_logp_BCT = token_logp(self.causal_lm, batch, row, end_BD, rest_MD)
            hidden_BCTD = predicting_states(batch, row, end_BD, rest_MD) if features is not None else None
        else:
            token_logp_BCT, hidden_BCTD = repeated_prompts(self.model, self.causal_lm, batch, features is not None)
        if hidden_BCTD is None or features == "head":
            return token_logp_BCT, hidden_BCTD
        pooled = mean_features if features == "mean" else last_features
        with self._exact:
            return token_logp_BCT, pooled(hidden_BCTD, batch.response_mask_BCT)

    # The packed ways to lay out tokens. They give the rows, the hidden states that predict the responses' first tokens
    # (a prompt's last state, shared by all of its candidates) and those that predict the other tokens.

    def _shared(self, batch: Batch) -> Prompt | None:
        """The prompts encoded ahead of their responses, where that is possible and pays."""
        checkpoints = self.model.training and any(
            getattr(m, "gradient_checkpointing", False) for m in self.model.modules()
        )
        return self._encode(batch) if self.packed and not checkpoints and worth_a_pass(batch) else None

    def _encode(self, batch: Batch) -> Prompt:
        """The prompts alone, with their cache. Their padding is on the right, where a causal mask alone hides it."""
        row, mask = self._masked(Row.prompts(batch), plain=True)
        cache = DynamicCache()  # made without a config, it keeps every token in every layer: the masks do the windowing
        return Prompt(row, prompt_end(batch, self._decode(row, mask, cache)), cache)

    def _continued(self, batch: Batch, prompt: Prompt) -> tuple[ResponseRow, Tensor, Tensor]:
        """All responses in one row, off the prompts' cache."""
        row, mask = self._masked(ResponseRow.of(batch, prompt=False), prompt.row)
        hidden_BLD = self._decode(row, mask, prompt.branch())
        return row, prompt.end_BD, hidden_BLD.flatten(0, 1)[row.place_M]

    def _one_row(self, batch: Batch) -> tuple[ResponseRow, Tensor, Tensor]:
        """Prompt and all responses in one row, which needs no cache. A single response makes plain text."""
        row, mask = self._masked(ResponseRow.of(batch, prompt=True), plain=batch.response_ids_BCT.shape[1] == 1)
        hidden_BLD = self._decode(row, mask, None)
        return row, prompt_end(batch, hidden_BLD), hidden_BLD.flatten(0, 1)[row.place_M]

    def _masked(self, row: SomeRow, *before: Row, plain: bool = False) -> tuple[SomeRow, Masks | None]:
        """A row and what it sees of itself and of what lies before it; the model itself masks plain text."""
        keys = 0 if plain else row.ids_BL.shape[1] + sum(each.ids_BL.shape[1] for each in before)
        if self.flex.takes(self.causal_lm, keys, self._misfit):
            row = row.in_tiles()
            return row, attention_mask(self.causal_lm, row, *before, row, tiled=True)
        return row, None if plain else attention_mask(self.causal_lm, row, *before, row)

    def _decode(self, row: Row, mask: Masks | None, cache: DynamicCache | None) -> Tensor:
        """The last hidden states of a row. Without a mask it is plain text, which the model masks and counts itself."""
        positions = {"position_ids": None if mask is None else row.position_BL}
        options = {"attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
        decoder: nn.Module = getattr(self.causal_lm, decoder_name(self.causal_lm))
        return decoder(input_ids=row.ids_BL, **positions, **options).last_hidden_state


def _check_finite(batch: Batch, logp_BC: Tensor) -> None:
    finite_B = torch.isfinite(logp_BC).all(-1).tolist()
    if names := [name for name, finite in zip(batch.ids, finite_B, strict=True) if not finite]:
        raise UserError(
            f"log-probs that are not finite ({', '.join(names)}): lower the learning rate or check the weights"
        )
