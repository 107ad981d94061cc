"""The process that runs the solution, as the tester asks it to. See peers.py."""

from __future__ import annotations

import _operator
import builtins
import sys

from megatron_opdlm.evaluation.execution.peers import (
    Peer,
    call_deep,
    describe,
    is_builtin,
    nearest_exception,
)
from megatron_opdlm.evaluation.execution.wire import Reader, WireError, count

TYPE_CHECKING = False  # typing takes longer to import than most solutions take to run
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

OPERATIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr, "setattr": setattr, "delattr": delattr, "getitem": _operator.getitem,
    "setitem": _operator.setitem, "delitem": _operator.delitem, "len": len, "iter": iter,
    "next": next, "bool": bool, "str": str, "repr": repr, "int": int, "float": float, "abs": abs,
    "neg": _operator.neg, "instancecheck": lambda kind, value: isinstance(value, kind),
}  # fmt: skip
"""What the tester does with one object, by the name of the method without underscores."""
PAIRS = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "and",
          "or", "xor", "matmul")  # fmt: skip
"""What it does with two."""

for _name in PAIRS:
    OPERATIONS[_name] = getattr(_operator, f"{_name}_" if _name in ("and", "or") else _name)


class Solution(Peer):
    """The process that runs the solution."""

    def __init__(
        self, inbox: int, outbox: int, shared: Mapping[str, type], namespace: dict[str, Any]
    ) -> None:
        super().__init__(inbox, outbox, shared)
        self._namespace = namespace
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._callbacks: dict[int, Callable[..., Any]] = {}
        self._as_sent = False

    def answer(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function and sends its result, or what it raised."""
        try:
            self.tell("value", function(*arguments))
        except BaseException as error:
            self.tell("raise", *describe(error))

    def serve(self) -> None:
        """Does what the tester asks for, until it asks no more."""
        while True:
            try:
                operation, *arguments = self.hear()
            except EOFError:
                return
            self._do(operation, arguments)

    def do_call(self, target: Any, sent: Sequence[bytes], named: Mapping[str, Any]) -> Any:
        """Calls a function; returns the result, and the arguments that it changed by place."""
        arguments = [call_deep(self.loads, data) for data in sent]
        result = target(*arguments, **named)
        self._as_sent = True  # only to compare them: the tester looks up nothing by a name
        after = [call_deep(self.dumps, argument) for argument in arguments]
        self._as_sent = False
        places = [i for i, data in enumerate(sent) if after[i] != data]
        return result, {place: arguments[place] for place in places}

    def do_global(self, name: str) -> Any:
        """Returns the value of a global name."""
        return self._namespace[name]

    def kinds(self) -> dict[str, str]:
        """Returns the global names and what they are: a module, an exception or another value."""
        return {name: _kind(value) for name, value in self._namespace.items()}

    def class_of(self, name: str) -> Any:
        """Returns the solution's class of a name of the prelude, which it may have redefined."""
        return self._namespace.get(name) if name in self.shared else None

    def write_other(self, value: Any, out: list[bytes]) -> bool:
        """Appends the bytes of an instance of the prelude, or the number of any other object."""
        if super().write_other(value, out):
            return True
        if self._as_sent and (is_builtin(value) or self._is_shared(value)):
            out.append(b"B" if is_builtin(value) else b"C")
            self.write(value.__name__, out)
            return True
        number = next((n for n, function in self._callbacks.items() if function is value), None)
        if number is not None:
            out.append(b"a" + count(number))
            return True
        try:
            self.write_kin(value, out)
        except WireError:
            if id(value) not in self._numbers:
                self._numbers[id(value)] = len(self._objects)
                self._objects.append(value)
            out.append(b"r" + count(self._numbers[id(value)]))
        return True

    def read_other(self, letter: bytes, reader: Reader) -> Any:
        """Returns the object of a number, a class of the prelude, a builtin, or a callback."""
        if letter == b"r":
            return self._objects[reader.number()]
        if letter == b"C":
            return self._namespace[reader.value()]
        if letter == b"B":
            return getattr(builtins, reader.value())
        if letter == b"a":
            return self._callback(reader.number())
        return super().read_other(letter, reader)

    def _do(self, operation: str, arguments: Sequence[Any]) -> None:
        self.answer(OPERATIONS.get(operation) or getattr(self, f"do_{operation}"), *arguments)

    def _is_shared(self, value: Any) -> bool:
        return isinstance(value, type) and self.class_of(value.__name__) is value

    def _callback(self, number: int) -> Callable[..., Any]:
        if number in self._callbacks:
            return self._callbacks[number]

        def callback(*arguments: Any, **named: Any) -> Any:
            self.tell("callback", number, arguments, named)
            while True:
                kind, *content = self.hear()
                if kind == "value":
                    return content[0]
                if kind == "raise":
                    raise nearest_exception(*content)
                self._do(kind, content)  # the test's function calls the solution

        self._callbacks[number] = callback
        return callback


def _kind(value: Any) -> str:
    if type(value) is type(sys):
        return f"module {value.__name__}"
    return "exception" if isinstance(value, type) and issubclass(value, Exception) else "value"
