"""What a person sees of a run: progress and the time left, tables, warnings, as much as was asked for."""

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
LEVELS = ("quiet", "sweep", "normal", "debug")  # quiet and sweep: a line at the end, sweep with progress bars too
PLAIN_EVERY = 15.0  # seconds between progress lines if stderr is not a terminal
PATIENCE = 5.0  # seconds after which work without a progress bar is announced


@dataclass
class Expected:
    """Planned seconds of a run's parts, in order, by the names of their progress bars; corrected by what they take."""

    seconds: dict[str, float]
    done: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def begin(self, part: str, share: float) -> None:
        """A part begins, a share of it already done; the parts before it are over or were not needed."""
        for earlier in self.seconds:
            if earlier == part:
                self.seconds[part] *= 1 - share
                return
            self.seconds[earlier] = self.done.get(earlier, 0.0)

    def left(self, part: str, of_part: float) -> float:
        """Seconds until the run ends, if the current part needs `of_part` more."""
        total, done = sum(self.seconds.values()), sum(self.done.values())
        pace = (time.monotonic() - self.began) / done if done > total / 20 else 1.0
        names = list(self.seconds)
        return of_part + pace * sum(self.seconds[name] for name in names[names.index(part) + 1 :])


class _Screen:
    """What this process shows."""

    level = "normal"
    bars: Progress | None = None  # of the current stage, if stderr is a terminal
    expected: Expected | None = None  # of the whole run, if it was planned


screen = _Screen()


def show_as(level: str, seconds: Mapping[str, float] | None = None) -> None:
    """Set how much is shown, one of `LEVELS`; `seconds`: how long the parts of the run that begins will take."""
    screen.level, screen.expected = level, Expected(dict(seconds)) if seconds else None


def shows(level: str) -> bool:
    return LEVELS.index(screen.level) >= LEVELS.index(level)


def in_any_locale() -> None:
    """Show what a terminal's encoding lacks as `?`, instead of ending the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(line: str) -> None:
    """Print a line that stays, to stderr."""
    if shows("normal"):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def patiently(what: str) -> Iterator[None]:
    """Say what is going on if it takes more than a few seconds, and again every half a minute.

    On a terminal after `PATIENCE` seconds; elsewhere, where nobody is waiting, after three times as many.
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
    """Show the progress of a stage on stderr; yields `advance(steps=1, note="")`, which takes fractions of a step too.

    On a terminal: a bar that disappears at the end, below any others. Elsewhere: a plain line every 15 s, none for a
    shorter stage. Both say how long the rest of the run will take, if it was planned.
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
            done = round(done + steps, 6)  # three thirds of a step make a whole one
            seconds = time.monotonic() - began
            left = seconds * (total - done) / (done - first or 1)
            if expected:
                expected.done[description] = (done - first) * planned
            of_run = f" (run: {spell(expected.left(description, left))})" if expected else ""
            if shows("sweep"):
                tell(done, seconds, note, f"about {spell(left)} left{of_run}")

        yield advance


def spell(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _bar(total: int, description: str) -> Iterator[Callable[..., None]]:
    """A bar in the one display that a terminal has."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    outermost = screen.bars is None
    # Drawn by the thread that prints: rich's own thread could draw a frame after a line that should follow it.
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
    """Print rows as a table, numbers aligned right; text is printed as it is, never as markup.

    The first `whole` columns say what a row is, and are not folded on a narrow terminal.
    """
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for place, name in enumerate(rows[0]):
        numeric = all(isinstance(row[name], (int, float)) for row in rows)
        cells = [name, *(_cell(row[name]) for row in rows)]
        width = max(map(len, cells)) if place < whole else None
        table.add_column(Text(name), justify="right" if numeric else "left", min_width=width, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    # Without a terminal, lines stay whole for the reader of the log.
    (console or Console(width=None if sys.stdout.isatty() else 240)).print(table)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; cells are inserted as they are."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def warn(line: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"warning: {line}")
