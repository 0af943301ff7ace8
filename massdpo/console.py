"""What a person sees while a run goes: how far it is and what is left, tables, warnings; as much as was asked for."""

import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Rows = Sequence[Mapping[str, Any]]
LEVELS = ("quiet", "sweep", "normal", "debug")  # quiet and sweep: a line at the end, the latter with bars
PLAIN_EVERY = 15.0  # seconds between progress lines where stderr is no terminal
PATIENCE = 5.0  # seconds after which what goes on without a bar is told


@dataclass
class Expected:
    """Seconds that a run's parts will take, by the name of their bar and in their order, held against what they do."""

    seconds: dict[str, float]
    done: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def begin(self, part: str, share: float) -> None:
        """A part begins, with a share of it done before; what comes before it is over, or was not needed."""
        for earlier in self.seconds:
            if earlier == part:
                self.seconds[part] *= 1 - share
                return
            self.seconds[earlier] = self.done.get(earlier, 0.0)

    def left(self, part: str, of_part: float) -> float:
        """Until the run ends, where the part that goes on will take so much more by its own pace."""
        total, done = sum(self.seconds.values()), sum(self.done.values())
        pace = (time.monotonic() - self.began) / done if done > total / 20 else 1.0
        names = list(self.seconds)
        return of_part + pace * sum(self.seconds[name] for name in names[names.index(part) + 1 :])


class _Screen:
    """What this process shows."""

    level = "normal"
    bars: Progress | None = None  # of the stage that goes on, where stderr is a terminal
    expected: Expected | None = None  # of the whole run, where it was planned


screen = _Screen()


def show_as(level: str, seconds: Mapping[str, float] | None = None) -> None:
    """How much is shown from now on, one of `LEVELS`; `seconds`: what the parts of the run that begins will take."""
    screen.level, screen.expected = level, Expected(dict(seconds)) if seconds else None


def shows(level: str) -> bool:
    return LEVELS.index(screen.level) >= LEVELS.index(level)


def in_any_locale() -> None:
    """What a terminal's encoding lacks is shown as `?`, instead of ending the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(line: str) -> None:
    """A line that stays, on stderr."""
    if shows("normal"):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def patiently(what: str) -> Iterator[None]:
    """Say what goes on where it takes longer than some seconds, and that it still does every half a minute.

    On a terminal after `PATIENCE` seconds; elsewhere, where nobody waits, after three times as many.
    """
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = PATIENCE if sys.stderr.isatty() else 3 * PATIENCE
        while not over.wait(wait):
            say(f"{what}: {time.monotonic() - began:.0f} s so far")
            wait = 30.0

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def progress(total: int, description: str, done: float = 0) -> Iterator[Callable[..., None]]:
    """Show how far a stage is, on stderr; yields `advance(steps=1, note="")`, whose steps may be parts of one.

    On a terminal: a bar that disappears at the end, below those that are there. Elsewhere: a plain line every 15 s,
    none for what is quicker. Both say how long the whole run will take, where that was planned.
    """
    expected = screen.expected if screen.expected and description in screen.expected.seconds else None
    if expected:
        expected.begin(description, done / max(total, 1))
    way = _bar if shows("sweep") and Console(stderr=True).is_terminal else _lines
    began, first = time.monotonic(), done
    planned = expected.seconds[description] / max(total - done, 1) if expected else 0.0

    with way(total, description) as tell:

        def advance(steps: float = 1, note: str = "") -> None:
            nonlocal done
            done = round(done + steps, 6)  # thirds of a step make a whole one
            seconds = time.monotonic() - began
            left = seconds * (total - done) / (done - first or 1)
            if expected:
                expected.done[description] = (done - first) * planned
            of_run = f" (run: {spell(expected.left(description, left))})" if expected else ""
            if shows("sweep"):
                tell(done, seconds, note, f"about {spell(left)} left{of_run}")

        yield advance


def spell(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


@contextmanager
def _bar(total: int, description: str) -> Iterator[Callable[..., None]]:
    """A line of the one display that a terminal has."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    outermost = screen.bars is None
    # Drawn by the thread that prints: one of rich's own could write its frame after the line that was to follow it.
    bars = screen.bars = screen.bars or Progress(
        *columns, console=Console(stderr=True), transient=True, auto_refresh=False
    )
    if outermost:
        bars.start()
    task = bars.add_task(description, total=total, note="", left="")

    drawn = 0.0

    def tell(done: float, seconds: float, note: str, left: str) -> None:
        nonlocal drawn
        bars.update(task, completed=done, left=left)
        if note:
            bars.update(task, note=note)
        if time.monotonic() - drawn >= 0.1:
            bars.refresh()
            drawn = time.monotonic()

    try:
        yield tell
    finally:
        bars.remove_task(task)
        if outermost:
            bars.stop()
            screen.bars = None


@contextmanager
def _lines(total: int, description: str) -> Iterator[Callable[..., None]]:
    told = 0.0

    def tell(done: float, seconds: float, note: str, left: str) -> None:
        nonlocal told
        if seconds - told >= PLAIN_EVERY:
            told = seconds
            line = f"{description}: {int(done)} of {total} in {seconds:.0f} s, {left}  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    yield tell


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
