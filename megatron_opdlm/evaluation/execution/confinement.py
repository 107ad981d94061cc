"""What the process of generated code may use, and which system calls it may make.

Resource limits bound time, memory, files and open files. A seccomp filter leaves the process alone
in the world: it cannot start a process or a program, signal or look into another process, leave its
group, open a socket, mount, or make memory that the limits do not count. As there is one process,
its limits are those of everything that it does. Threads work.

Each number stands for the call of that name (Linux, include/uapi/asm-generic/unistd.h and
arch/x86/entry/syscalls/syscall_64.tbl).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct

_NOT_ON_ARM = -1
_CALLS = {
    # name: number on x86_64, on aarch64
    "fork": (57, _NOT_ON_ARM), "vfork": (58, _NOT_ON_ARM), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "process_mrelease": (448, 448), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    "setsid": (112, 157), "setpgid": (109, 154),
    "socket": (41, 198), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
"""Calls that are refused."""
_OWN_PROCESS = {"kill": (62, 129), "tgkill": (234, 131)}
"""Calls whose first argument must be the process itself."""
_OPERATIONS = {"fcntl": ((72, 25), (8, 15)), "ioctl": ((16, 29), (0x8901, 0x8902))}
"""Calls whose second argument must not be one of these: they have the kernel signal any process
when a file is ready (F_SETOWN, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP)."""
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables above, and the number by which a filter knows the machine."""
_X32 = 0x40000000  # x86_64 has every call a second time, from here on
_CLONE_THREAD = 0x10000

_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _ARGUMENT, _SECOND = 0, 4, 16, 24  # places in struct seccomp_data
_SET_DUMPABLE, _SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 4, 38, 22, 2

_THREADS = 256
_OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_ulong] * 2)


def hide_memory() -> None:
    """Makes other processes of this user unable to read this process's memory."""
    _libc.prctl(_SET_DUMPABLE, 0, None, 0, 0)


def limit_memory(most_bytes: int) -> None:
    """Sets the largest address space of this process and those that it starts."""
    _limit({resource.RLIMIT_AS: most_bytes, resource.RLIMIT_CORE: 0})


def limit(*, seconds: float, file_bytes: int, own_user: bool) -> None:
    """Sets the other limits of this process.

    Args:
        seconds: most CPU time. The process is killed half a second to two seconds after it: the
            kernel counts whole seconds, and it counts roughly.
        file_bytes: largest file.
        own_user: whether the user has no other processes, so that threads can be counted.
    """
    bounds = {
        resource.RLIMIT_CPU: int(-(-(seconds + 0.5) // 1)),
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if own_user:
        bounds[resource.RLIMIT_NPROC] = _THREADS
    _limit(bounds)


def _limit(bounds: dict[int, int]) -> None:
    for kind, most in bounds.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def filter_calls(*, required: bool) -> None:
    """Installs the filter, for the rest of this process's life.

    Args:
        required: whether it is an error if this machine cannot have it.

    Raises:
        OSError: the filter is required, and cannot be installed.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        if required:
            raise OSError(f"no filter of system calls for a machine of type {machine}")
        return
    program = _program(*_MACHINES[machine], own_pid=os.getpid())
    code = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _libc.prctl(_SET_NO_NEW_PRIVS, 1, None, 0, 0)
    if _libc.prctl(_SET_SECCOMP, _MODE_FILTER, head, 0, 0) != 0 and required:
        raise OSError(ctypes.get_errno(), "this kernel takes no filter of system calls")


def _program(column: int, machine: int, *, own_pid: int) -> bytes:
    """Returns the filter in the kernel's language: load a word; compare, and skip some; return."""
    refuse = _step(_RETURN, _ERROR | errno.EPERM)
    allow = _step(_RETURN, _ALLOW)
    steps = [_step(_LOAD, _MACHINE), _step(_EQUAL, machine, 1), _step(_RETURN, _KILL)]
    steps.append(_step(_LOAD, _NUMBER))
    if column == 0:
        steps += [_step(_AT_LEAST, _X32, 0, 1), refuse]
    for numbers in _CALLS.values():
        if numbers[column] != _NOT_ON_ARM:
            steps += [_step(_EQUAL, numbers[column], 0, 1), refuse]
    # glibc asks for clone3 first, and takes clone where it does not exist.
    steps += [_step(_EQUAL, _CLONE3[column], 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    steps += [_step(_EQUAL, _CLONE[column], 0, 4), _step(_LOAD, _ARGUMENT)]
    steps += [_step(_BITS, _CLONE_THREAD, 0, 1), allow, refuse]
    for numbers, own in [(n, (own_pid,)) for n in _OWN_PROCESS.values()] + [
        (_PRLIMIT, (0, own_pid))
    ]:
        steps += [_step(_EQUAL, numbers[column], 0, 2 + 2 * len(own)), _step(_LOAD, _ARGUMENT)]
        for pid in own:
            steps += [_step(_EQUAL, pid, 0, 1), allow]
        steps.append(refuse)
    for numbers, refused in _OPERATIONS.values():
        steps += [_step(_EQUAL, numbers[column], 0, 2 + 2 * len(refused)), _step(_LOAD, _SECOND)]
        for operation in refused:
            steps += [_step(_EQUAL, operation, 0, 1), refuse]
        steps.append(allow)
    return b"".join([*steps, allow])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Returns an instruction; the last two are numbers of instructions to skip."""
    return struct.pack("HBBI", code, if_true, if_false, value)
