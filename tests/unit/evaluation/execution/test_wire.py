"""Values as bytes: what comes back is what was sent, and bytes of a stranger build plain values.

`wire` is that of tests and solution, which has values of the standard library; `plain` is that of
the process that grades, which has none.
"""

import contextlib
import datetime
import os
import time
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opdlm.evaluation.execution.peers import Peer
from megatron_opdlm.evaluation.execution.wire import Wire, WireError, receive, send

wire, plain = Peer(-1, -1, {}), Wire()
atoms = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False) | st.fractions() | st.dates()
)  # fmt: skip
hashable = atoms | st.tuples(atoms, atoms) | st.frozensets(atoms, max_size=3)
values = st.recursive(
    hashable | st.dictionaries(hashable, atoms, max_size=3) | st.sets(hashable, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


def with_types(value):
    """The value with the types of all of its parts: 1, True and 1.0 are equal, and differ here."""
    if isinstance(value, dict):
        return [(with_types(key), with_types(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [with_types(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(with_types(item)) for item in value)
    return type(value), repr(value)


@given(values)
def test_a_value_comes_back_with_its_types(value):
    assert with_types(wire.loads(wire.dumps(value))) == with_types(value)


MANY = {
    "whole numbers": range(-20, 20), "large numbers": [2**63 - 1, -(2**63)] * 9,
    "larger numbers": [2**63, 1] * 9, "fractions": [0.5, -0.0, float("inf")] * 9,
    "texts": ["a", "", "\u00e9\U0001f600", "\ud800", "\n"] * 9, "truths": [True, False] * 9,
    "mixed": [1, 1.0, True, "1"] * 9,
}  # fmt: skip


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
@pytest.mark.parametrize("items", MANY.values(), ids=MANY)
def test_many_values_of_one_type_come_back(kind, items):
    value = kind(items)
    assert with_types(wire.loads(wire.dumps(value))) == with_types(value)


def test_many_values_take_a_small_part_of_the_time():
    def seconds(value):
        start = time.process_time()
        wire.loads(wire.dumps(value))
        return time.process_time() - start

    plain = seconds([*range(200_000), None])
    assert seconds(list(range(200_000))) < plain / 4


@pytest.mark.parametrize(
    "message",
    [b"Pls8;" + bytes(64) + b"1;a", b"Pls8;" + b"\xff" * 64 + b"1;a", b"Plsffffffffffffff;",
     b"Pdi8;" + bytes(64), b"Plx8;" + bytes(64) + b"0;", b"Plf9;" + bytes(64)]
)  # fmt: skip
def test_packed_values_of_a_stranger_are_checked(message):
    with pytest.raises(WireError):
        wire.loads(message)


@pytest.mark.parametrize(
    "value",
    [deque([1, 2]), Counter("aab"), OrderedDict(b=1, a=2), Decimal("1.50"), Fraction(1, 3),
     datetime.date(2024, 2, 29), datetime.time(1, 2), datetime.timedelta(1, 2, 3), range(3, 9, 2),
     bytearray(b"ab"), float("inf"), -0.0, 2**100_000, "\ud800"],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_of_the_standard_library_come_back(value):
    back = wire.loads(wire.dumps(value))
    assert (type(back), back) == (type(value), value)


def test_a_named_tuple_keeps_its_names():
    point = namedtuple("Point", "x y")(1, 2)
    back = wire.loads(wire.dumps(point))
    assert (back, back.x, back.y, type(back).__name__) == ((1, 2), 1, 2, "Point")
    assert type(plain.loads(plain.dumps(point))) is tuple


def test_the_process_that_grades_reads_nothing_but_plain_values():
    for value in (Fraction(1, 3), namedtuple("Point", "x")(1), numpy.arange(2), deque([1])):
        with pytest.raises(WireError, match="unknown letter"):
            plain.loads(wire.dumps(value))
        assert wire.loads(wire.dumps(value)) is not None  # control
    assert plain.loads(plain.dumps(Counter("aab"))) == {"a": 2, "b": 1}
    for value in (Fraction(1, 3), numpy.arange(2), deque([1])):
        with pytest.raises(WireError, match="is no plain value"):
            plain.dumps(value)


def test_an_object_that_stands_for_a_plain_value_becomes_it():
    color = IntEnum("Color", "RED")
    kin = [color.RED, numpy.int64(3), numpy.float64(0.5), numpy.bool_(True)]
    back = wire.loads(wire.dumps(kin))
    assert with_types(back) == with_types([1, 3, 0.5, True])


def test_an_array_keeps_type_and_shape():
    array = numpy.arange(6, dtype=numpy.int16).reshape(2, 3)
    back = wire.loads(wire.dumps(array))
    assert back.dtype == array.dtype and back.tolist() == array.tolist()


class Liar(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def test_a_value_that_equals_everything_loses_this():
    assert Liar(1) == 2  # control
    assert wire.loads(wire.dumps([Liar(1)])) != [2]


def test_a_value_that_holds_itself_and_an_object_are_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(WireError, match="holds itself"):
        wire.dumps(loop)
    with pytest.raises(WireError, match="type object is no plain value"):
        wire.dumps([object()])


@given(st.binary(max_size=40))
def test_bytes_of_a_stranger_are_a_value_or_an_error(data):
    with contextlib.suppress(WireError):
        wire.loads(data)


@given(values, st.integers(0, 10**6))
def test_a_message_that_is_cut_off_is_an_error(value, place):
    message = wire.dumps(value)
    with pytest.raises(WireError):
        wire.loads(message[: place % len(message)])
    with pytest.raises(WireError, match="after the value"):
        wire.loads(message + b"N")


@pytest.mark.parametrize(
    "message", [b"l" + b"f" * 15 + b";", b"s" + b"f" * 15 + b";", b"i-", b"?", b"",
                b"l1;" * 100_000, b"i" + b"z" * 9 + b";",
                b"d" + b"f" * 15 + b";b-4;", b"l9;" + b"b-4;" * 9, b"Pls-8;", b"d-1;"]
)  # fmt: skip
def test_hostile_sizes_cost_nothing(message):
    with pytest.raises(WireError):
        wire.loads(message)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "subprocess.Popen", "this.d", "x"])
def test_no_name_is_looked_up_that_is_not_listed(name, capsys):
    message = b"K" + wire.dumps((name, "true"))
    with pytest.raises(WireError, match=f"KeyError: '{name}'"):
        wire.loads(message)
    assert capsys.readouterr().out == ""  # importing `this` prints a poem
    assert wire.loads(b"K" + wire.dumps(("decimal.Decimal", "1.5"))) == Decimal("1.5")  # control


def test_names_of_fields_are_texts():
    with pytest.raises(WireError):
        wire.loads(b"n" + wire.dumps(("Point", ("x", 3), (1, 2))))


def test_messages_do_not_run_into_each_other():
    ours, theirs = os.pipe()
    for message in (b"a" * 3000, b"", b"b"):
        send(theirs, message)
    assert [receive(ours) for _ in range(3)] == [b"a" * 3000, b"", b"b"]
    os.write(theirs, b"\xff" * 8)
    with pytest.raises(WireError, match="longer than"):
        receive(ours)
    os.close(theirs)
    with pytest.raises(EOFError):
        receive(ours)
    os.close(ours)
