"""Ctrl-C and SIGTERM end a stage between two steps, after a checkpoint."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; a checkpoint has been written."""


@contextmanager
def asked_to_stop(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question that the loop asks between steps; a second Ctrl-C stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    def stop() -> bool:
        if accelerator.num_processes == 1:
            return bool(received)
        asked = torch.tensor(float(bool(received)), device=accelerator.device)  # one process may hear it a step later
        return bool(accelerator.reduce(asked, "sum") > 0)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
