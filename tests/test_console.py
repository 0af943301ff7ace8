"""What a terminal shows while a run goes: bars, what is left, lines that stay; and how little where little is asked."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from massdpo import console
from massdpo.console import Expected, patiently, progress, say, show_as
from tests.conftest import ROOT

# A stage of 4 steps, each of 3 batches, with a validation inside and a line after each of two epochs; then a test.
STAGES = """
import time
from massdpo.console import progress, say, show_as
show_as("normal", {"sft": 1.0, "test": 1.0})
with progress(4, "sft") as advance:
    for step in range(4):
        for batch in range(3):
            time.sleep(0.12)
            advance(1 / 3)
        advance(0, f"loss {1 / (1 + step):.3f}")
        if step % 2:
            with progress(2, "validate") as look:
                time.sleep(0.12)
                look(2)
            say(f"sft epoch {1 + step // 2}/2: loss 0.500, val accuracy 0.250, mrr 0.500, margin 1.000")
with progress(3, "test") as advance:
    for _ in range(3):
        time.sleep(0.12)
        advance()
"""


@pytest.fixture(autouse=True)
def as_it_was() -> None:
    show_as("normal")


def typed(columns: int, program: str) -> str:
    """All that a terminal of this width is sent by the program."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        **{"stdin": its, "stdout": its, "stderr": its, "cwd": ROOT},  # type: ignore[call-overload]
        env={**environment, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)},
    )
    os.close(its)
    sent = b""
    while True:
        try:
            part = os.read(mine, 1 << 16)
        except OSError:  # Linux's end of a terminal
            break
        if not part:
            break
        sent += part
    os.close(mine)
    assert process.wait() == 0
    return sent.decode()


def shown_at_the_end(sent: str) -> list[str]:
    """The lines of the screen when all was sent: the cursor's moves and erasures that rich uses, done."""
    screen, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", sent):
        if part == "\n":
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif part == "\r":
            column = 0
        elif part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.endswith("K"):
            screen[row] = "" if part == "\x1b[2K" else screen[row][:column]
        elif not part.startswith("\x1b"):
            screen[row] = screen[row][:column].ljust(column) + part + screen[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in screen if line.strip()]


@pytest.mark.parametrize("columns", [80, 120])
def test_bars_move_within_a_step_fit_the_terminal_and_leave_what_is_to_stay(columns: int) -> None:
    sent = typed(columns, STAGES)
    epochs = [f"sft epoch {epoch}/2: loss 0.500, val accuracy 0.250, mrr 0.500, margin 1.000" for epoch in (1, 2)]
    assert shown_at_the_end(sent) == epochs
    frames = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).rstrip() for frame in re.split(r"[\r\n]+", sent)]
    assert max(map(len, frames)) <= columns
    bars = [frame for frame in frames if frame.startswith("sft ") and "/4" in frame]
    at = [(re.search(r"(\d)/4", bar)[1], bar.count("━")) for bar in bars]  # type: ignore[index]
    assert {"0", "1", "2", "3"} <= {steps for steps, _ in at}
    filled = [len(re.match(r"sft\s+(\S*)", re.sub(r"\x1b\[38;5;237m.*", "", part))[1]) for part in raw_bars(sent)]  # type: ignore[index]
    assert len(set(filled)) >= 9, "it moves with each batch, not with each step"
    assert any("validate" in frame for frame in frames) and any("loss 0.500" in bar for bar in bars)
    left = [float(match[1]) for bar in bars if (match := re.search(r"\(run: (\d+) s\)", bar))]
    assert len(left) > 5 and all(number <= 4 for number in left) and left[0] >= left[-1]


def raw_bars(sent: str) -> list[str]:
    """The frames of the stage's bar, with the colour in which what is left of it is drawn."""
    return [
        re.sub(r"\x1b\[(?!38;5;237m)[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]+", sent) if "/4" in part
    ]


def test_what_takes_long_without_a_bar_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.05)
    for level, told in (("normal", True), ("quiet", False), ("sweep", False)):
        show_as(level)
        with patiently("hashing"):
            time.sleep(0.3)
        assert ("hashing" in capsys.readouterr().err) is told
    show_as("normal")
    with patiently("nothing"):
        pass
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("level", ["quiet", "sweep", "normal", "debug"])
def test_lines_are_for_those_who_want_them(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_as(level)
    say("a line")
    assert capsys.readouterr().err == ("a line\n" if level in ("normal", "debug") else "")


def test_quiet_shows_no_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    for level, lines in (("quiet", 0), ("sweep", 3), ("normal", 3)):
        show_as(level)
        with progress(3, "a stage") as advance:
            for _ in range(3):
                advance()
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_what_is_left_of_a_run_follows_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned: 10 + 20 + 30 s. The first part takes twice as long, so does the rest; the second was not needed."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = Expected({"sft": 10.0, "reference": 20.0, "preference": 30.0}, began=0.0)
    assert run.left("sft", 10.0) == 60
    run.begin("sft", 0.0)
    now[0], run.done["sft"] = 10.0, 5.0
    assert run.left("sft", 10.0) == pytest.approx(110)
    now[0], run.done["sft"] = 20.0, 10.0
    run.begin("preference", 0.5)  # half of it was done before the run was stopped
    assert run.left("preference", 30.0) == pytest.approx(30)
    assert run.left("preference", 90.0) == pytest.approx(90)  # slower than planned: the run can't end before its stage


def test_the_bars_are_one_display(tmp_path: Path) -> None:
    """A second display on the same terminal would overwrite the first one's lines."""
    program = "from massdpo import console\n" + (
        "with console.progress(2, 'outer') as a:\n"
        "    first = console.screen.bars\n"
        "    with console.progress(2, 'inner') as b:\n"
        "        assert console.screen.bars is first is not None\n"
        "    assert len(first.tasks) == 1\n"
        "assert console.screen.bars is None\n"
    )
    assert "Error" not in typed(80, program)
