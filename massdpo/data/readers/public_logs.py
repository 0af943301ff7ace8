"""The raw files of LastFM, as sequences or as S-DPO publishes them, read into a `Log`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from massdpo.data.containers import placed_rows
from massdpo.data.raw import SPLITS, BadRows
from massdpo.data.readers.interactions import Log
from massdpo.data.text import read_jsonl, read_lines
from massdpo.errors import UserError


def read_lastfm_sequences(sequences: Path, names: Path, bad: BadRows) -> Log:
    """`sequences.jsonl` (split, user, items) and `id2name.txt` (`<id>::<name>`, ids from 0 without a gap)."""
    titles: list[str] = []
    for number, line in read_lines(names):
        item, _, title = line.partition("::")
        if item != str(len(titles)) or not title.strip():  # never skipped: that would shift every later id
            raise UserError(f"{names}:{number}: expected '{len(titles)}::<name>', found {line!r:.80}")
        titles.append(title.strip())
    wanted = (
        f"split (train, val or test), user, and items, a list of numbers from 0 to {len(titles) - 1} ({names.name})"
    )
    chains: dict[str, list[int]] = {}
    for number, row in read_jsonl(sequences, bad):
        split, user, items = (row.get(name) for name in ("split", "user", "items"))
        name = f"{split}/{user}"
        named = split in SPLITS and isinstance(user, int | str)
        if (
            not named
            or not isinstance(items, list)
            or not all(type(item) is int and item in range(len(titles)) for item in items)
        ):
            bad(UserError(f"{sequences}:{number}: a line must have {wanted}"))
        elif name in chains:
            bad(UserError(f"{sequences}:{number}: user {name} is listed twice"))
        else:
            chains[name] = items
    return _log(titles, chains)


def _log(titles: list[str], chains: dict[str, list[int]]) -> Log:
    """A log of the users `split/name`, each with the items in order."""
    user_E = np.repeat(np.arange(len(chains)), [len(items) for items in chains.values()])
    item_E = np.array([item for items in chains.values() for item in items], dtype=np.int64)
    return Log(titles, list(chains), user_E, item_E, split_of=[name.partition("/")[0] for name in chains])


def split_titles(joined: str, known: set[str]) -> list[str]:
    """The titles that `::` joins. One that begins or ends with a colon is recognised by being among the `known`."""

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
    for place, row in placed_rows(path, bad):
        if _is_whole(row):
            yield row
        else:
            bad(
                UserError(
                    f"{place}: a row must have historyList (titles joined by ::), itemList (titles that differ) and "
                    "trueSelection (one of these)"
                )
            )


def _is_whole(row: dict[str, Any]) -> bool:
    history, slate = row.get("historyList"), row.get("itemList")
    if not isinstance(history, str) or not isinstance(slate, list):
        return False
    are_titles = all(isinstance(title, str) and title.strip() for title in [*slate, *history.split("::")])
    return are_titles and len(set(slate)) == len(slate) and row.get("trueSelection") in slate


def chain_ready_rows(paths: dict[str, Path], bad: BadRows) -> Log:
    """The users' sequences behind S-DPO's JSON arrays of `historyList`, `itemList` and `trueSelection`, by split.

    A user's rows stand together, and the first of them has a history of 3 items.

    Raises:
        UserError: the rows do not make up whole sequences (some were left out).
    """
    rows_of = {split: list(_checked_rows(path, bad)) for split, path in paths.items()}
    known = {title for rows in rows_of.values() for row in rows for title in row["itemList"]}
    number_of: dict[str, int] = {}
    chains: dict[str, list[int]] = {}
    for split, rows in rows_of.items():
        users: list[list[int]] = []
        for row_number, row in enumerate(rows, start=1):
            titles = [*split_titles(row["historyList"], known), row["trueSelection"]]
            *history, target = (number_of.setdefault(title, len(number_of)) for title in titles)
            if len(history) == 3:
                users.append([*history, target])
            elif users and users[-1][-10:] == history:
                users[-1].append(target)
            else:
                raise UserError(
                    f"{paths[split]}: row {row_number} does not continue the row before it, so the users' sequences "
                    "cannot be put together: give the files as they were published"
                )
        chains |= {f"{split}/{user}": items for user, items in enumerate(users)}
    return _log(list(number_of), chains)
