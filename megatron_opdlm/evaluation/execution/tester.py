"""The process that runs tests, and what it has of the solution. See peers.py."""

from __future__ import annotations

from megatron_opdlm.evaluation.execution.peers import (
    Peer,
    call_deep,
    describe,
    is_builtin,
    nearest_exception,
)
from megatron_opdlm.evaluation.execution.solution import OPERATIONS, PAIRS
from megatron_opdlm.evaluation.execution.wire import Reader, WireError, count

TYPE_CHECKING = False  # typing takes longer to import than most solutions take to run
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any


class SolutionGone(BaseException):
    """The solution's process ended, or sent what is no message. No test can catch it by mistake."""


class UntestableError(Exception):
    """The tests ask for what cannot be done. It is not the solution's fault."""


class Tester(Peer):
    """The process that runs tests.

    Attributes:
        fault: why the tests cannot be run; None if nothing happened.
        gone: why nothing is heard from the solution any more; None if it is there.
        calls: number of requests about the solution.
    """

    def __init__(self, inbox: int, outbox: int, shared: Mapping[str, type]) -> None:
        super().__init__(inbox, outbox, shared)
        self.fault: str | None = None
        self.gone: str | None = None
        self.calls = 0
        self._exceptions: dict[str, type[Exception]] = {}
        self._functions: list[Callable[..., Any]] = []
        self._remotes: dict[int, Remote] = {}

    def request(self, operation: str, *arguments: Any) -> Any:
        """Asks the solution's process for something, and returns the answer.

        Raises:
            SolutionGone: there is no answer.
            UntestableError: an argument cannot be sent.
            BaseException: the solution raised it.
        """
        self.calls += 1
        self._tell_or_fail(operation, *arguments)
        return self.answer()

    def answer(self) -> Any:
        """Returns what the solution answers; until it does, calls its callbacks."""
        while True:
            try:
                kind, *content = self.hear()
            except EOFError:
                raise self._lost("its process ended") from None
            except WireError as error:
                raise self._lost(f"its process sent {error}") from None
            if kind == "value":
                return content[0]
            if kind == "raise":
                raise self._exception(*content)
            self._call_back(*content)

    def call(self, target: Remote, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Calls a function of the solution; lists that it changes in place are changed here.

        As in a generator, StopIteration becomes a RuntimeError: raised in `all(map(...))`, it would
        end the loop and pass the test.
        """
        try:
            sent = [call_deep(self.dumps, argument) for argument in arguments]
        except WireError as error:
            raise self._untestable(error) from None
        try:
            result, changes = self.request("call", target, sent, dict(named))
        except StopIteration:
            raise RuntimeError("the solution raised StopIteration") from None
        for place, value in changes.items():
            _put_into(arguments[place], value)
        return result

    def supply(self, name: str, kind: str) -> Any:
        """Returns what the solution has under a global name.

        Args:
            name: the name.
            kind: what the solution says it is: "module NAME", "exception" or "value".
        """
        if kind == "exception":
            self._exceptions[name] = type(name, (Exception,), {})
            return self._exceptions[name]
        module = kind.removeprefix("module ")
        # The tester has modules of its own. A solution cannot pass off one for another.
        if module != kind and (name, module) in {(module, module), ("np", "numpy")}:
            return __import__(module)
        return self.request("global", name)

    def write_other(self, value: Any, out: list[bytes]) -> bool:
        """Appends the bytes of a remote object, a class of the prelude, or a function."""
        if type(value) is Remote:
            out.append(b"r" + count(value._number))
        elif isinstance(value, type) and self.class_of(value.__name__) is value:
            out.append(b"C")
            self.write(value.__name__, out)
        elif is_builtin(value):
            out.append(b"B")
            self.write(value.__name__, out)
        elif super().write_other(value, out):
            pass
        elif callable(value):
            self._functions.append(value)
            out.append(b"a" + count(len(self._functions) - 1))
        else:
            return False
        return True

    def read_other(self, letter: bytes, reader: Reader) -> Any:
        """Returns the remote object of a number, always the same one, or a function of a test."""
        if letter not in (b"r", b"a"):
            return super().read_other(letter, reader)
        number = reader.number()
        if letter == b"a":
            return self._functions[number]
        if number not in self._remotes:
            self._remotes[number] = Remote(self, number)
        return self._remotes[number]

    def _call_back(self, number: int, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        message: tuple[Any, ...]
        try:
            message = ("value", self._functions[number](*arguments, **named))
        except Exception as error:
            message = ("raise", *describe(error))
        self._tell_or_fail(*message)

    def _exception(self, names: Sequence[str], text: str) -> BaseException:
        """Returns the nearest exception that the tester has."""
        own = (self._exceptions[name] for name in names if name in self._exceptions)
        kind = next(own, None)
        return nearest_exception(names, text) if kind is None else kind(text)

    def _tell_or_fail(self, *message: Any) -> None:
        try:
            self.tell(*message)
        except WireError as error:
            raise self._untestable(error) from None
        except OSError:
            raise self._lost("its process ended") from None

    def _untestable(self, error: WireError) -> UntestableError:
        self.fault = f"the tests pass to the solution what cannot be passed: {error}"
        return UntestableError(self.fault)

    def _lost(self, why: str) -> SolutionGone:
        self.gone = why
        return SolutionGone(why)


class Remote:
    """An object of the solution, as the tester has it."""

    __slots__ = ("_number", "_tester")

    def __init__(self, tester: Tester, number: int) -> None:
        object.__setattr__(self, "_tester", tester)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the object, with copies of the arguments."""
        return self._tester.call(self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)  # copy, pickle and numpy ask for such
        return self._tester.request("getattr", self, name)

    def __hash__(self) -> int:
        return self._number


def _forward(name: str) -> Callable[..., Any]:
    """Returns the method of `Remote` that has the solution do it."""

    def method(self: Remote, *arguments: Any) -> Any:
        return self._tester.request(name, self, *arguments)

    return method


def _forward_pair(name: str) -> Callable[..., Any]:
    """The same for an operator, only between two of the solution's objects. See peers.py."""

    def method(self: Remote, other: Any) -> Any:
        if type(other) is not Remote:
            return NotImplemented
        return self._tester.request(name, self, other)

    return method


for _name in OPERATIONS.keys() - {"getattr"} - set(PAIRS):
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in PAIRS:
    setattr(Remote, f"__{_name}__", _forward_pair(_name))


def _put_into(old: Any, new: Any) -> None:
    """Gives an argument the content that the solution has given it."""
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)
    elif isinstance(old, tuple):
        for before, after in zip(old, new, strict=True):
            _put_into(before, after)
    elif hasattr(old, "__dict__"):
        vars(old).clear()
        vars(old).update(vars(new))
