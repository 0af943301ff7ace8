"""The one exception for what a user can cause, and how other errors are put into it."""


class UserError(Exception):
    """A mistake in configuration, data or environment, reported in one line: what is wrong, where, what would be right.

    `run.py` prints the line and exits with 2, without a traceback (unless `debug=true`).
    """


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
