"""What a run tells while it goes: the history file, Weights & Biases, and the console.

Weights & Biases works in a thread of its own: training never waits for it, and one that fails or hangs costs a run
one line of warning.
"""

import csv
import io
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from massdpo import store

Number = int | float
Rows = Sequence[Mapping[str, Any]]


class History:
    """`history.csv`: one row a logged step, each a dict of numbers; columns in the order in which they first appeared.

    The file is written whole, at most every `write_every` seconds while rows are added and by `write()`.
    """

    def __init__(self, path: Path, rows: list[dict[str, Number]] | None = None, write_every: float = 10.0):
        self.path = path
        self.rows = rows or []
        self.write_every = write_every
        self._written = time.monotonic()

    @classmethod
    def load(cls, path: Path) -> "History":
        """The history as it was written, to go on with; floats come back to the last digit."""
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: _number(cell) for name, cell in row.items() if cell != ""} for row in csv.DictReader(file)]
        return cls(path, rows)

    def append(self, row: Mapping[str, Number]) -> None:
        self.rows.append(dict(row))
        if time.monotonic() - self._written > self.write_every:
            self.write()

    def write(self) -> None:
        columns = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        store.write_text(self.path, text.getvalue())
        self._written = time.monotonic()


def _number(cell: str) -> Number:
    try:
        return int(cell)
    except ValueError:
        return float(cell)


class Tracker(Protocol):
    """Where step metrics go beside `history.csv`. No method raises or waits; `finish` waits a bounded time."""

    def start(
        self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None = None, tags: Sequence[str] = ()
    ) -> None: ...

    def log(self, step: int, metrics: Mapping[str, Number]) -> None: ...

    def table(self, name: str, rows: Rows) -> None: ...

    def finish(self, metrics: Mapping[str, Any] | None = None, files: Sequence[Path] = ()) -> str | None:
        """End the run with its final metrics (None: it failed) and result files, kept as an artifact.

        Returns the command that uploads what was recorded offline, where there is one.
        """
        ...


class NoLogger:
    """Only the run's own files."""

    def start(
        self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        pass

    def table(self, name: str, rows: Rows) -> None:
        pass

    def finish(self, metrics: Mapping[str, Any] | None = None, files: Sequence[Path] = ()) -> str | None:
        return None


class Wandb:
    """Weights & Biases, into `<run_dir>/wandb`; offline it needs no account, no network and asks nothing.

    `mode="online"` without credentials or network records offline, and says so. `timeout` (seconds) bounds how long the
    end of a run waits for what is still under way. Not recorded: git remote, code, credentials, names of user and host.
    """

    def __init__(
        self, project: str, mode: Literal["offline", "online"], entity: str | None = None, timeout: float = 30.0
    ):
        self.project, self.mode, self.entity, self.timeout = project, mode, entity, timeout
        self._actions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._run: Any = None
        self._broken = False

    def start(
        self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        self._thread.start()
        self._actions.put(lambda: self._init(config, run_dir, name, group, tags))

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        row = dict(metrics)
        self._actions.put(lambda: self._run.log(row, step=step))

    def table(self, name: str, rows: Rows) -> None:
        """A table of the run, such as the picked negatives of some prompts; rows have the same columns."""
        columns: list[str | int] = list(rows[0])
        cells: list[Iterable[Any]] = [list(row.values()) for row in rows]

        def log() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=columns, data=cells)})

        self._actions.put(log)

    def finish(self, metrics: Mapping[str, Any] | None = None, files: Sequence[Path] = ()) -> str | None:
        self._actions.put(lambda: self._end(metrics, files))
        self._actions.put(None)
        self._thread.join(self.timeout)
        if self._thread.is_alive():
            self._give_up(f"no answer within {self.timeout:g} s")
        if self._run is None or not self._run.offline:
            return None
        return f"wandb sync {shlex.quote(os.path.relpath(self._run.settings.sync_dir))}"

    def _init(
        self, config: Mapping[str, Any], run_dir: Path, name: str, group: str | None, tags: Sequence[str]
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # must stand before the import to keep the login notes away too
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,  # the command line as it was typed, the names of user and host
            x_save_requirements=False,
            init_timeout=self.timeout / 2,  # leaves time to record offline what a server did not take
            finish_timeout=self.timeout,
        )
        run_dir.mkdir(parents=True, exist_ok=True)

        def init(mode: Literal["offline", "online"]) -> Any:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,
                dir=run_dir,
                name=name,
                group=group,
                tags=[tag[:64] for tag in tags],  # W&B refuses longer ones
                config=dict(config),
                reinit="create_new",  # a job of the same process that died left its run open
                settings=settings,
            )

        if self.mode == "online":
            try:
                if wandb.login(prompt=False):
                    self._run = init("online")
                    return
                _warn("logger.mode=online without W&B credentials: recorded offline (`wandb login`, then sync)")
            except Exception as error:  # no network, a refused key, ...: nothing that was logged is lost
                _warn(f"W&B is not to be had ({_one_line(error)}): recorded offline")
        self._run = init("offline")

    def _end(self, metrics: Mapping[str, Any] | None, files: Sequence[Path]) -> None:
        import wandb

        if metrics is not None:
            self._run.summary.update(dict(metrics))
        if files:
            artifact = wandb.Artifact(f"results-{self._run.id}", type="results")
            for file in files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if metrics is not None else 1)

    def _work(self) -> None:
        while (action := self._actions.get()) is not None:
            if not self._broken:
                try:
                    action()
                except Exception as error:  # whatever W&B raises: the run and its own files matter more
                    self._give_up(_one_line(error))

    def _give_up(self, why: str) -> None:
        if not self._broken:
            self._broken = True
            _warn(f"W&B was left out ({why}); the run's own files are complete")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _warn(line: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"warning: {line}")


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


def summary_table(title: str, rows: Rows, console: Console | None = None) -> None:
    """Print rows as a table, numbers to the right; text is shown as it is, never as markup."""
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for name in rows[0]:
        numeric = all(isinstance(row[name], (int, float)) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    # Where no terminal says how wide it is, lines stay whole for whoever reads the log.
    (console or Console(width=None if sys.stdout.isatty() else 240)).print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
