"""Where step metrics go besides a run's own files: Weights & Biases, TensorBoard, or nowhere.

Weights & Biases works in a thread of its own: training never waits for it, and if it fails or hangs, that costs a run
one line of warning.
"""

import importlib.util
import os
import queue
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from massdpo.config.messages import comes_with
from massdpo.console import markdown_table, warn
from massdpo.errors import UserError, one_line
from massdpo.training.history import Number, Rows


class NoLogger:
    """Only the run's own files."""

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        pass

    def table(self, name: str, rows: Rows) -> None:
        pass

    def finish(self, metrics: Mapping[str, Any] | None = None, files: Sequence[Path] = ()) -> str | None:
        return None


class TensorBoard:
    """TensorBoard's event files, into `<run_dir>/tensorboard`; nothing leaves the machine."""

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(f"logger=tensorboard needs the package tensorboard, which {comes_with('loggers')}")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir / "tensorboard")
        self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(dict(config))}```")

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, rows: Rows) -> None:
        cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row.values()] for row in rows)
        self._writer.add_text(name, markdown_table(list(rows[0]), cells))

    def finish(self, metrics: Mapping[str, Any] | None = None, files: Sequence[Path] = ()) -> str | None:
        if writer := getattr(self, "_writer", None):  # there is none if the run ended before it started to log
            for name, value in (metrics or {}).items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"test/{name}", value)
            writer.close()
        return None


class Wandb:
    """Weights & Biases, into `<run_dir>/wandb`; offline it needs no account and no network, and asks nothing.

    The group is the run's sweep, the tags are its choices. `mode="online"` without credentials or network records
    offline, and says so. `timeout` (seconds) bounds how long the end of a run waits for what is still under way. Not
    recorded: git remote, code, credentials, names of user and host.
    """

    def __init__(
        self, project: str, mode: Literal["offline", "online"], entity: str | None = None, timeout: float = 30.0
    ):
        self.project, self.mode, self.entity, self.timeout = project, mode, entity, timeout
        self._actions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._run: Any = None
        self._broken = False

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._thread.start()
        self._actions.put(lambda: self._init(config, run_dir))

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
        if not self._thread.ident:  # the run ended before it started to log
            return None
        self._actions.put(lambda: self._end(metrics, files))
        self._actions.put(None)
        self._thread.join(self.timeout)
        if self._thread.is_alive():
            self._give_up(f"no answer within {self.timeout:g} s")
        if self._run is None or not self._run.offline:
            return None
        recorded = _recorded(Path(self._run.settings.sync_dir).parent)
        parts = [path for path in recorded if path.name.endswith(f"-{self._run.id}")]
        return shlex.join(["wandb", "sync", *(os.path.relpath(part) for part in parts)])

    def _init(self, config: Mapping[str, Any], run_dir: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # before the import, to silence the notes about logging in too
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,  # the command line as typed, the names of user and host
            x_save_requirements=False,
            init_timeout=self.timeout / 2,  # leaves time to record offline if the server does not answer
            finish_timeout=self.timeout,
        )
        run_dir.mkdir(parents=True, exist_ok=True)
        recorded = _recorded(run_dir / "wandb")  # by the same run, before it was interrupted

        def init(mode: Literal["offline", "online"]) -> Any:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,
                dir=run_dir,
                id=recorded[-1].name.rpartition("-")[2] if recorded else None,
                resume="allow",
                name=run_dir.name,
                group=config.get("sweep"),
                tags=[str(choice)[:64] for choice in config.get("choices", {}).values() if choice],  # or W&B refuses
                config=dict(config),
                reinit="create_new",  # an earlier job of this process that died left its run open
                settings=settings,
            )

        if self.mode == "online":
            try:
                if wandb.login(prompt=False):
                    self._run = init("online")
                    return
                warn("logger.mode=online without W&B credentials: recorded offline (`wandb login`, then sync)")
            except Exception as error:  # no network, a refused key, ...: nothing logged is lost
                warn(f"W&B is unavailable ({one_line(error, with_type=True)}): recorded offline")
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
                    self._give_up(one_line(error, with_type=True))

    def _give_up(self, why: str) -> None:
        if not self._broken:
            self._broken = True
            warn(f"W&B stopped recording ({why}); the run's own files are complete")


def _recorded(folder: Path) -> list[Path]:
    """The folders `run-TIME-ID` and `offline-run-TIME-ID` that W&B recorded into, one per start, oldest first."""
    return sorted(folder.glob("*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
