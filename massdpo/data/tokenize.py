"""From texts to tokens, once: prompts that are too long lose the oldest of their history, and all of it is counted."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from massdpo.data.encode import Encoder, Ids, first_word, last_word
from massdpo.data.fitting import TooLong, history_to_cut, truncated_prompt, truncated_response
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.tokens import ABOUT, SCHEMA, TOKENS, TokenizedSplit
from massdpo.errors import UserError
from massdpo.store import Cache, digest, package_code, write_json

BLOCK = 2048  # rows that are tokenised together
HELD = 1 << 14  # distinct responses that are remembered: titles and letters of answers come again and again
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
            tokenize_split(examples, tokenizer, max_length, chat_template, folder, long_rows)

        return TokenizedSplit(cache.folder("tokens", f"{key}-{name}", build))

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
        UserError: a prompt and a title together exceed `max_length`, or a title cannot be a response.
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
    """Everything about a tokenizer that decides which ids a text becomes (json-able)."""
    template = tokenizer.chat_template if chat_template else None
    rendered = Encoder(tokenizer, chat_template).rendered(ASKED)  # what the template makes of it: it may print the date
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # as every call here leaves it: what an earlier call left behind must not count
    backend.no_truncation()
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [backend.to_str(), tokenizer.split_special_tokens, *ends, template, rendered]


def tokenize_split(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
    folder: Path | None = None,
    long_rows: str = "error",
) -> TokenizedSplit:
    """Tokenise a split so that every prompt with any of its responses has at most `max_length` tokens.

    A prompt that is too long loses the oldest items of its history, as few as possible; the instruction and the
    candidates stay. `long_rows` says what happens to rows that do not fit even so: error, skip (the split lacks them),
    or truncate: responses of more than half of `max_length` lose their end, then prompts their beginning. Tokens are
    written to `folder` (or to one without a name) block by block, so that memory does not grow with the rows.

    Raises:
        UserError: a prompt or response is empty, a response contains the tokenizer's end token, rows do not fit even
            without their history, or the tokenizer lacks the end token or chat template that is needed.
    """
    tokens = _Tokenizing(Encoder(tokenizer, chat_template), max_length, long_rows)
    with nullcontext(folder) if folder else TemporaryDirectory(prefix="massdpo.") as name:
        place, rows = Path(name), iter(enumerate(examples))
        with open(place / TOKENS, "wb") as file, pa.ipc.new_file(file, SCHEMA) as table:
            while block := list(islice(rows, BLOCK)):
                table.write_batch(pa.RecordBatch.from_pylist(tokens.block(*zip(*block, strict=True)), SCHEMA))
        write_json(place / ABOUT, {"report": tokens.report, "notes": tokens.notes(len(examples))})
        return TokenizedSplit(place)  # what is mapped stays when its name is gone


class _Response(NamedTuple):
    ids: Ids
    first_word: str


class _Tokenizing:
    """A split that is tokenised block by block, and what happened to its rows so far."""

    def __init__(self, encoder: Encoder, max_length: int, long_rows: str):
        self.encoder, self.max_length, self.long_rows = encoder, max_length, long_rows
        self.report = {
            **dict.fromkeys(("examples", "prompts_truncated", "history_items_cut", "boundary_differences"), 0),
            **dict.fromkeys(("chosen_tokens_in_pool", "prompts_with_markup", "prompts_with_markup_twice"), 0),
            **dict.fromkeys(("longest_prompt", "longest_response", "longest_total"), 0),
            **dict.fromkeys(("prompt_tokens", "response_tokens"), 0),
        }
        self._too_long = TooLong(max_length)
        self._marks = encoder.marks()
        self._responses: dict[str, _Response] = {}
        self._differs: dict[tuple[str, str], bool] = {}  # by the words on both sides of the joint

    def block(self, numbers: Sequence[int], examples: Sequence[PreferenceExample]) -> list[dict[str, Any]]:
        """The rows of the table that examples become; `numbers` are their places in the split."""
        texts = [self.encoder.rendered(example) for example in examples]
        prompts = self.encoder.prompts(texts, examples)
        slates = self._slates(examples)
        rooms = [self.max_length - max(len(each.ids) for each in slate) for slate in slates]
        cuts = self._without_oldest(examples, texts, prompts, rooms)
        differs = self._boundaries_differ(texts, slates)
        found = []
        for row, (example, prompt, room) in enumerate(zip(examples, prompts, rooms, strict=True)):
            responses = [each.ids for each in slates[row]]
            if len(prompt) > room:
                self._too_long.add(example, len(prompt), self.max_length - room)
                if self.long_rows != "truncate":
                    continue
                responses = [truncated_response(ids, self.max_length // 2) for ids in responses]
                prompt = truncated_prompt(prompt, self.max_length - max(map(len, responses)), self.encoder.bos)
            self._count(example, prompt, responses, cuts[row], differs[row])
            found.append({"row": numbers[row], "id": example.id, "prompt": prompt, "responses": responses})
        return found

    def notes(self, rows: int) -> list[str]:
        """What became of the rows that are too long.

        Raises:
            UserError: there are some, and they are to be refused, or no other is left.
        """
        if not self._too_long.count:
            return []
        if self.long_rows == "error" or not self.report["examples"]:
            raise self._too_long.refusal(rows)
        how = f"left out, as too long for max_length={self.max_length}"
        if self.long_rows == "truncate":
            how = (
                f"cut to max_length={self.max_length} (responses of more than half of it lose their end, prompts their "
                "beginning)"
            )
        return [f"{how}: {self._too_long.named(rows)}"]

    def _slates(self, examples: Sequence[PreferenceExample]) -> list[list[_Response]]:
        """The responses of each example, the chosen one first; those not met lately are tokenised all at once."""
        join, known = self.encoder.joined, self._responses
        slates = [[join(example.prompt, text) for text in (example.chosen, *example.pool)] for example in examples]
        if len(known) > HELD:
            known.clear()
        new: dict[str, str] = {}  # with the id of the first example that has it
        for example, slate in zip(examples, slates, strict=True):
            for text in slate:
                if text not in known:
                    new.setdefault(text, example.id)
        for text, ids in zip(new, self.encoder.responses(list(new), list(new.values())), strict=True):
            known[text] = _Response(ids, first_word(text))
        return [[known[text] for text in slate] for slate in slates]

    def _without_oldest(
        self, examples: Sequence[PreferenceExample], texts: list[str], prompts: list[Ids], rooms: list[int]
    ) -> list[int]:
        """Shorten the prompts that do not fit, in place; how many items of its history each has lost."""
        cuts = [0] * len(examples)
        long = [row for row, prompt in enumerate(prompts) if len(prompt) > rooms[row]]
        asked = [examples[row] for row in long]
        items = history_to_cut(asked, self.encoder, [rooms[row] for row in long])
        shorter = [self.encoder.rendered(*pair) for pair in zip(asked, items, strict=True)]
        for row, cut, text, ids in zip(long, items, shorter, self.encoder.prompts(shorter, asked), strict=True):
            cuts[row], texts[row], prompts[row] = cut, text, ids
        return cuts

    def _boundaries_differ(self, texts: list[str], slates: list[list[_Response]]) -> list[bool]:
        """Whether each row has a response that is tokenised differently when joined to its prompt."""
        pairs = [
            {(end, each.first_word) for each in slate} for end, slate in zip(map(last_word, texts), slates, strict=True)
        ]
        if len(self._differs) > HELD:
            self._differs.clear()
        new = sorted({pair for each in pairs for pair in each} - self._differs.keys())
        self._differs |= zip(new, self.encoder.differ(new), strict=True)
        return [any(self._differs[pair] for pair in each) for each in pairs]

    def _count(self, example: PreferenceExample, prompt: Ids, responses: list[Ids], cut: int, differs: bool) -> None:
        marked = self._marks.search(example.prompt) is not None
        chosen, *pool = (ids.tobytes() for ids in responses)
        longest = max(map(len, responses))
        more = {
            "examples": 1,
            "prompts_truncated": cut > 0,
            "history_items_cut": cut,
            "boundary_differences": differs,
            "chosen_tokens_in_pool": chosen in pool,
            "prompts_with_markup_twice" if self.encoder.chat_template else "prompts_with_markup": marked,
            "prompt_tokens": len(prompt),
            "response_tokens": sum(map(len, responses)),
        }
        for name, count in more.items():
            self.report[name] += int(count)
        sizes = {"prompt": len(prompt), "response": longest, "total": len(prompt) + longest}
        for name, size in sizes.items():
            self.report[f"longest_{name}"] = max(self.report[f"longest_{name}"], size)
