"""The filter of system calls: its numbers, and its answers, by a model of the kernel's machine."""

import errno
import re
import struct
from pathlib import Path

import pytest

from megatron_opdlm.evaluation.execution import confinement

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
ALLOW, EPERM = 0x7FFF0000, 0x50000 | errno.EPERM
NUMBERS = {
    **confinement._CALLS,
    **confinement._OWN_PROCESS,
    **{name: numbers for name, (numbers, _) in confinement._OPERATIONS.items()},
    "clone": confinement._CLONE,
    "clone3": confinement._CLONE3,
    "prlimit64": confinement._PRLIMIT,
}


def answer(machine, number, *arguments, architecture=None, pid=77):
    """What the filter returns, by the rules of the classic Berkeley packet filter."""
    column, own = confinement._MACHINES[machine]
    program = confinement._program(column, own, own_pid=pid)
    steps = [struct.unpack_from("HBBI", program, place) for place in range(0, len(program), 8)]
    arguments = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, architecture or own, 0, *arguments)
    place, word = 0, None
    while True:
        code, if_true, if_false, value = steps[place]
        place += 1
        if code == 0x20:
            (word,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return value
        else:
            true = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[code]
            place += if_true if true else if_false


both = pytest.mark.parametrize(("column", "machine"), [(0, "x86_64"), (1, "aarch64")])


@both
def test_the_numbers_are_linuxs(column, machine):
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed; it has the numbers")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    ours = {name: pair[column] for name, pair in NUMBERS.items() if pair[column] >= 0}
    known = {name: number for name, number in ours.items() if name in found}
    assert len(known) > len(ours) - 4  # an older header lacks the newest calls
    assert known == {name: int(found[name]) for name in known}


@both
def test_what_the_filter_answers(column, machine):
    for name, numbers in confinement._CALLS.items():
        if numbers[column] >= 0:
            assert answer(machine, numbers[column]) == EPERM, name
    kill, tgkill = (numbers[column] for numbers in confinement._OWN_PROCESS.values())
    for call in (kill, tgkill):
        assert answer(machine, call, 77, 9) == ALLOW
        for pid in (1, 76, 0, 2**32 - 1):
            assert answer(machine, call, pid, 9) == EPERM
    for numbers, refused in confinement._OPERATIONS.values():
        for operation in (0, 1, 8, 9, 15, 0x5401, 0x8901, 0x8902):
            expected = EPERM if operation in refused else ALLOW
            assert answer(machine, numbers[column], 3, operation) == expected
    limits = confinement._PRLIMIT[column]
    assert answer(machine, limits, 0) == answer(machine, limits, 77) == ALLOW
    assert answer(machine, limits, 76) == EPERM
    clone = confinement._CLONE[column]
    assert answer(machine, clone, 17) == EPERM  # SIGCHLD alone: a process
    assert answer(machine, clone, 0x3D0F00) == ALLOW  # glibc's flags of a thread
    assert answer(machine, 435) == 0x50000 | errno.ENOSYS
    used = {numbers[column] for numbers in NUMBERS.values()}
    assert all(answer(machine, number) == ALLOW for number in set(range(460)) - used)


@both
def test_another_machines_calls_end_the_process(column, machine):
    assert answer(machine, 0, architecture=0x40000003) == 0x80000000
    assert answer("x86_64", 0x40000000 + 39) == EPERM


def test_every_machine_has_a_number_for_every_call():
    assert {name for name, (_, arm) in NUMBERS.items() if arm < 0} == {"fork", "vfork"}
