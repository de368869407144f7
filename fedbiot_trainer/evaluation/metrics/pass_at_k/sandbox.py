"""
Runs one Python program that nobody has read. `pass_at_k` starts this file in a process of its own (`python -I`).

The request (JSON) comes on the standard input. Before the program starts, the process takes away from itself, for good,
what the program must not have: resource limits bound time and memory, and a seccomp filter leaves only the system calls
that computing and reading files take. Neither needs privileges, namespaces or a container. All others fail: a program
can open no socket, start no process and no thread, write, delete or rename no file, and signal nobody but itself.
"""

import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import types


READY = b"+"
TOKEN_BYTES = 32

# Numbers of the system calls on x86_64 and aarch64 (0 for none: on x86_64, `read`).
# fmt: off
ALLOWED = {
    "access": (21, None), "alarm": (37, None), "brk": (12, 214), "chdir": (80, 49), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "close": (3, 57), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22),
    "epoll_wait": (232, None), "eventfd2": (290, 19), "exit": (60, 93), "exit_group": (231, 94),
    "faccessat": (269, 48), "faccessat2": (439, 439), "fchdir": (81, 50), "fstat": (5, 80), "futex": (202, 98),
    "get_robust_list": (274, 100), "getcwd": (79, 17), "getdents64": (217, 61), "getegid": (108, 177),
    "geteuid": (107, 175), "getgid": (104, 176), "getgroups": (115, 158), "getitimer": (36, 102),
    "getpgid": (121, 155), "getpgrp": (111, None), "getpid": (39, 172), "getppid": (110, 173),
    "getrandom": (318, 278), "getresgid": (120, 150), "getresuid": (118, 148), "getrlimit": (97, 163),
    "getrusage": (98, 165), "getsid": (124, 156), "getsockname": (51, 204), "getsockopt": (55, 209),
    "gettid": (186, 178), "gettimeofday": (96, 169), "getuid": (102, 174), "lseek": (8, 62), "lstat": (6, None),
    "madvise": (28, 233), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216), "munmap": (11, 215),
    "nanosleep": (35, 101), "newfstatat": (262, 79), "pause": (34, None), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "pread64": (17, 67), "pselect6": (270, 72), "read": (0, 63),
    "readlink": (89, None), "readlinkat": (267, 78), "readv": (19, 65), "recvfrom": (45, 207),
    "restart_syscall": (219, 128), "rseq": (334, 293), "rt_sigaction": (13, 134), "rt_sigpending": (127, 136),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137), "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "select": (23, None),
    "sendto": (44, 206), "set_robust_list": (273, 99), "setitimer": (38, 103), "shutdown": (48, 210),
    "sigaltstack": (131, 132), "stat": (4, None), "statx": (332, 291), "sysinfo": (99, 179), "time": (201, None),
    "times": (100, 153), "umask": (95, 166), "uname": (63, 160), "write": (1, 64), "writev": (20, 66),
}
# fmt: on
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_* of linux/audit.h

# Flags of open() that write: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and the one that O_TMPFILE adds to O_DIRECTORY.
WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
ALL_BITS = 0xFFFFFFFF

# linux/filter.h, linux/seccomp.h, linux/prctl.h
LOAD, AND, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 15, 16, 22, 38
SECCOMP_MODE_FILTER = 2


class Filter(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def checked_calls(pid: int) -> dict[str, tuple[tuple[int | None, int | None], list[tuple[int, int, tuple]]]]:
    """System calls that are allowed for some arguments: numbers, and (word of the arguments, mask, values) for each."""
    return {
        "open": ((2, None), [(2, WRITING, (0,))]),
        "openat": ((257, 56), [(4, WRITING, (0,))]),
        "fcntl": ((72, 25), [(2, ALL_BITS, FCNTLS)]),
        "ioctl": ((16, 29), [(2, ALL_BITS, IOCTLS)]),
        "prctl": ((157, 167), [(0, ALL_BITS, (PR_SET_NAME, PR_GET_NAME))]),
        "prlimit64": ((302, 261), [(0, ALL_BITS, (0,)), (4, ALL_BITS, (0,)), (5, ALL_BITS, (0,))]),  # reads its own
        "socketpair": ((53, 199), [(0, ALL_BITS, (1,)), (2, 0xF, (1,))]),  # AF_UNIX, SOCK_STREAM: asyncio's own
        "kill": ((62, 129), [(0, ALL_BITS, (pid,))]),
        "tgkill": ((234, 131), [(0, ALL_BITS, (pid,))]),
    }


def filter_instructions(machine: str, pid: int) -> bytes:
    """
    The seccomp filter as BPF instructions (8 bytes each). It looks at `struct seccomp_data`: number of the call at 0,
    architecture at 4, arguments from 16 on, each two little-endian words of 4 bytes.
    """

    def instruction(code, value, if_true=0, if_false=0):
        return struct.pack("=HBBI", code, if_true, if_false, value)

    column, architecture = ARCHITECTURES[machine]
    refuse = instruction(RETURN, ERRNO | errno.EPERM)
    instructions = [
        instruction(LOAD, 4),
        instruction(JUMP_IF_EQUAL, architecture, 1, 0),
        instruction(RETURN, KILL_PROCESS),  # calls of another architecture have other numbers
        instruction(LOAD, 0),
    ]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            instructions += [instruction(JUMP_IF_EQUAL, numbers[column], 0, 1), instruction(RETURN, ALLOW)]
    for pair, conditions in checked_calls(pid).values():
        if pair[column] is not None:
            checks = []
            for word, mask, values in conditions:
                checks += [instruction(LOAD, 16 + 4 * word), instruction(AND, mask)]
                checks += [instruction(JUMP_IF_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
                checks.append(refuse)
            checks.append(instruction(RETURN, ALLOW))
            instructions += [instruction(JUMP_IF_EQUAL, pair[column], 0, len(checks)), *checks]
    # For what newer C libraries try first (clone3), the answer of a kernel that does not have it.
    instructions += [instruction(JUMP_IF_AT_LEAST, 424, 0, 1), instruction(RETURN, ERRNO | errno.ENOSYS), refuse]
    return b"".join(instructions)


def limit_resources(seconds: float, memory_bytes: int):
    """Bound CPU time and address space, and forbid files of any size. The limits hold for root too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def enter_sandbox():
    """
    Take the system calls away. There is no way back.

    Raises:
        OSError: If the machine has no such filter.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(f"it needs 64-bit Linux on {' or '.join(ARCHITECTURES)}, this is {sys.platform} on {machine}")
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option, *arguments):
        words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
        if libc.prctl(option, *words):
            raise OSError(f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}")

    instructions = filter_instructions(machine, os.getpid())
    program = Filter(len(instructions) // 8, instructions)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def main():
    """Run the program, then its tests; write the token, which waits unread in a pipe, if they ended without an error."""
    request = json.load(sys.stdin)
    report, token = request["report"], request["token"]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    try:
        limit_resources(request["seconds"], request["memory_bytes"])
        enter_sandbox()
    except (OSError, ValueError) as error:
        os.write(report, f"-{error}".encode())
        return
    os.write(report, READY)

    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        # Apart, so that an open quote at the end of the program does not swallow the tests.
        program = compile(request["program"], "<program>", "exec", dont_inherit=True)
        tests = compile(request["tests"], "<tests>", "exec", dont_inherit=True)
        exec(program, module.__dict__)
        exec(tests, module.__dict__)
    except BaseException:
        os._exit(1)
    os.write(report, os.read(token, TOKEN_BYTES))
    os._exit(0)


if __name__ == "__main__":
    main()
