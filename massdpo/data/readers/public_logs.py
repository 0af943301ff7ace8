"""The raw files of public recommendation data, as their owners publish them, read into a `Log`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massdpo.data.raw import SPLITS, BadRows
from massdpo.data.readers.interactions import Ints, Log, Table, field_of
from massdpo.data.text import read_jsonl, read_lines
from massdpo.errors import UserError

# LastFM


def read_lastfm_sequences(sequences: Path, names: Path, bad: BadRows) -> Log:
    """`sequences.jsonl` (split, user, items) and `id2name.txt` (`<id>::<name>`, ids from 0 without a gap)."""
    titles: list[str] = []
    for number, line in read_lines(names):
        item, _, title = line.partition("::")
        if item != str(len(titles)) or not title.strip():  # a line left out would shift every later id: never skipped
            raise UserError(f"{names}:{number}: expected '{len(titles)}::<name>', found {line!r:.80}")
        titles.append(title.strip())
    users: list[str] = []
    chains: list[Ints] = []
    split_of: list[str] = []
    known: set[str] = set()
    for number, row in read_jsonl(sequences, bad):
        place = f"{sequences}:{number}"
        try:
            user = f"{row.get('split')}/{field_of(row, 'user', (int, str), place)}"
            items = field_of(row, "items", (list,), place)
            if row["split"] not in SPLITS:
                raise UserError(f"{place}: 'split' is train, val or test, not {row['split']!r:.40}")
            if user in known:
                raise UserError(f"{place}: user {user} has a line already")
            for item in items:
                if type(item) is not int or not 0 <= item < len(titles):
                    raise UserError(f"{place}: item {item!r:.40} is not in {names.name} (0 to {len(titles) - 1})")
        except (UserError, KeyError) as error:
            bad(error if isinstance(error, UserError) else UserError(f"{place}: 'split' is missing"))
            continue
        known.add(user)
        users.append(user)
        chains.append(np.array(items, dtype=np.int64))
        split_of.append(row["split"])
    return Log(titles, users, chains, split_of=split_of)


@dataclass(frozen=True)
class ReadyRow:
    """A row of the published 20-candidate files."""

    history: list[str]
    candidates: list[str]
    target: str


def read_ready_rows(paths: dict[str, Path], bad: BadRows) -> dict[str, list[ReadyRow]]:
    """The rows of S-DPO's JSON arrays of `historyList`, `itemList` and `trueSelection`, by split."""
    checked = {split: list(_checked_rows(path, bad)) for split, path in paths.items()}
    known = {title for rows in checked.values() for row in rows for title in row["itemList"]}
    return {
        split: [
            ReadyRow(split_titles(row["historyList"], known), row["itemList"], row["trueSelection"]) for row in rows
        ]
        for split, rows in checked.items()
    }


def split_titles(joined: str, known: set[str]) -> list[str]:
    """The titles that were joined by `::`; one that begins or ends with a colon is told by the `known` ones."""

    def parts(text: str) -> list[str] | None:
        if text in known:
            return [text]
        end = text.find("::")
        while end >= 0:
            if text[:end] in known and (rest := parts(text[end + 2 :])) is not None:
                return [text[:end], *rest]
            end = text.find("::", end + 1)
        return None

    return (parts(joined) if ":::" in joined else None) or joined.split("::")


def _checked_rows(path: Path, bad: BadRows) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON array in UTF-8 ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: a JSON array with at least one row is needed")
    for number, row in enumerate(rows, start=1):
        place = f"{path}: row {number}"
        try:
            if not isinstance(row, dict):
                raise UserError(f"{place}: an object is needed, found {type(row).__name__}")
            history = field_of(row, "historyList", (str,), place)
            candidates = field_of(row, "itemList", (list,), place)
            target = field_of(row, "trueSelection", (str,), place)
            if not all(isinstance(each, str) and each.strip() for each in [*candidates, *history.split("::")]):
                raise UserError(f"{place}: an empty title, or one that is no text")
            "".join([history, *candidates]).encode()  # half a character of a pair cannot be
            if len(set(candidates)) != len(candidates) or target not in candidates:
                raise UserError(f"{place}: the candidates must be distinct and hold the target {target!r:.60}")
        except (UserError, UnicodeEncodeError) as error:
            bad(error if isinstance(error, UserError) else UserError(f"{place}: {error.reason}"))
        else:
            yield row


def chain_ready_rows(paths: dict[str, Path], bad: BadRows) -> Log:
    """The users' sequences behind the ready-made files: a user's rows stand together, the first has 3 items of history.

    Raises:
        UserError: the rows are not whole sequences (some were left out).
    """
    number_of: dict[str, int] = {}
    users: list[str] = []
    chains: list[list[int]] = []
    split_of: list[str] = []

    def numbers(titles: list[str]) -> list[int]:
        return [number_of.setdefault(title, len(number_of)) for title in titles]

    for split, rows in read_ready_rows(paths, bad).items():
        for row_number, row in enumerate(rows, start=1):
            history, target = numbers(row.history), numbers([row.target])[0]
            numbers(row.candidates)
            if len(history) == 3:
                users.append(f"{split}/{split_of.count(split)}")
                chains.append([*history, target])
                split_of.append(split)
            elif chains and split_of[-1] == split and chains[-1][-10:] == history:
                chains[-1].append(target)
            else:
                raise UserError(
                    f"{paths[split]}: row {row_number} does not continue the row before it, so the sequences cannot be "
                    "put together and no clean slate drawn; dataset.slate=legacy reads such rows as they are"
                )
    sequences = [np.array(chain, dtype=np.int64) for chain in chains]
    return Log(list(number_of), users, sequences, split_of=split_of)


# MovieLens

STARS = ("1", "2", "3", "4", "5")


def read_movielens_titles(path: Path, separator: str, bad: BadRows) -> dict[str, str]:
    """Titles by movie id, from `u.item` (`|`) or `movies.dat` (`::`), both ISO-8859-1."""
    titles: dict[str, str] = {}
    for number, line in _latin_lines(path):
        parts = line.split(separator)
        if len(parts) < 3 or not parts[0].isdecimal() or not parts[1].strip():
            bad(UserError(f"{path}:{number}: expected id{separator}title{separator}..., found {line!r:.80}"))
        elif parts[0] in titles:
            bad(UserError(f"{path}:{number}: movie {parts[0]} has a line already"))
        else:
            titles[parts[0]] = article_first(parts[1].strip())
    return titles


def article_first(title: str) -> str:
    """`Affair to Remember, An (1957)` as people say it: `An Affair to Remember (1957)`."""
    name, bracket, year = title.rpartition(" (")
    name, year = (name, bracket + year) if bracket else (title, "")
    head, comma, article = name.rpartition(", ")
    if comma and article in ("A", "An", "The"):
        return f"{article} {head}{year}"
    return title


def read_movielens_ratings(path: Path, separator: str, titles: dict[str, str], min_rating: int, bad: BadRows) -> Log:
    """Ratings of at least `min_rating` by user, in order of time; the file's order decides among equal times."""
    table = Table(titles)
    below = 0
    for number, line in _latin_lines(path):
        parts = line.split(separator)
        if len(parts) != 4 or not all(part.isdecimal() for part in parts) or parts[2] not in STARS:
            bad(UserError(f"{path}:{number}: expected user, item, rating 1 to 5 and time, found {line!r:.80}"))
        elif parts[1] not in titles:
            bad(UserError(f"{path}:{number}: movie {parts[1]} has no title in the file of titles"))
        elif int(parts[2]) < min_rating:
            below += 1
        else:
            table.add(parts[0], parts[1], float(parts[3]))
    return table.log(path, {"ratings_below_minimum": below})


def _latin_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="iso-8859-1", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")
