"""A file of responses as token ids, so that no response is decoded twice.

    {"teacher": "3f1c..", "temperature": 1.0, ..}             what all responses depend on
    {"id": "17", "sample": 0, "prompt": "9a0b..", "response_ids": [..], "ended": true}

Lines are only appended, and by one process at a time. Several jobs may share a file. If two jobs
add a response to the same request, the first stays, and both jobs use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_opdlm.responses.source import Response


class ResponseKey(NamedTuple):
    """The key of a response in a file."""

    prompt_id: str
    sample: int
    prompt: str
    """Digest of the prompt's token ids. In other data the same id may name another prompt."""

    @classmethod
    def of(cls, prompt_id: str, sample: int, prompt_ids: Tensor) -> ResponseKey:
        """Returns the key of one sample of a prompt.

        Args:
            prompt_id: id of the prompt.
            sample: index of the sample.
            prompt_ids: [P] int64, token ids of the prompt.
        """
        digest = hashlib.blake2b(repr(prompt_ids.tolist()).encode(), digest_size=8).hexdigest()
        return cls(prompt_id, sample, digest)


class ResponseFile:
    """One file of responses. Only the main process of a job calls its methods.

    Attributes:
        path: path of the file.
        settings: JSON values that all its responses depend on.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, vocab_size: int) -> None:
        """Remembers the path. The folder must exist; the file need not.

        Args:
            path: path of the file.
            settings: JSON values that all its responses depend on.
            vocab_size: token ids must be less than this.
        """
        self.path, self.settings, self.vocab_size = Path(path), dict(settings), vocab_size
        self._places: dict[ResponseKey, int] = {}
        self._end = 0

    def check(self) -> None:
        """Reads the file if it exists; does not create one.

        An incomplete last line is removed, and an empty file gets its first line.

        Raises:
            ValueError: the file has other settings, or is not a file of responses.
        """
        if not self.path.parent.is_dir():
            raise ValueError(
                f"teacher_responses={self.path}: there is no folder {self.path.parent}; make it "
                "first"
            )
        if self.path.exists():
            with self._opened():
                pass

    def read(self, keys: Iterable[ResponseKey]) -> dict[ResponseKey, Response]:
        """Returns the responses of `keys` that the file has.

        Raises:
            ValueError: see `check`.
        """
        if not self.path.exists():
            return {}
        with self._opened() as file:
            return self._read(file, keys)

    def add(self, responses: Mapping[ResponseKey, Response]) -> dict[ResponseKey, Response]:
        """Appends responses. If another job was faster, its response stays.

        A job that is killed here leaves at most one incomplete line, which the next job removes.

        Returns:
            The responses that the file now has for these keys.

        Raises:
            ValueError: see `check`.
            OSError: the file cannot be written.
        """
        with self._opened() as file:
            new = [_to_line(key, r) for key, r in responses.items() if key not in self._places]
            file.seek(self._end)
            file.write(b"".join(new))
            file.flush()
            os.fsync(file.fileno())
            self._catch_up(file)
            return self._read(file, responses)

    def _read(self, file: BinaryIO, keys: Iterable[ResponseKey]) -> dict[ResponseKey, Response]:
        found = {}
        for key in keys:
            if key in self._places:
                file.seek(self._places[key])
                values = json.loads(file.readline())
                ids = torch.tensor(values["response_ids"], dtype=torch.int64)
                found[key] = Response(ids, values["ended"])
        return found

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """Opens the file and locks it against other processes.

        The file then has its first line and no incomplete line, and `_places` knows all lines.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(
                f"teacher_responses={self.path} cannot be opened ({error.strerror}); name a file "
                "that can be written"
            ) from error
        with open(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            except OSError as error:
                raise ValueError(
                    f"teacher_responses={self.path}: no locks on this file system "
                    f"({error.strerror}); name a file where flock works"
                ) from error
            self._catch_up(file)
            yield file

    def _catch_up(self, file: BinaryIO) -> None:
        """Records the places of the lines that were appended since the last call."""
        if file.seek(0, os.SEEK_END) < self._end:  # the file was replaced by another one
            self._places, self._end = {}, 0
        file.seek(self._end)
        header = json.dumps(self.settings).encode() + b"\n"
        for line in file:
            if not line.endswith(b"\n"):  # its writer is dead, or it would still hold the lock
                if self._end == 0 and not header.startswith(line):  # not a file of responses
                    raise self._unreadable()
                file.truncate(self._end)
                break
            self._note(line)
            self._end += len(line)
        if self._end == 0:
            file.seek(0)
            file.write(header)
            file.flush()
            self._end = file.tell()

    def _note(self, line: bytes) -> None:
        values = self._parse(line)
        if self._end == 0:
            self._require_settings(values)
            return
        try:
            key = ResponseKey(values["id"], values["sample"], values["prompt"])
            ids = values["response_ids"]
            valid = isinstance(ids, list) and isinstance(values["ended"], bool)
            valid = valid and set(map(type, ids)) <= {int}
            valid = valid and (not ids or 0 <= min(ids) <= max(ids) < self.vocab_size)
        except KeyError:
            valid = False
        if not valid:
            raise self._unreadable()
        self._places.setdefault(key, self._end)

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise self._unreadable()
        return values

    def _unreadable(self) -> ValueError:
        number = len(self._places) + 1 + (self._end > 0)
        return ValueError(
            f"teacher_responses={self.path}: line {number} is not a line of a file of responses; "
            "remove the file, or name another one"
        )

    def _require_settings(self, found: Mapping[str, Any]) -> None:
        if not self.settings.keys() & found.keys():
            raise self._unreadable()
        names = [*self.settings, *(name for name in found if name not in self.settings)]
        different = [n for n in names if found.get(n) != self.settings.get(n)]
        if different:
            name = different[0]
            more = f" ({len(different)} fields differ)" if len(different) > 1 else ""
            raise ValueError(
                f"teacher_responses={self.path} holds responses of other settings: {name} was "
                f"{found.get(name)} and is now {self.settings.get(name)}{more}; set it back, or "
                "name another file"
            )


def _to_line(key: ResponseKey, response: Response) -> bytes:
    values = {
        "id": key.prompt_id,
        "sample": key.sample,
        "prompt": key.prompt,
        "response_ids": response.token_ids.tolist(),
        "ended": response.ended,
    }
    return json.dumps(values).encode() + b"\n"
