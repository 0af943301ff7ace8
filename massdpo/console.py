"""What a person sees during a run: progress, tables, warnings."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Rows = Sequence[Mapping[str, Any]]
PLAIN_EVERY = 15.0  # seconds between progress lines where stderr is no terminal


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[..., None]]:
    """Show how far a stage is, on stderr; yields `advance(steps=1, note="")`.

    On a terminal: a bar that disappears at the end. Elsewhere: a plain line every 15 s, none for what is quicker.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_progress(total, description)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bars.update(task, advance=steps, note=note)

        yield advance


def _plain_progress(total: int, description: str) -> Callable[..., None]:
    start = told = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal told, done
        done += steps
        now = time.monotonic()
        if now - told >= PLAIN_EVERY:
            told = now
            left = (now - start) * (total - done) / max(done, 1)
            line = f"{description}: {done} of {total} in {now - start:.0f} s, about {left:.0f} s left  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    return advance


def summary_table(title: str, rows: Rows, console: Console | None = None, whole: int = 0) -> None:
    """Print rows as a table, numbers to the right; text is shown as it is, never as markup.

    The first `whole` columns say what a row is, and are not cut where a terminal is narrow.
    """
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for place, name in enumerate(rows[0]):
        numeric = all(isinstance(row[name], (int, float)) for row in rows)
        cells = [name, *(_cell(row[name]) for row in rows)]
        width = max(map(len, cells)) if place < whole else None
        table.add_column(Text(name), justify="right" if numeric else "left", min_width=width, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    # Where no terminal says how wide it is, lines stay whole for whoever reads the log.
    (console or Console(width=None if sys.stdout.isatty() else 240)).print(table)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; cells are put in as they are."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def warn(line: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"warning: {line}")
