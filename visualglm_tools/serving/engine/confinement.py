"""What a process that reads strangers' pictures gives up before it reads the first: memory, time, files, network.

Standard library only; a process calls `confine` for itself, once, when all that it will ever import is imported. There
is no way back. What holds where is in docs/serving.md.
"""

import ctypes
import platform
import struct
import sys


try:
    import resource
except ImportError:  # Windows
    resource = None


LIMITS = "limited memory and time"
SECCOMP = "no files, no network, no other processes"

# From Linux's headers: prctl.h, seccomp.h, audit.h, bpf_common.h.
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
EPERM = 1
LOAD, JUMP_IF_EQUAL, JUMP_IF_BITS, RETURN = 0x20, 0x15, 0x45, 0x06
NUMBER, ARCHITECTURE, THIRD_ARGUMENT = 0, 4, 32  # offsets in struct seccomp_data; the low half of an argument
PROT_EXEC = 4

# Name in `platform.machine()` -> AUDIT_ARCH and the numbers of the system calls that stay allowed: those on the open
# pipes and on the process's own memory, signals and clock.
# read write close fstat lseek munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap sched_yield madvise
# nanosleep setitimer getpid exit futex clock_gettime clock_nanosleep exit_group getrandom
ALLOWED = {
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 8, 11, 12, 13, 14, 15, 25, 24, 28, 35, 37, 38, 39, 60, 202, 228, 230, 231, 318),  # 37: alarm
    ),
    "aarch64": (
        0xC00000B7,
        (63, 64, 57, 80, 62, 215, 214, 134, 135, 139, 216, 124, 233, 101, 103, 172, 93, 98, 113, 115, 94, 278),
    ),
}
MAPPING = {"x86_64": (9, 10), "aarch64": (222, 226)}  # mmap and mprotect: allowed unless memory becomes executable


class SockFprog(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(memory: int, cpu_seconds: int) -> list[str]:
    """Give up what reading pictures does not need; returns what holds now, `LIMITS` and `SECCOMP` or less.

    Args:
        memory: bytes that may be allocated from now on.
        cpu_seconds: of processor time, after which the process is ended.
    """
    limited = limit_resources(memory, cpu_seconds)
    return [name for name, holds in ((LIMITS, limited), (SECCOMP, filter_system_calls())) if holds]


def limit_resources(memory: int, cpu_seconds: int) -> bool:
    """Whether memory is limited; on macOS, which does not keep to such a limit, only the others are set."""
    if resource is None:
        return False
    lower(resource.RLIMIT_CPU, cpu_seconds)
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_FSIZE, 0)
    if not sys.platform.startswith("linux"):
        return False
    lower(resource.RLIMIT_AS, address_space() + memory)
    return True


def lower(name: int, value: int) -> None:
    """Set a limit that cannot be raised again, unless there is a lower one."""
    hard = resource.getrlimit(name)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))


def address_space() -> int:
    """Bytes of address space that this process has, on Linux."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def filter_system_calls() -> bool:
    """Let this thread, and what it starts, make only `ALLOWED` system calls; whether the system lets us."""
    if not sys.platform.startswith("linux") or platform.machine() not in ALLOWED or sys.maxsize < 2**32:
        return False
    code = filter_code(platform.machine())
    program = SockFprog(len(code) // 8, code)
    prctl = ctypes.CDLL(None).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0


def filter_code(machine: str) -> bytes:
    """The filter as Linux's classic BPF: an instruction is a code, two jumps (if true, if false) and a value."""
    architecture, numbers = ALLOWED[machine]
    refuse = (RETURN, 0, 0, SECCOMP_RET_ERRNO | EPERM)
    allow = (RETURN, 0, 0, SECCOMP_RET_ALLOW)
    instructions = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
    ]
    for number in numbers:
        instructions += [(JUMP_IF_EQUAL, 0, 1, number), allow]
    for number in MAPPING[machine]:
        instructions += [
            (JUMP_IF_EQUAL, 0, 4, number),
            (LOAD, 0, 0, THIRD_ARGUMENT),
            (JUMP_IF_BITS, 0, 1, PROT_EXEC),
            refuse,
            allow,
        ]
    instructions.append(refuse)
    return b"".join(struct.pack("=HBBI", *each) for each in instructions)
