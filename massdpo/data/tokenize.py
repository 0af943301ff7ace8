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

from massdpo.data.encode import Encoder, last_word
from massdpo.data.fitting import named, refusal, shortened, truncated_prompt, truncated_responses
from massdpo.data.ragged import Ragged
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.stored import Subset
from massdpo.data.tokens import TokenizedSplit
from massdpo.errors import UserError
from massdpo.store import Cache, digest, package_code

ASKED = PreferenceExample("", "a prompt", "a", (), ("a",))


def tokenize_splits(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool,
    cache: Cache,
    long_rows: str = "error",
) -> dict[str, TokenizedSplit]:
    """`train`, `val` and `test` as `tokenize_split` makes them, once for the same data, tokenizer and options."""
    how = tokenizer_key(tokenizer, chat_template), max_length, chat_template, long_rows
    key = digest(package_code("data", "store"), splits.digest, how)

    def tokens(name: str) -> TokenizedSplit:
        def build(folder: Path) -> None:
            examples = getattr(splits, name)
            tokenize_split(examples, tokenizer, max_length, chat_template, folder, long_rows).save(folder)

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
    rendered = Encoder(tokenizer, chat_template).rendered(ASKED)  # what the template makes of it: it may name the day
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # as every call here leaves it: what an earlier call left behind decides nothing
    backend.no_truncation()
    return [backend.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id, template, rendered]


def tokenize_split(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
    folder: Path | None = None,
    long_rows: str = "error",
) -> TokenizedSplit:
    """Tokenise a split so that every prompt with any of its responses has at most `max_length` tokens.

    A prompt that is too long loses the oldest items of its history, as few as will do; the instruction and the
    candidates stay. With rows that do not fit even so, `long_rows` is error, skip (the split lacks them), or truncate:
    responses of more than half of `max_length` lose their end, then prompts their beginning. With `folder`, prompts are
    written there as they are made instead of filling the memory.

    Raises:
        UserError: a prompt or response is empty, a response contains the tokenizer's end token, rows do not fit even
            without their history, or the tokenizer lacks the end token or chat template that is needed.
    """
    encoder = Encoder(tokenizer, chat_template)
    ids: list[str] = []
    texts: dict[str, int] = {}  # every distinct response and its row in `responses`
    owner: list[str] = []  # the example that it was first seen in
    joints: dict[str, int] = {}  # every distinct end of a prompt
    place_X, offsets, joint_B = array("i"), array("q", [0]), array("i")
    marks, marked = encoder.marks(), 0

    def rendered() -> Iterator[str]:
        nonlocal marked
        for example in examples:  # one pass: a split may be read from the disk
            text = encoder.rendered(example)
            marked += marks.search(example.prompt) is not None
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
    shorter, items_cut = shortened([examples[row] for row in long.tolist()], encoder, longest_B[long], max_length)
    for row, (_, text) in zip(long.tolist(), shorter, strict=True):
        joint_B[row] = joints.setdefault(last_word(text), len(joints))
    by_row = {row: prompt for row, (prompt, _) in zip(long.tolist(), shorter, strict=True)}
    prompt_B = prompts.lengths
    prompt_B[long] = [len(prompt) for prompt, _ in shorter]
    too_long = np.flatnonzero(prompt_B + longest_B > max_length)
    told = named(examples, too_long, prompt_B, longest_B) if len(too_long) else ""
    if told and (long_rows == "error" or (long_rows == "skip" and len(too_long) == len(ids))):
        raise refusal(examples[int(too_long[0])], told, too_long, prompt_B, longest_B, max_length)
    if told and long_rows == "skip":
        kept_B = np.setdiff1d(np.arange(len(ids)), too_long)
        split = tokenize_split(Subset(examples, kept_B), tokenizer, max_length, chat_template, folder)
        split.kept, split.notes = kept_B, [f"left out, as too long for max_length={max_length}: {told}"]
        return split
    differences = encoder.boundary_differences(joints, np.frombuffer(joint_B, np.int32), texts, candidates)
    notes = []
    if told:
        candidates, responses = truncated_responses(too_long, candidates, responses, max_length)
        longest_B, tokens, in_pool = _responses_of(candidates, responses)
        for row in too_long.tolist():
            prompt = by_row[row]
            by_row[row] = truncated_prompt(prompt, max_length - int(longest_B[row]), encoder.bos)
        notes = [
            f"cut to max_length={max_length} (responses of more than half of it lose their end, prompts their "
            f"beginning): {told}"
        ]
    if len(long):
        whole = prompts
        prompts = kept(by_row[row] if row in by_row else whole[row] for row in range(len(whole)))

    report = {
        "examples": len(ids),
        "prompts_truncated": len(long),
        "history_items_cut": items_cut,
        "boundary_differences": differences,
        "chosen_tokens_in_pool": in_pool,
        "prompts_with_markup": 0 if chat_template else marked,
        "prompts_with_markup_twice": marked if chat_template else 0,
        "longest_prompt": int(prompts.lengths.max(initial=0)),
        "longest_response": int(longest_B.max(initial=0)),
        "longest_total": int((prompts.lengths + longest_B).max(initial=0)),
        "prompt_tokens": int(prompts.lengths.sum()),
        "response_tokens": tokens,
    }
    return TokenizedSplit(ids, prompts, responses, candidates, report, notes)


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
