"""From texts to tokens, once: prompts that are too long lose the oldest of their history, and all of it is counted.

Suffixes: B examples of a split (or of a block of it), X candidates of all of them, end to end.
"""

from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from massdpo.data.encode import Encoder, last_word
from massdpo.data.fitting import Counts, named, refusal, shortened, truncated_prompt, truncated_responses
from massdpo.data.ragged import Places, Ragged, Texts, appending
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.stored import Subset
from massdpo.data.tokens import TokenizedSplit
from massdpo.errors import UserError
from massdpo.store import Cache, digest, package_code

CACHED = 1 << 13  # texts that are looked up without being hashed again
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
    ids = [
        ids.tolist() for ids in encoder.responses([encoder.joined("", title) for title in titles], titles.__getitem__)
    ]
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
    responses of more than half of `max_length` lose their end, then prompts their beginning. Everything is written to
    `folder` (or one that is removed when the split is) as it is made, instead of filling the memory.

    Raises:
        UserError: a prompt or response is empty, a response contains the tokenizer's end token, rows do not fit even
            without their history, or the tokenizer lacks the end token or chat template that is needed.
    """
    with TemporaryDirectory(prefix=".massdpo.", dir=folder) as name:  # what is mapped stays when its name is gone
        encoder, scratch = Encoder(tokenizer, chat_template), Path(name)
        return _tokenized(examples, encoder, max_length, folder or scratch, scratch, long_rows)


def _tokenized(
    examples: Sequence[PreferenceExample],
    encoder: Encoder,
    max_length: int,
    folder: Path,
    scratch: Path,
    long_rows: str,
) -> TokenizedSplit:
    end_B = array("i")  # what each prompt ends in, of the distinct ends
    with appending(scratch, "ends", np.uint8) as add_end, appending(scratch, "shorter") as add_shorter:
        ends = Places(add_end)
        marked = _read(examples, encoder, folder, scratch, ends, end_B)
        ids, texts = Texts(folder, "ids"), Texts(scratch, "texts")
        prompts, candidates = Ragged.load(folder, "prompts"), Ragged.load(folder, "candidates")
        owner = partial(_owner, ids, candidates)
        responses = Ragged.written(encoder.responses(texts, owner), folder, "responses")
        longest_B, tokens, in_pool = _responses_of(candidates, responses)
        prompt_B, items_cut = prompts.lengths, 0
        long = np.flatnonzero(prompt_B + longest_B > max_length)
        for row, prompt, text, cut in shortened(examples, long, encoder, longest_B, max_length):
            items_cut += cut
            end_B[row], prompt_B[row] = ends.of(last_word(text)), len(prompt)
            add_shorter(prompt)
    too_long = np.flatnonzero(prompt_B + longest_B > max_length)
    told = named(examples, too_long, prompt_B, longest_B) if len(too_long) else ""
    if told and (long_rows == "error" or (long_rows == "skip" and len(too_long) == len(ids))):
        raise refusal(examples[int(too_long[0])], told, max_length, (prompt_B + longest_B)[too_long].max())
    if told and long_rows == "skip":
        kept_B = np.setdiff1d(np.arange(len(ids)), too_long)
        split = _tokenized(Subset(examples, kept_B), encoder, max_length, folder, scratch, "error")
        split.kept, split.notes = kept_B, [f"left out, as too long for max_length={max_length}: {told}"]
        return split
    ends_B = np.frombuffer(end_B, np.int32)
    differences = encoder.boundary_differences(Texts(scratch, "ends"), ends_B, texts, candidates, scratch)
    notes = []
    if told:
        candidates, responses = truncated_responses(too_long, candidates, responses, max_length, folder)
        longest_B, tokens, in_pool = _responses_of(candidates, responses)
        notes = [
            f"cut to max_length={max_length} (responses of more than half of it lose their end, prompts their "
            f"beginning): {told}"
        ]
    if len(long):
        shorter_B = _fitting(prompts, long, Ragged.load(scratch, "shorter"), max_length - longest_B, encoder.bos)
        prompts = Ragged.written(shorter_B, folder, "prompts")

    report = {
        "examples": len(ids),
        "prompts_truncated": len(long),
        "history_items_cut": items_cut,
        "boundary_differences": differences,
        "chosen_tokens_in_pool": in_pool,
        "prompts_with_markup": 0 if encoder.chat_template else marked,
        "prompts_with_markup_twice": marked if encoder.chat_template else 0,
        **_sizes(prompts.lengths, longest_B, tokens),
    }
    return TokenizedSplit(ids, prompts, responses, candidates, report, notes)


def _read(
    examples: Sequence[PreferenceExample],
    encoder: Encoder,
    folder: Path,
    scratch: Path,
    ends: Places,
    end_B: "array[int]",
) -> int:
    """Write prompts, ids, candidates and the responses' texts, in one pass: examples may be read from the disk.

    `end_B` gets what each prompt ends in, of `ends`; returned is how many prompts carry markup.
    """
    marks, marked = encoder.marks(), 0
    with (
        appending(folder, "ids", np.uint8) as add_id,
        appending(folder, "candidates") as add_candidates,
        appending(scratch, "texts", np.uint8) as add_text,
    ):
        place_of = lru_cache(CACHED)(Places(add_text).of)  # titles and letters of answers come again and again

        def rendered() -> Iterator[str]:
            nonlocal marked
            for example in examples:
                text = encoder.rendered(example)
                marked += marks.search(example.prompt) is not None
                end_B.append(ends.of(last_word(text)))
                add_id(example.id.encode())
                responses = (example.chosen, *example.pool)
                add_candidates(array("i", [place_of(encoder.joined(text, each)) for each in responses]))
                yield text

        Ragged.written(encoder.prompts(rendered(), examples), folder, "prompts")
    return marked


def _owner(ids: Texts, candidates: Ragged, text: int) -> str:
    """The id of the first row that has this response."""
    slot = np.flatnonzero(candidates.flat == text)[0]
    return ids[int(np.searchsorted(candidates.offsets, slot, side="right")) - 1]


def _sizes(prompt_B: Counts, longest_B: Counts, response_tokens: int) -> dict[str, int]:
    return {
        "longest_prompt": int(prompt_B.max(initial=0)),
        "longest_response": int(longest_B.max(initial=0)),
        "longest_total": int((prompt_B + longest_B).max(initial=0)),
        "prompt_tokens": int(prompt_B.sum()),
        "response_tokens": response_tokens,
    }


def _fitting(prompts: Ragged, long: Counts, shorter: Ragged, room_B: Counts, bos: int | None) -> Iterator[Any]:
    """The prompts with the long ones in their shorter form, without their beginning where even that is too long."""
    of_long = iter(shorter[place] for place in range(len(shorter)))
    long_B = np.zeros(len(prompts), bool)
    long_B[long] = True
    for row, is_long in enumerate(long_B.tolist()):
        yield truncated_prompt(next(of_long), int(room_B[row]), bos) if is_long else prompts[row]


def _responses_of(candidates: Ragged, responses: Ragged) -> tuple[Counts, int, int]:
    """Tokens of each row's longest response; of all; in how many rows a negative has the chosen response's tokens."""
    length, tokens, in_pool = responses.lengths, 0, 0
    tokens_of = (hash(responses[row].tobytes()) for row in range(len(responses)))
    kind = np.fromiter(tokens_of, np.int64, len(responses))
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
