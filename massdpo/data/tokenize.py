"""From texts to tokens, once: prompts that are too long lose the oldest of their history, and what happened is counted.

Suffixes: B examples of a split (or of a block of it), X candidates of all of them, end to end.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

import massdpo
from massdpo.data.encode import Encoder, last_word
from massdpo.data.ragged import Ragged
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.tokens import TokenizedSplit
from massdpo.errors import UserError
from massdpo.store import Cache, digest

# tokens are made anew when the code that makes them changes
CODE = [Path(__file__).parent / f"{name}.py" for name in ("chat", "encode", "ragged", "tokenize", "tokens")]


def tokenize_splits(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool, cache: Cache
) -> dict[str, TokenizedSplit]:
    """`train`, `val` and `test` as `tokenize_split` makes them, once for the same data, tokenizer and options."""
    key = digest(
        massdpo.__version__, splits.digest, tokenizer_key(tokenizer, chat_template), max_length, chat_template, *CODE
    )

    def tokens(name: str) -> TokenizedSplit:
        def build(folder: Path) -> None:
            tokenize_split(getattr(splits, name), tokenizer, max_length, chat_template, folder).save(folder)

        return TokenizedSplit.load(cache.folder("tokens", f"{key}-{name}", build))

    return {name: tokens(name) for name in ("train", "val", "test")}


def tokenize_catalogue(
    titles: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    test: TokenizedSplit,
    max_length: int,
    chat_template: bool = False,
) -> list[list[int]]:
    """The ids of each title of a catalogue as a response to the prompts of `test`.

    Raises:
        UserError: a prompt and a title together exceed `max_length`, or a title is not possible as a response.
    """
    encoder = Encoder(tokenizer, chat_template)
    ids = [ids.tolist() for ids in encoder.responses([encoder.joined("", title) for title in titles], titles)]
    longest = max(map(len, ids), default=0)
    if ids and test.report["longest_prompt"] + longest > max_length:
        raise UserError(
            f"dataset.candidates=all: the longest test prompt ({test.report['longest_prompt']} tokens) and the longest "
            f"title ({longest}) exceed trainer.max_length={max_length}: raise it, or lower dataset.max_history"
        )
    return ids


def tokenizer_key(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[Any]:
    """Everything of a tokenizer that decides which ids a text becomes (json-able)."""
    template = tokenizer.chat_template if chat_template else None
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # as every call here leaves it: what an earlier call left behind decides nothing
    backend.no_truncation()
    return [backend.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id, template]


def tokenize_split(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
    folder: Path | None = None,
) -> TokenizedSplit:
    """Tokenise a split so that every prompt with any of its responses has at most `max_length` tokens.

    A prompt that is too long loses the oldest items of its history, as few as will do; the instruction and the
    candidates stay. With `folder`, prompts are written there as they are made instead of filling the memory.

    Raises:
        UserError: a prompt or response is empty, a response contains the tokenizer's end token, a prompt does not fit
            even without its history, or the tokenizer lacks the end token or chat template that is needed.
    """
    encoder = Encoder(tokenizer, chat_template)
    ids: list[str] = []
    texts: dict[str, int] = {}  # every distinct response and its row in `responses`
    owner: list[str] = []  # the example that it was first seen in
    joints: dict[str, int] = {}  # every distinct end of a prompt
    place_X, offsets, joint_B = array("i"), array("q", [0]), array("i")

    def rendered() -> Iterator[str]:
        for example in examples:  # one pass: a split may be read from the disk
            text = encoder.rendered(example)
            ids.append(example.id)
            joint_B.append(joints.setdefault(last_word(text), len(joints)))
            for response in (encoder.joined(text, each) for each in (example.chosen, *example.pool)):
                if response not in texts:
                    texts[response] = len(texts)
                    owner.append(example.id)
                place_X.append(texts[response])
            offsets.append(len(place_X))
            yield text

    def kept(rows: Iterator[NDArray[np.int32]]) -> Ragged:
        return Ragged.of(rows) if folder is None else Ragged.written(rows, folder, "prompts")

    prompts = kept(encoder.prompts(rendered(), ids))
    candidates = Ragged(np.frombuffer(place_X, np.int32), np.frombuffer(offsets, np.int64))
    responses = Ragged.of(encoder.responses(list(texts), owner))
    longest_B, tokens, in_pool = _responses_of(candidates, responses)

    long = np.flatnonzero(prompts.lengths + longest_B > max_length)
    shorter, items_cut = _shortened([examples[row] for row in long.tolist()], encoder, longest_B[long], max_length)
    for row, (_, text) in zip(long, shorter, strict=True):
        joint_B[row] = joints.setdefault(last_word(text), len(joints))
    if len(long):
        by_row = {row: prompt for row, (prompt, _) in zip(long.tolist(), shorter, strict=True)}
        whole = prompts
        prompts = kept(by_row[row] if row in by_row else whole[row] for row in range(len(whole)))

    report = {
        "examples": len(ids),
        "prompts_truncated": len(long),
        "history_items_cut": items_cut,
        "boundary_differences": encoder.boundary_differences(
            joints, np.frombuffer(joint_B, np.int32), texts, candidates
        ),
        "chosen_tokens_in_pool": in_pool,
        "longest_prompt": int(prompts.lengths.max(initial=0)),
        "longest_response": int(longest_B.max(initial=0)),
        "longest_total": int((prompts.lengths + longest_B).max(initial=0)),
        "prompt_tokens": int(prompts.lengths.sum()),
        "response_tokens": tokens,
    }
    return TokenizedSplit(ids, prompts, responses, candidates, report)


def _responses_of(candidates: Ragged, responses: Ragged) -> tuple[NDArray[np.int64], int, int]:
    """Tokens of each row's longest response; of all; in how many rows a negative has the chosen response's tokens."""
    length, tokens, in_pool = responses.lengths, 0, 0
    kinds: dict[bytes, int] = {}
    kind = np.array([kinds.setdefault(responses[row].tobytes(), row) for row in range(len(responses))], np.int64)
    longest_B = np.zeros(len(candidates), np.int64)
    for rows, block in candidates.blocks():
        start_B = block.offsets[:-1]
        length_X = length[block.flat]
        tokens += int(length_X.sum())
        longest_B[rows] = np.maximum.reduceat(length_X, start_B)
        kind_X = kind[block.flat]
        as_chosen_X = kind_X == np.repeat(kind_X[start_B], block.lengths)
        in_pool += int((np.add.reduceat(as_chosen_X, start_B, dtype=np.int64) > 1).sum())
    return longest_B, tokens, in_pool


def _shortened(
    examples: Sequence[PreferenceExample], encoder: Encoder, longest_B: NDArray[np.int64], max_length: int
) -> tuple[list[tuple[NDArray[np.int32], str]], int]:
    """Prompts with as few of the oldest items left out as will do, as ids and as text; how many items that were."""
    names = [example.id for example in examples]
    cut = _history_to_cut(examples, encoder, max_length - longest_B)
    texts = [encoder.rendered(*pair) for pair in zip(examples, cut, strict=True)]
    prompts = list(encoder.prompts(texts, names))
    for example, prompt, longest in zip(examples, prompts, longest_B.tolist(), strict=True):
        if len(prompt) + longest > max_length:
            raise UserError(_too_long(example, len(prompt), longest, max_length))
    return list(zip(prompts, texts, strict=True)), sum(cut)


def _history_to_cut(examples: Sequence[PreferenceExample], encoder: Encoder, room_B: NDArray[np.int64]) -> list[int]:
    """The fewest oldest items to leave out so that each prompt fits its room, by bisection of all at once."""
    low = [0] * len(examples)
    high = [len(example.history) for example in examples]
    while rows := [row for row in range(len(examples)) if low[row] < high[row]]:
        middle = [(low[row] + high[row]) // 2 for row in rows]
        asked = [examples[row] for row in rows]
        rendered = [encoder.rendered(*pair) for pair in zip(asked, middle, strict=True)]
        names = [example.id for example in asked]
        for row, cut, prompt in zip(rows, middle, encoder.prompts(rendered, names), strict=True):
            if len(prompt) <= room_B[row]:
                high[row] = cut
            else:
                low[row] = cut + 1
    return high


def _too_long(example: PreferenceExample, prompt: int, response: int, max_length: int) -> str:
    if response >= max_length:
        return (
            f"{example.id}: its longest response has {response} tokens, but max_length={max_length} holds the "
            "prompt too: shorten the response or raise max_length"
        )
    without = "" if not example.history else " even without its history"
    return (
        f"{example.id}: the prompt{without} ({prompt} tokens) and its longest response ({response}) exceed "
        f"max_length={max_length}: raise it to at least {prompt + response} (if the model allows) or shorten the prompt"
    )
