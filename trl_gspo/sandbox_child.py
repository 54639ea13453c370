"""
What `trl_gspo.sandbox` starts, twice for each candidate: confines itself, then runs the candidate or judges it.

    python -s -S -B -c "... sandbox_child.main()" candidate|judge < job.json

The *candidate* process executes what the model wrote and answers requests: call this, iterate over that. The *judge*
process executes the tests, in which the candidate's functions are stand-ins that send those requests. Only plain data
crosses, and the judge alone decodes and compares it: it never holds an object whose class the model wrote. The
candidate process holds neither tests nor expected values, and has no way to the pipe that carries the verdict.

Both give up what they do not need before any of that runs, for good: capabilities, all system calls but those of the
table below, and, by Landlock, all files but Python's own and an empty folder. It needs no privilege, and binds root.

Runs under an interpreter without site-packages: it imports the standard library and nothing of this package.
"""

import ast
import builtins
import collections
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import types


# Linux system calls by name, on x86-64 and on AArch64 (-1: does not exist there). What is not listed fails with EPERM:
# above all the making of processes, programs, sockets, and what reaches other processes or the kernel's settings.
SYSCALLS = {
    # memory, threads, time, exit
    "brk": (12, 214),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "msync": (26, 227),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, -1),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "wait4": (61, 260),
    "waitid": (247, 95),
    # identity
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getpgrp": (111, -1),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpriority": (140, 141),
    # signals, of its own
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "pause": (34, -1),
    "alarm": (37, -1),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    # files: reading
    "read": (0, 63),
    "readv": (19, 65),
    "pread64": (17, 67),
    "preadv": (295, 69),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "stat": (4, -1),
    "lstat": (6, -1),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, -1),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, -1),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "umask": (95, 166),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fadvise64": (221, 223),
    "dup": (32, 23),
    "dup2": (33, -1),
    "dup3": (292, 24),
    # writing: to what is open already
    "write": (1, 64),
    "writev": (20, 66),
    "pwrite64": (18, 68),
    "pwritev": (296, 70),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "ftruncate": (77, 46),
    # waiting
    "pipe": (22, -1),
    "pipe2": (293, 59),
    "poll": (7, -1),
    "ppoll": (271, 73),
    "select": (23, -1),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, -1),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    # what a stream made by socketpair needs; no other socket can be made
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
}

# Where Landlock keeps them inside of the folder.
CHANGE_SYSCALLS = {
    "mkdir": (83, -1),
    "mkdirat": (258, 34),
    "rmdir": (84, -1),
    "unlink": (87, -1),
    "unlinkat": (263, 35),
    "rename": (82, -1),
    "renameat": (264, 38),
    "renameat2": (316, 276),
}

# Those that depend on an argument: `_rules` has the conditions.
CONDITIONAL_SYSCALLS = {
    "open": (2, -1),
    "openat": (257, 56),
    "clone": (56, 220),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prlimit64": (302, 261),
    "socketpair": (53, 199),
}

# Answered as an old kernel would, so that the C library takes the older call, whose arguments a filter can see.
ABSENT_SYSCALLS = {"clone3": (435, 435), "openat2": (437, 437)}

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and AUDIT_ARCH of <linux/audit.h>

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPSET = (126, 91)

# The judge refuses longer messages: what it decodes has to fit into its memory several times over.
MAX_MESSAGE = 16 * 2**20


def _checked(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _seccomp_program(machine, pid, may_change_files):
    """The filter as BPF instructions: (operation, jump if true, jump if false, constant)."""
    column, architecture = MACHINES[machine]
    load, jump_equal, jump_any, bit_and, give = 0x20, 0x15, 0x45, 0x54, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

    def low(argument):
        return 16 + 8 * argument  # of `struct seccomp_data`, little-endian

    def one_of(argument, values):
        block = [(load, 0, 0, low(argument))]
        for value in values:
            block += [(jump_equal, 0, 1, value), (give, 0, 0, allow)]
        return [*block, (give, 0, 0, deny)]

    def masked(argument, mask, value):
        equal = [(jump_equal, 0, 1, value), (give, 0, 0, allow), (give, 0, 0, deny)]
        return [(load, 0, 0, low(argument)), (bit_and, 0, 0, mask), *equal]

    def opening(argument):
        if may_change_files:
            # O_TRUNC without a right to write: truncates all the same, and old Landlock does not look at it.
            refuse = [(bit_and, 0, 0, os.O_ACCMODE | os.O_TRUNC), (jump_equal, 0, 1, os.O_TRUNC), (give, 0, 0, deny)]
        else:
            change = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
            refuse = [(jump_any, 0, 1, change), (give, 0, 0, deny)]
        return [(load, 0, 0, low(argument)), *refuse, (give, 0, 0, allow)]

    clone_thread = 0x10000
    f_dupfd_cloexec = 1030
    rules = {
        "open": opening(1),
        "openat": opening(2),
        "clone": masked(0, clone_thread, clone_thread),
        "kill": one_of(0, [pid]),
        "tgkill": one_of(0, [pid]),
        # TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what Python's files ask. Not TIOCSTI, which types.
        "ioctl": one_of(1, [0x5401, 0x541B, 0x5421, 0x5450, 0x5451]),
        # Duplicate, flags, locks. Not F_SETOWN, by which a pipe signals any process of the same user.
        "fcntl": one_of(1, [*range(8), f_dupfd_cloexec]),
        # Reading limits, not setting them: the new limit is a null pointer.
        "prlimit64": [
            (load, 0, 0, low(2)),
            (jump_equal, 0, 3, 0),
            (load, 0, 0, low(2) + 4),
            (jump_equal, 0, 1, 0),
            (give, 0, 0, allow),
            (give, 0, 0, deny),
        ],
        # A local stream, of which asyncio makes one: a datagram socket could send to any other by name.
        "socketpair": [(load, 0, 0, low(0)), (jump_equal, 1, 0, 1), (give, 0, 0, deny), *masked(1, 0xF, 1)],
    }
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    plain = SYSCALLS | (CHANGE_SYSCALLS if may_change_files else {})
    for numbers, block in [
        *((numbers, [(give, 0, 0, allow)]) for numbers in plain.values()),
        *((numbers, rules[name]) for name, numbers in CONDITIONAL_SYSCALLS.items()),
        *((numbers, [(give, 0, 0, 0x00050000 | errno.ENOSYS)]) for numbers in ABSENT_SYSCALLS.values()),
    ]:
        if numbers[column] >= 0:
            program += [(jump_equal, 0, len(block), numbers[column]), *block]
    return [*program, (give, 0, 0, deny)]


def _install_seccomp(libc, machine, may_change_files):
    program = b"".join(struct.pack("HBBI", *line) for line in _seccomp_program(machine, os.getpid(), may_change_files))
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    _checked(libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0), "seccomp")


def landlock_version(libc=None):
    """Version of Landlock in the running kernel; 0 where there is none."""
    libc = libc or ctypes.CDLL(None, use_errno=True)
    return max(libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1), 0)


def _install_landlock(libc, version, readable, writable):
    # Those of version 1; of 2, moving between folders, which version 1 never allows; of 3, truncation.
    all_rights = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    read, write_file = 1 << 2 | 1 << 3, 1 << 1 | 1 << 2
    # In the folder: read, write, truncate, make and remove files and folders. No links, devices, sockets.
    write = all_rights & (read | write_file | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | 1 << 14)
    attributes = struct.pack("Q", all_rights)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _checked(libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.c_char_p(attributes), size, 0), "Landlock")
    rights = [(path, read) for path in readable] + [(path, write) for path in writable]
    for path, allowed in [*rights, ("/dev/null", write_file), ("/dev/urandom", 1 << 2)]:
        try:
            target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            allowed &= write_file
        rule = struct.pack("=Qi", allowed, target)
        _checked(libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, ctypes.c_char_p(rule), 0), f"Landlock, {path}")
        os.close(target)
    _checked(libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def confine(job, folder):
    """Gives up, for good, what neither role needs. `folder` can be written to, where the kernel has Landlock."""
    libc = ctypes.CDLL(None, use_errno=True)
    machine = os.uname().machine
    version = landlock_version(libc) if job["landlock"] else 0
    for limit, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        # SIGXCPU says what it was; who ignores that is killed a second later.
        (resource.RLIMIT_CPU, job["cpu_seconds"], job["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, job["memory"], job["memory"]),
        (resource.RLIMIT_FSIZE, job["disk"], job["disk"]),
        (resource.RLIMIT_NOFILE, job["open_files"], job["open_files"]),
    ):
        most = resource.getrlimit(limit)[1]
        most = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(limit, (min(soft, most), most))
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # Another process of the same user, the candidate, must not read this one's memory through /proc.
    _checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    if version:
        # What imports need: Python's folders, and those of the shared libraries under them.
        libraries = [os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
        readable = [*sys.path, *libraries, *job["library_path"], "/usr/share/zoneinfo"]
        _install_landlock(libc, version, readable, [folder] if folder else [])
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    number = _CAPSET[MACHINES[machine][0]]
    _checked(libc.syscall(number, ctypes.c_char_p(header), ctypes.c_char_p(none)), "capabilities")
    # Last, since a change of credentials clears it; and the parent may be gone already.
    _checked(libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "death signal")
    if os.getppid() != job["parent"]:
        os._exit(1)
    _install_seccomp(libc, machine, may_change_files=bool(version and folder))
    return version


class Gone(BaseException):
    """The other side has ended, or does not keep to the protocol. No `except Exception` of a test may swallow it."""


def send(descriptor, message):
    data = json.dumps(message).encode()
    data = struct.pack("!Q", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor):
    """The next message; raises `EOFError` where the other side is gone."""
    length = struct.unpack("!Q", _read(descriptor, 8))[0]
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes; {MAX_MESSAGE} are allowed")
    return json.loads(_read(descriptor, length))


def _read(descriptor, length):
    parts = []
    while length:
        part = os.read(descriptor, min(length, 2**20))
        if not part:
            raise EOFError("the other process has ended")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class StandIn:
    """
    For an object of the other process: calls, attributes, items, iteration, length, truth and text are asked of it.

    Comparisons are not, and `in` compares what iteration gives: a candidate could answer that all is equal to all.
    Two are equal if they stand for the same object; no stand-in is equal to anything else.
    """

    __slots__ = ("_number", "_peer")

    def __init__(self, number, peer):
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_peer", peer)

    def __eq__(self, other):
        return isinstance(other, StandIn) and self._number == other._number

    def __hash__(self):
        return hash(self._number)

    def __getattr__(self, name):
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._peer.ask("setattr", self, name, value)

    def __call__(self, *args, **kwargs):
        return self._peer.ask("call", self, *args, **kwargs)

    def __getitem__(self, key):
        return self._peer.ask("getitem", self, key)

    def __setitem__(self, key, value):
        self._peer.ask("setitem", self, key, value)

    def __iter__(self):
        return self._peer.ask("iter", self)

    def __next__(self):
        return self._peer.ask("next", self)

    def __len__(self):
        return self._peer.ask("len", self)

    def __bool__(self):
        return self._peer.ask("bool", self)

    def __str__(self):
        return self._peer.ask("str", self)

    __repr__ = __str__


OPERATIONS = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
}

_SEQUENCES = {kind.__name__: kind for kind in (tuple, set, frozenset, collections.deque)}
_BYTES = {kind.__name__: kind for kind in (bytes, bytearray)}


class Peer:
    """
    One end of the pipes between judge and candidate.

    Numbers, strings, and containers of them cross by value, as the built-in type that they are or derive from; all
    else by reference: its owner keeps it, and the other side gets a [`StandIn`]. Requests nest: while one side waits
    for a reply, the other may ask in turn, to call a function that it was given.

    Args:
        incoming (`int`), outgoing (`int`): descriptors of the pipes.
        namespace (`dict`, *optional*): what the other side may ask for by name; the candidate's. The judge has none,
            and answers no more than what its own objects are for: see `_may`.
    """

    def __init__(self, incoming, outgoing, namespace=None):
        self.incoming, self.outgoing, self.namespace = incoming, outgoing, namespace
        self.kept, self.numbers = [], {}
        self.asked, self.gone = 0, False

    def encode(self, value):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        for name, kind in _SEQUENCES.items():
            if isinstance(value, kind):
                return {name: [self.encode(item) for item in value]}
        for name, kind in _BYTES.items():
            if isinstance(value, kind):
                return {name: value.decode("latin-1")}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
            return {"type": value.__name__}
        if isinstance(value, StandIn):
            return {"yours": value._number}
        module, name = type(value).__module__, type(value).__name__
        if (module, name) in (("decimal", "Decimal"), ("fractions", "Fraction")):
            return {name: str(value)}
        if module == "numpy" and hasattr(value, "tolist"):
            return self.encode(value.tolist())
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return {"mine": self.numbers[id(value)]}

    def decode(self, value):
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        if kind in _SEQUENCES:
            return _SEQUENCES[kind]([self.decode(item) for item in content])
        if kind in _BYTES:
            return _BYTES[kind](content, "latin-1")
        if kind == "complex":
            return complex(*content)
        if kind == "range":
            return range(*content)
        if kind == "type" and isinstance(vars(builtins).get(content), type):
            return vars(builtins)[content]
        if kind in ("Decimal", "Fraction"):
            return getattr(__import__("decimal" if kind == "Decimal" else "fractions"), kind)(content)
        if kind == "yours":
            return self.kept[content]
        if kind == "mine":
            return StandIn(content, self)
        raise ValueError(f"a value of the unknown kind {kind!r}")

    def ask(self, operation, target, *args, **kwargs):
        """
        Has the other side do it; mutable arguments are afterwards as it left them.

        Returns the result; raises the nearest built-in exception to what it raised, [`Gone`] if it is gone.
        """
        self.asked += 1
        request = {
            "do": operation,
            "target": self.encode(target),
            "args": [self.encode(arg) for arg in args],
            "kwargs": {key: self.encode(arg) for key, arg in kwargs.items()},
        }
        try:
            send(self.outgoing, request)
            while "do" in (reply := receive(self.incoming)):
                self.answer(reply)
            for key, state in reply.get("changed", ()):
                _assign(kwargs[key] if isinstance(key, str) else args[key], self.decode(state))
            raised = _exception(*reply["raised"]) if "raised" in reply else None
            value = None if raised else self.decode(reply["value"])
        except (Exception, Gone) as error:
            self.gone = True
            raise Gone(f"{type(error).__name__}: {error}") from None
        if raised:
            raise raised
        return value

    def answer(self, request):
        """Does what the other side asks; sends the result, and what became of mutable arguments."""
        try:
            operation, target = request["do"], self.decode(request["target"])
            args = [self.decode(arg) for arg in request["args"]]
            kwargs = {key: self.decode(arg) for key, arg in request["kwargs"].items()}
            if operation == "name" and self.namespace is not None:
                value = eval(target, self.namespace)  # an expression, such as `Solution().solve`
            elif self.namespace is not None or (_is_reference(request["target"]) and _may(operation, target, args)):
                value = OPERATIONS[operation](target, *args, **kwargs)
            else:
                raise PermissionError(f"{operation} on an object of the tests")
            reply = {"value": self.encode(value)}
            if operation == "call":
                pairs = [*zip(range(len(args)), request["args"], args, strict=True)]
                pairs += [(key, request["kwargs"][key], arg) for key, arg in kwargs.items()]
                mutable = [pair for pair in pairs if isinstance(pair[2], (list, dict, set, bytearray))]
                states = [(key, before, self.encode(arg)) for key, before, arg in mutable]
                reply["changed"] = [(key, state) for key, before, state in states if state != before]
        except Gone:
            raise
        except BaseException as error:  # SystemExit too: to the other side it is an exception like others
            reply = {"raised": describe(error)}
        flush()
        send(self.outgoing, reply)


def _is_reference(value):
    # Not a built-in type, which goes by its name: `type`, called, would make the judge a class that is equal to all.
    return isinstance(value, dict) and "yours" in value


def _may(operation, target, args):
    """
    Whether the candidate may do this to an object of the tests that it was given: call functions, iterate, read items;
    attributes only of instances of the tests' own classes (a node of a list, say), and no private ones, by which
    frames and globals would be reached.
    """
    if operation in ("getattr", "setattr", "setitem"):
        return type(target).__module__ == "tests" and not str(args[0]).startswith("_")
    return operation in OPERATIONS


def _assign(target, value):
    if type(target) is not type(value):
        raise ValueError("an argument has changed its type")
    if isinstance(target, (list, bytearray)):
        target[:] = value
    else:
        target.clear()
        target.update(value)


def describe(error):
    """Name of the nearest built-in exception, and the text."""
    nearest = next(kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind)
    try:
        text = str(error)
    except BaseException:
        text = ""
    name = type(error).__name__
    return [nearest, (text if name == nearest else f"{name}: {text}")[:500]]


def _exception(name, text):
    kind = vars(builtins).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(str(text))
        except TypeError:  # UnicodeDecodeError and its like need more than a text
            pass
    return RuntimeError(f"{name}: {text}")


def flush():
    """Hands on what was printed: the process is killed once the tests have ended."""
    try:
        sys.stdout.flush()
    except Exception:  # closed, or replaced
        pass


def root_name(entry_point):
    """`Solution` of `Solution().solve`."""
    return entry_point.replace("(", ".").split(".")[0].strip()


def program(code, prefix, entry_point):
    """
    The text to execute: `code` after `prefix` where it is a program of its own, which defines the entry point; else as
    the continuation of `prefix`. The prefix stays in front of a program for its imports and helpers.
    """
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return prefix + code
    if entry_point:
        names = [getattr(node, "name", None) for node in body]
        names += [
            target.id for node in body for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)
        ]
        if root_name(entry_point) not in names:
            return prefix + code
    whole = prefix + "\n\n" + code
    try:
        compile(whole, "candidate.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # such as a `from __future__` that no longer comes first
        return code
    return whole


def run_candidate(job):
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    peer = Peer(*job["pipes"], vars(module))
    send(peer.outgoing, {"ready": confine(job, os.getcwd())})
    try:
        text = program(job["code"], job["prefix"], job["entry_point"])
        exec(compile(text, "candidate.py", "exec", dont_inherit=True), peer.namespace)
    except BaseException as error:
        flush()
        send(peer.outgoing, {"raised": describe(error)})
        return
    flush()
    send(peer.outgoing, {"value": None})
    try:
        while True:
            peer.answer(receive(peer.incoming))
    except EOFError:  # the judge has ended
        pass


def missing_names(tree, known):
    """
    Names that the tests read and do not make themselves, without those in `known`: (modules of the standard library,
    others). What the tests take an attribute of is the module, not what a candidate calls so.
    """
    read, made, bases = set(), set(known), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            bases.add(node.value.id)
    modules = (read - made) & bases & sys.stdlib_module_names
    return sorted(modules), sorted(read - made - modules)


def judge(job, peer):
    """
    Runs the tests, with stand-ins for what the candidate defines.

    Returns (outcome, message). Outcomes: `passed`; `failed`, an assertion; `memory`; `error`, any other exception;
    `died`, the candidate's process has ended; `unused`, the tests ended without asking anything of the candidate.
    """
    namespace = {"__name__": "tests", "__builtins__": builtins}
    entry_point = job["entry_point"]
    try:
        prefix = ast.parse(job["prefix"])
        exec(compile(prefix, "prefix.py", "exec", dont_inherit=True), namespace)
        defined = [node.name for node in prefix.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        entry_point = entry_point or (defined[-1] if defined else None)  # what a prompt ends on is what it asks for
    except SyntaxError:  # such as a signature without a body: then it brings no helpers
        pass
    tree = ast.parse(job["tests"])

    loaded = receive(peer.incoming)
    if "raised" in loaded:
        name, text = loaded["raised"]
        return ("memory" if name == "MemoryError" else "error"), f"{name}: {text}"
    candidate = None
    if entry_point:
        namespace[root_name(entry_point)] = peer.ask("name", root_name(entry_point))
        candidate = namespace["candidate"] = peer.ask("name", entry_point)
    modules, names = missing_names(tree, {*namespace, *vars(builtins)})
    for name in modules:
        namespace[name] = __import__(name)
    for name in names:
        try:
            namespace[name] = peer.ask("name", name)
        except NameError:
            pass  # the tests say so when they get there
    peer.asked = 0
    exec(compile(tree, "tests.py", "exec", dont_inherit=True, optimize=0), namespace)
    if not peer.asked and entry_point and callable(namespace.get("check")):
        namespace["check"](candidate)
    return ("passed" if peer.asked else "unused"), ""


def run_judge(job):
    peer = Peer(*job["pipes"])
    confine(job, None)
    verdict = job["verdict"]
    os.write(verdict, json.dumps(receive(peer.incoming)).encode() + b"\n")  # that the candidate is ready
    try:
        outcome, message = judge(job, peer)
    except AssertionError as error:
        outcome, message = "failed", str(error)
    except EOFError as error:
        outcome, message = "died", str(error)
    except BaseException as error:
        outcome, message = "memory" if isinstance(error, MemoryError) else "error", ": ".join(describe(error))
    if peer.gone:  # whatever the tests made of it
        outcome, message = "died", "the candidate's process ended before the tests, or broke the protocol"
    os.write(verdict, json.dumps({"outcome": outcome, "message": message[:1000]}).encode() + b"\n")


def main():
    sys.path[:] = [path for path in sys.path if path]  # not the working directory, which candidates write to
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    with open(0, "rb") as file:
        job = json.load(file)
    os.open(os.devnull, os.O_RDONLY)  # the lowest free number: what reads standard input finds its end
    os.environ.clear()
    os.environ["OMP_NUM_THREADS"] = "1"  # else NumPy's libraries reserve memory for a thread on each core
    {"candidate": run_candidate, "judge": run_judge}[sys.argv[1]](job)
