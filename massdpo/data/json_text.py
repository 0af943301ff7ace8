"""JSON that is decoded value by value as it is read, so that an array of any length can be read."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from massdpo.data.text import encoding_of, opened, reading_errors
from massdpo.errors import UserError

BLOCK = 1 << 20


class JsonText:
    """An open JSON file: go inside an array with `seek`, then take its `elements`."""

    def __init__(self, path: Path, encoding: str):
        self.path = path
        self.encoding = encoding
        self.decoder = json.JSONDecoder()
        self.text, self.place, self.line = "", 0, 1
        self.keys: list[str] = []
        self.is_one_object = False  # over several lines, and nothing after it

    def __enter__(self) -> "JsonText":
        with reading_errors(self.path):
            self.file = opened(self.path)
            self.decoded = codecs.getincrementaldecoder(encoding_of(self.file, self.encoding))()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def seek(self, keys: tuple[str | None, ...]) -> bool:
        """Go inside the array that the file is, or the array of objects below one of `keys` if it is an object."""
        try:
            if self._took("["):
                return True
            if self._took("{"):
                return self._seek_key(keys)
        except UserError:
            pass  # reported when lines are read
        return False

    def _seek_key(self, keys: tuple[str | None, ...]) -> bool:
        while self._next() == '"':
            self.keys.append(self._value())
            self._took(":")
            if self.keys[-1] in keys and self._took("["):
                if self._next() == "{":
                    return True
                self._leave()  # another kind of array under this name
            else:
                self._pass_by()
            self._took(",")
        self.is_one_object = self._took("}") and self.line > 1 and not self._next()
        return False

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Each element of the array, with the line in which it begins."""
        first = True
        while self._next() != "]":
            if not first and not self._took(","):
                raise self._error("a comma or ] is needed between two elements")
            first = False
            self._next()
            yield self.line, self._value()

    def end(self) -> None:
        """Leave the array that was read and the object around it, after which nothing may follow."""
        self._leave()
        if self.keys:
            while self._took(","):
                self._value()
                self._took(":")
                self._pass_by()
            self._took("}")
        if self._next():
            whole = f"the object whose {self.keys[-1]!r} was read" if self.keys else "the array"
            raise self._error(f"something follows {whole}: where each line is a row, call the file .jsonl")

    def _pass_by(self) -> None:
        """Move past a value, in pieces where it is an array."""
        if self._took("["):
            self._leave()
        else:
            self._value()

    def _leave(self) -> None:
        """Move to the end of the array and out of it."""
        for _ in self.elements():
            pass
        self._took("]")

    def _took(self, character: str) -> bool:
        found = self._next() == character
        self.place += found
        return found

    def _next(self) -> str:
        """The next character that is not blank, without moving past it; at the end, an empty text."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.line += self.text[self.place] == "\n"
                self.place += 1
            if self.place < len(self.text) or not self._more():
                return self.text[self.place : self.place + 1]

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
            except RecursionError:
                raise self._error("nested too deeply") from None
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if cut_off and self._more():
                    continue
                self.line += self.text.count("\n", self.place, error.pos)
                raise self._error(error.msg) from None
            if end < len(self.text) or not self._more():  # a number at the end of the block may go on
                self.line += self.text.count("\n", self.place, end)
                self.place = end
                return value

    def _more(self) -> bool:
        """Read on, at least as much as is still undecoded; False at the end."""
        with reading_errors(self.path):
            block = self.file.read(max(BLOCK, len(self.text) - self.place))
        try:
            text = self.decoded.decode(block, final=not block)
        except UnicodeError as error:
            raise self._error(f"{error}; save the file as UTF-8, or set dataset.encoding") from error
        self.text, self.place = self.text[self.place :] + text, 0
        return bool(block)

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self.path}:{self.line}: not JSON ({reason})")
