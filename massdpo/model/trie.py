"""A catalogue of responses as a trie behind a prompt: what responses share at their start is fed once for all of them.

Only beginnings, which come before some token, are fed, each once; a beginning predicts every token that continues it.
A catalogue is fed in parts, so that no pass takes more memory than its share, whatever the catalogue's size.

Suffixes: B prompts, I responses of the catalogue (N of a part), M beginnings of a part, U = 1 + M sources of
predictions (first the prompt's end), C tokens that continue a source, T tokens of a response, Q and K query and key
tokens, D hidden units.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel

from massdpo.model.packing import PROMPT, Masks, Prompt, Row, layer_masks
from massdpo.tensors import Batch, first

PART_TOKENS = 512  # beginnings of a part: their keys cost little beside the layers, and few are fed twice
PLAIN = 32  # responses fed at once where each repeats its prompt


@dataclass(frozen=True)
class Part:
    """Some responses of a catalogue as one trie."""

    index_N: Tensor  # int64, places in the catalogue
    ids_M: Tensor  # int64, the last token of each beginning
    depth_M: Tensor  # int64, tokens of the beginning before that one
    sees_MM: Tensor  # bool, which beginnings a beginning starts with, itself included
    target_UC: Tensor  # int64, the tokens that continue each source, filled up with 0
    step_NT: Tensor  # int64, places in `target_UC`, flat, of each response's tokens; beyond its end one past the last

    def to(self, device: torch.device) -> "Part":
        return Part(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def row(self, prompt: Prompt) -> Row:
        """The beginnings as one row behind each of the prompts."""
        length_B1 = (prompt.row.segment_BL == PROMPT).sum(-1, keepdim=True)
        ids_BM = self.ids_M.expand(len(length_B1), -1)
        return Row(ids_BM, length_B1 + self.depth_M, torch.full_like(ids_BM, PROMPT + 1))

    def mask(self, causal_lm: PreTrainedModel, prompt: Prompt, row: Row) -> Masks:
        """A beginning sees the prompt and what it starts with."""
        pad = torch.nn.functional.pad
        position_BK = torch.cat([prompt.row.position_BL, row.position_BL], dim=1)
        there_BK = pad(prompt.row.segment_BL == PROMPT, (0, len(self.ids_M)), value=True)
        sees_MK = pad(self.sees_MM, (prompt.row.ids_BL.shape[1], 0), value=True)

        def sees(b: Tensor, _head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
            return there_BK[b, k] & sees_MK[q, k]

        return layer_masks(causal_lm, sees, row.position_BL, position_BK)

    def response_logp(self, logp_BUC: Tensor) -> Tensor:
        """Log-probs of whole responses `(B, N)` from those of the tokens that continue each source."""
        flat = torch.nn.functional.pad(logp_BUC.flatten(1), (0, 1))
        return flat[:, self.step_NT].sum(-1)


@dataclass(frozen=True)
class Catalogue:
    """The responses that every prompt is ranked against."""

    parts: list[Part]
    ids_IT: Tensor  # int64
    length_I: Tensor  # int64, tokens of each response

    @classmethod
    def of(cls, responses: Sequence[Sequence[int]], part_tokens: int = PART_TOKENS) -> "Catalogue":
        """Responses as token ids, each with its end token; equal ones are scored once."""
        groups: list[list[int]] = []
        last: tuple[int, ...] = ()
        fed = part_tokens + 1
        alike_together = sorted(range(len(responses)), key=lambda index: tuple(responses[index]))
        for index in alike_together:
            beginning = tuple(responses[index][:-1])
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(last, beginning, strict=False))))
            fed += len(beginning) - shared
            if fed > part_tokens:
                groups.append([])
                fed = len(beginning)
            groups[-1].append(index)
            last = beginning
        length_I = torch.tensor([len(each) for each in responses])
        longest = int(length_I.max())
        ids_IT = torch.tensor([[*each, *[0] * (longest - len(each))] for each in responses])
        return cls([_part(responses, group) for group in groups], ids_IT, length_I)

    def to(self, device: torch.device) -> "Catalogue":
        parts = [part.to(device) for part in self.parts]
        return Catalogue(parts, self.ids_IT.to(device), self.length_I.to(device))

    def behind(self, batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
        """The batch's prompts with all responses as plain candidates, a few at a time: for models that pack nothing."""
        for index_N in torch.arange(len(self.length_I), device=self.length_I.device).split(PLAIN):
            ids_NT = self.ids_IT[index_N]
            mask_NT = first(self.length_I[index_N], ids_NT.shape[1])
            size = len(batch.ids)
            yield (
                index_N,
                replace(
                    batch, response_ids_BCT=ids_NT.expand(size, -1, -1), response_mask_BCT=mask_NT.expand(size, -1, -1)
                ),
            )


def _part(responses: Sequence[Sequence[int]], group: Sequence[int]) -> Part:
    source: dict[tuple[int, ...], int] = {(): 0}
    for index in group:
        for end in range(1, len(responses[index])):
            source.setdefault(tuple(responses[index][:end]), len(source))
    column: list[dict[int, int]] = [{} for _ in source]
    steps = []
    for index in group:
        path = [(source[tuple(responses[index][:end])], token) for end, token in enumerate(responses[index])]
        steps.append([(at, column[at].setdefault(token, len(column[at]))) for at, token in path])
    width = max(map(len, column))
    sees_MM = torch.zeros(len(source) - 1, len(source) - 1, dtype=torch.bool)
    for beginning, at in source.items():
        for end in range(1, len(beginning) + 1):
            sees_MM[at - 1, source[beginning[:end]] - 1] = True
    longest, beyond = max(map(len, steps)), len(source) * width
    fed = [beginning for beginning in source if beginning]
    return Part(
        index_N=torch.tensor(group),
        ids_M=torch.tensor([beginning[-1] for beginning in fed], dtype=torch.int64),
        depth_M=torch.tensor([len(beginning) - 1 for beginning in fed], dtype=torch.int64),
        sees_MM=sees_MM,
        target_UC=torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in column]),
        step_NT=torch.tensor(
            [[at * width + place for at, place in path] + [beyond] * (longest - len(path)) for path in steps]
        ),
    )
