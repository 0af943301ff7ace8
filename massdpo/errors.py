"""The one exception for whatever a user can cause, and how other errors are quoted in it."""


class UserError(Exception):
    """A mistake in configuration, data or environment, reported in one line: what is wrong, where, what would be right.

    `run.py` prints the line and exits with 2, without a traceback (unless `debug=true`).
    """


def one_line(error: BaseException, with_type: bool = False) -> str:
    """An error's message on one line; with its type if asked for, or if there is no message."""
    said, name = " ".join(str(error).split())[:300], type(error).__name__
    return f"{name}: {said}" if with_type else said or name
