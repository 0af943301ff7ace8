"""Anyone's own preferences: rows of {"prompt", "chosen", "rejected": [...]} from a file, a folder or the hub.

Texts may also be lists of messages {"role", "content"}, as TRL's conversational format has them. Without a chat
template a single user message is its content, and several are lines "role: content" that end with "assistant:".
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from massdpo.data.containers import Row
from massdpo.data.messages import as_text, checked_messages, found, with_prompt
from massdpo.data.raw import SPLITS, BadRows, Source, hub_folder
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.store import keyed_seed

FIELDS = {"prompt", "chosen", "rejected", "candidates", "id"}


@dataclass
class Jsonl:
    """Preferences from `path` or `hub_id`, with validation and test rows of their own or held out by the seed.

    `path`, `val_path` and `test_path` are JSON Lines files, Parquet or Arrow files, or folders as `datasets` writes and
    reads them; `hub_id` is `owner/name` on the Hugging Face hub. What has splits brings them. A row has `prompt`,
    `chosen`, `rejected` (one text or a list), and may have `candidates` (the slate: chosen and rejected in the order
    shown) and `id`. All rows of one prompt are held out together.

    Raises:
        UserError: a file is missing, empty or not UTF-8; a row is not usable (file, line, and what is wrong), unless
            `bad_rows="skip"`; a split would be empty; the hub cannot be reached.
    """

    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    subset: str | None = None
    val_path: str | None = None
    test_path: str | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    bad_rows: str = "error"
    seed: int = 0
    _report: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        BadRows(self.bad_rows)
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"dataset.{name}={getattr(self, name)} is not possible: it must lie between 0 and 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError("dataset.val_fraction + dataset.test_fraction must be below 1: no row is left for training")

    @cached_property
    def _source(self) -> Source:
        if bool(self.path) == bool(self.hub_id):
            raise UserError(
                "dataset=jsonl needs dataset.path=FILE (lines of prompt, chosen, rejected) or dataset.hub_id"
            )
        place = hub_folder(self.hub_id, self.revision) if self.hub_id else Path(str(self.path))
        return Source(place, subset=self.subset)

    def files(self) -> list[Path]:
        """The files that `load` reads: their content, with the options, decides the outcome."""
        others = [Source(Path(path)) for path in (self.val_path, self.test_path) if path]
        return [file for source in (self._source, *others) for file in source.files]

    def load(self) -> Splits:
        self._report = Counter()
        seen: dict[str, str] = {}
        bad = BadRows(self.bad_rows)
        given = {split: self._examples(split, rows, seen, bad) for split, rows in self._sources(bad).items()}
        report: dict[str, Any] = {f"{name}_rows_read": len(rows) for name, rows in given.items()} | dict(self._report)
        report |= bad.report()
        parts = self._hold_out(given)
        trained_on = {row.prompt for row in parts["train"]}
        for split in ("val", "test"):
            report[f"{split}_prompts_also_in_train"] = sum(row.prompt in trained_on for row in parts[split])
        train, val, test = (self._numbered(split, parts[split]) for split in SPLITS)
        return Splits(train, val, test, report)

    def _sources(self, bad: BadRows) -> dict[str, Iterator[Row]]:
        """The rows of each split that was given; a later one takes the place of one that `path` brought."""
        source = self._source
        if "train" not in source.splits:
            raise UserError(f"{source.place} has no split 'train', only {', '.join(source.found)}")
        sources = {split: source.rows(split, bad) for split in source.splits}
        for split, path in (("val", self.val_path), ("test", self.test_path)):
            if path:
                given = Source(Path(path))
                if split not in given.splits and len(given.splits) > 1:
                    raise UserError(
                        f"dataset.{split}_path={path} has the splits {', '.join(given.found)}, but no {split!r}"
                    )
                sources[split] = given.rows(split if split in given.splits else next(iter(given.splits)), bad)
        return sources

    def _examples(self, split: str, rows: Iterator[Row], seen: dict[str, str], bad: BadRows) -> list[PreferenceExample]:
        examples = []
        for where, row in rows:
            try:
                example = self._example(where, row)
                if example.id and (first := seen.setdefault(example.id, where)) != where:
                    raise UserError(f'{where}: "id" {example.id!r} was already given at {first}: ids must be unique')
            except UserError as error:
                bad(error)
            else:
                examples.append(example)
        if not examples:
            raise UserError(f"no usable row for the split {split!r}: at least one is needed")
        if len({bool(example.id) for example in examples}) > 1:
            raise UserError(f'the split {split!r}: only some rows have an "id"; give one to all or to none')
        return examples

    def _example(self, where: str, row: dict[str, Any]) -> PreferenceExample:
        if isinstance(row.get("chosen"), list) and row.get("rejected") is not None and row.get("prompt") is None:
            row = with_prompt(where, row)
        if missing := [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]:
            raise UserError(f'{where}: no "{missing[0]}"; a row needs "prompt", "chosen" and "rejected"')
        for name in row.keys() - FIELDS:
            self._report[f"ignored_field_{name}"] += 1
        prompt, messages = self._prompt(where, row["prompt"])
        chosen = self._response(where, "chosen", row["chosen"])
        rejected = row["rejected"]
        if isinstance(rejected, str) or (isinstance(rejected, list) and rejected and isinstance(rejected[0], dict)):
            rejected = [rejected]  # one text or one conversation
        if not isinstance(rejected, list) or not rejected:
            raise UserError(f'{where}: "rejected" must be a text or a list of at least one, found {found(rejected)}')
        texts = [self._response(where, f"rejected[{place}]", text) for place, text in enumerate(rejected)]
        if chosen in texts:
            raise UserError(f'{where}: "chosen" is also rejected[{texts.index(chosen)}]: remove it from there')
        pool = tuple(dict.fromkeys(texts))
        self._report["rejected_repeats_dropped"] += len(texts) - len(pool)
        identity = row.get("id")
        if isinstance(identity, bool) or not isinstance(identity, str | int | None):
            raise UserError(f'{where}: "id" must be a text or a whole number, found {found(identity)}')
        name = "" if identity is None else str(identity)
        return PreferenceExample(
            name,
            prompt,
            chosen,
            pool,
            self._slate(where, row.get("candidates"), prompt, chosen, pool),
            meta={"messages": messages} if messages else {},
        )

    def _prompt(self, where: str, value: Any) -> tuple[str, list[dict[str, str]]]:
        """The prompt as text, and its messages where it was given as messages."""
        if isinstance(value, str):
            return self._text(where, "prompt", value, value.rstrip()), []
        messages = checked_messages(where, "prompt", value)
        if len(messages) == 1 and messages[0]["role"] == "user":
            content = messages[0]["content"]
            return self._text(where, "prompt", content, content.rstrip()), messages
        return as_text(messages), messages

    def _response(self, where: str, name: str, value: Any) -> str:
        if not isinstance(value, str):
            messages = checked_messages(where, name, value)
            if [message["role"] for message in messages] != ["assistant"]:
                raise UserError(
                    f'{where}: "{name}" must be one message of the role "assistant"; '
                    'the messages before it belong to "prompt"'
                )
            value = messages[0]["content"]
        return self._text(where, name, value, value.strip())

    def _text(self, where: str, name: str, value: str, stripped: str) -> str:
        if not stripped.strip():
            raise UserError(f'{where}: "{name}" is empty; give it at least one word')
        self._report["texts_stripped"] += stripped != value
        return stripped

    def _slate(self, where: str, value: Any, prompt: str, chosen: str, pool: tuple[str, ...]) -> tuple[str, ...]:
        """The candidates as given, or in an order that does not tell the chosen one."""
        if value is None:
            slate = [chosen, *pool]
            Random(keyed_seed("jsonl slate", self.seed, prompt, slate)).shuffle(slate)
            return tuple(slate)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f'{where}: "candidates" must be a list of texts, found {found(value)}')
        given = tuple(dict.fromkeys(text.strip() for text in value))
        if set(given) != {chosen, *pool}:
            other = sorted(set(given) ^ {chosen, *pool})[0]
            raise UserError(
                f'{where}: "candidates" must be exactly "chosen" and all "rejected"; {other[:60]!r} is only on one side'
            )
        return given

    def _hold_out(self, given: dict[str, list[PreferenceExample]]) -> dict[str, list[PreferenceExample]]:
        """All three splits: what was not given is drawn from train by the seed, whole prompts at a time."""
        rows = given["train"]
        sizes = Counter(row.prompt for row in rows)
        order = sorted(sizes, key=lambda prompt: keyed_seed("jsonl split", self.seed, prompt))
        place: dict[str, str] = {}
        for split, fraction in (("test", self.test_fraction), ("val", self.val_fraction)):
            held = 0
            while split not in given and order and held < max(1, round(fraction * len(rows))):
                place[order[0]] = split
                held += sizes[order.pop(0)]
        if not order:
            raise UserError(
                f"{self.path}: {len(sizes)} different prompts are too few to hold out validation and test rows; "
                "add rows, or give dataset.val_path and dataset.test_path"
            )
        drawn = {split: [row for row in rows if place.get(row.prompt, "train") == split] for split in SPLITS}
        return drawn | {split: part for split, part in given.items() if split != "train"}

    def _numbered(self, split: str, rows: list[PreferenceExample]) -> list[PreferenceExample]:
        named = (vars(row) | {"id": row.id or f"{split}/{number}"} for number, row in enumerate(rows))
        return [PreferenceExample(**fields) for fields in named]
