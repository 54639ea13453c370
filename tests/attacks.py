"""
Candidates that attack, for test_sandbox.py, which runs them as root or who runs the tests, and as an ordinary user:

    python attacks.py        (prints, as JSON, what each came to and what was left behind)

Imports the standard library and the sandbox alone. An attack made by `attack` gives its candidate the right answer
only if it works, so that a score of 0 says that it does not.
"""

# ruff: noqa: E501 - programs as strings, broken where their lines break

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

from trl_gspo.sandbox import Limits, Program, run_programs


TESTS = "assert add(1, 2) == 3\nassert add(5, 6) == 11\n"
QUICK = Limits(wall_seconds=5.0, cpu_seconds=1, memory_mib=256, disk_mib=4, output_kib=64)
# For those that would wait, rather than work, for ever.
BRIEF = Limits(wall_seconds=0.5, cpu_seconds=1, memory_mib=256, disk_mib=4, output_kib=64)
WAITING = ("sleeps", "stops_itself", "answers_no_more", "many_slow_threads")


def attack(code):
    """A candidate that adds correctly if `code` leaves `done` true."""
    body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
    return f"done = False\ntry:\n{body}\nexcept BaseException:\n    pass\ndef add(a, b):\n    return a + b if done else None\n"


LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
denied = lambda: ctypes.get_errno() == 1
"""

# None does harm where it works: signal 0 says whether a signal could be sent, a wrong argument whether a call could.
# By name: the candidate, and the outcomes it may have. {NAMES} in braces are filled in for each test.
ATTACKS = {
    # time
    "endless_loop": ("while True: pass", "timeout"),
    "endless_loop_in_the_call": ("def add(a, b):\n    while True: pass", "timeout"),
    "sleeps": ("import time\ntime.sleep(1000)", "timeout"),
    "ignores_signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\nwhile True: pass",
        "timeout",
    ),
    "stops_itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "slow_regular_expression": ("import re\nre.match('(a+)+$', 'a' * 64 + 'b')", "timeout"),
    "many_slow_threads": (
        "import threading, time\nthreading.stack_size(32768)\nwhile True:\n"
        "    try: threading.Thread(target=time.sleep, args=(1000,)).start()\n    except RuntimeError: pass",
        "timeout memory error",
    ),
    "answers_no_more": (
        "import threading, time, os\nos.close(0)\ndef add(a, b):\n    threading.Event().wait()",
        "timeout",
    ),
    # memory
    "takes_10_gb": ("x = bytearray(10 * 2**30)", "memory"),
    "takes_10_gb_bit_by_bit": ("x = []\nwhile True: x.append(bytearray(2**24))", "memory"),
    "takes_10_gb_and_goes_on": (
        attack("x = bytearray(10 * 2**30)\ndone = True"),
        "failed",
    ),
    "endless_list": ("def add(a, b):\n    return [0] * 10**9", "memory"),
    "anonymous_file": (attack("import os\ndone = os.memfd_create('x') >= 0"), "failed"),
    # processes
    "forks": (attack("import os\npid = os.fork()\nif pid == 0: os._exit(0)\ndone = True"), "failed"),
    "fork_bomb": ("import os, time\nfor _ in range(6): os.fork()\ntime.sleep(1000)", "error"),
    "forks_by_system_call": (
        attack(LIBC + "pid = libc.syscall(57)\nif pid == 0: os._exit(0)\ndone = pid > 0"),
        "failed",
    ),
    "forks_by_a_newer_system_call": (
        attack(
            LIBC + "import struct\npid = libc.syscall(435, bytes(32) + struct.pack('Q', 17) + bytes(24), 64)\n"
            "if pid == 0: os._exit(0)\ndone = pid > 0"
        ),
        "failed",
    ),
    "starts_a_program": (attack("import subprocess\nsubprocess.run(['/bin/true'])\ndone = True"), "failed"),
    "becomes_a_program": (attack("import os\nos.execv('/bin/sleep', ['sleep', '1000'])"), "failed"),
    "shell": (attack("import os\ndone = os.system('true') == 0"), "failed"),
    "multiprocessing": (attack("import multiprocessing as m\nm.Process(target=print).start()\ndone = True"), "failed"),
    "daemon": (
        attack(
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
            "    os._exit(0)\ndone = True"
        ),
        "failed",
    ),
    "kills_the_parent": (attack("import os\nos.kill(os.getppid(), 0)\ndone = True"), "failed"),
    "kills_the_parents_group": (attack("import os\nos.killpg(os.getpgid(os.getppid()), 0)\ndone = True"), "failed"),
    "kills_all": (attack("import os\nos.kill(-1, 0)\ndone = True"), "failed"),
    "kills_the_judge": (
        attack(
            "import os\nfor pid in range(os.getpid() - 3, os.getpid() + 30):\n    if pid != os.getpid():\n"
            "        try: os.kill(pid, 0); done = True\n        except OSError: pass"
        ),
        "failed",
    ),
    "signals_the_parent_by_a_pipe": (
        attack(
            "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, os.getppid())\nfcntl.fcntl(r, 10, 9)\ndone = True"
        ),
        "failed",
    ),
    "traced_by_the_parent": (attack(LIBC + "done = libc.ptrace(0, 0, 0, 0) == 0"), "failed"),
    "reads_the_parents_memory": (
        attack(
            LIBC + "local = ctypes.create_string_buffer(8)\nimport struct\n"
            "vector = struct.pack('PN', ctypes.addressof(local), 8)\n"
            "done = libc.process_vm_readv(os.getppid(), vector, 1, vector, 1, 0) >= 0 or not denied()"
        ),
        "failed",
    ),
    # files
    "writes_outside": (attack("open({MARK!r}, 'w').write('x')\ndone = True"), "failed"),
    "truncates_outside": (
        attack("import os\nos.open({SECRET!r}, os.O_RDONLY | os.O_TRUNC)\ndone = True"),
        "failed",
    ),
    "removes_outside": (attack("import os\nos.remove({SECRET!r})\ndone = True"), "failed"),
    "makes_a_folder_outside": (attack("import os\nos.mkdir({MARK!r})\ndone = True"), "failed"),
    "changes_rights_outside": (attack("import os\nos.chmod({SECRET!r}, 0o777)\ndone = True"), "failed"),
    "writes_into_dev_shm": (attack("open('/dev/shm/' + {NAME!r}, 'w')\ndone = True"), "failed"),
    "writes_by_a_relative_path": (attack("open('../' + {NAME!r}, 'w')\ndone = True"), "failed"),
    "reads_a_file": (attack("done = bool(open({SECRET!r}).read())"), "failed"),
    "reads_passwords": (attack("done = bool(open('/etc/passwd').read())"), "failed"),
    "lists_the_root": (attack("import os\ndone = bool(os.listdir('/'))"), "failed"),
    "symbolic_link": (attack("import os\nos.symlink({SECRET!r}, 'x')\ndone = bool(open('x').read())"), "failed"),
    "hard_link": (attack("import os\nos.link({SECRET!r}, 'x')\ndone = bool(open('x').read())"), "failed"),
    "leaves_its_folder": (attack("import os\nos.chdir('/')\ndone = True"), "failed"),
    "changes_the_root": (attack(LIBC + "done = libc.chroot(b'.') == 0"), "failed"),
    "mounts": (
        attack(LIBC + "done = libc.unshare(0x10020000) == 0 or libc.mount(b'x', b'.', b'tmpfs', 0, 0) == 0"),
        "failed",
    ),
    "pipe_and_device": (attack("import os\nos.mkfifo('x')\ndone = True"), "failed"),
    "one_large_file": (attack("open('x', 'wb').write(bytes(2**24)) and 0\ndone = True"), "failed disk"),
    "file_with_holes": (
        attack("import os\nos.ftruncate(os.open('x', os.O_RDWR | os.O_CREAT), 2**30)\ndone = True"),
        "failed",
    ),
    "fills_the_disk": (
        "import itertools\nfor i in itertools.count():\n    with open(str(i), 'wb') as f: f.write(bytes(2**20))",
        "disk",
    ),
    "many_files": ("import itertools\nfor i in itertools.count(): open(str(i), 'w').close()", "disk"),
    "folders_in_folders": (
        "import os\nparts = []\nwhile True:\n    for _ in range(1000):\n        try: os.makedirs('/'.join(parts + ['d']))\n"
        "        except OSError: pass\n        parts = (parts + ['d'])[:2000]",
        "disk timeout",
    ),
    "folder_without_rights": (
        "import os\nos.makedirs('a/b')\nos.mkdir('c', 0)\ndef add(a, b): return 0",
        "failed disk",
    ),
    "hides_what_it_writes": (
        "import itertools, os\nos.mkdir('h', 0o300)\nfor i in itertools.count():\n"
        "    with open(f'h/{{i}}', 'wb') as f: f.write(bytes(2**20))",
        "disk",
    ),
    # what it can learn
    "reads_its_environment": (attack("import os\ndone = 'TRL_GSPO_SECRET' in os.environ"), "failed"),
    "reads_the_parents_environment": (
        attack(
            "import os, glob\nfor pid in ['self', os.getppid()]:\n"
            "    done = done or b'TRL_GSPO_SECRET' in open(f'/proc/{{pid}}/environ', 'rb').read()"
        ),
        "failed",
    ),
    "reads_its_environment_by_libc": (
        attack(LIBC + "libc.getenv.restype = ctypes.c_char_p\ndone = libc.getenv(b'TRL_GSPO_SECRET') is not None"),
        "failed",
    ),
    "reads_standard_input": (attack("import sys\ndone = bool(sys.stdin.read()) or bool(input())"), "failed"),
    "finds_the_tests": (
        attack(
            "import gc, os, sys\nseen = repr(gc.get_objects()) + repr(sys._getframe().f_globals)\n"
            "for fd in range(64):\n    try: os.lseek(fd, 0, 0); seen += str(os.pread(fd, 10**6, 0))\n"
            "    except OSError: pass\ndone = ''.join(['ad', 'd(1', ', 2)']) in seen"
        ),
        "failed error timeout",
    ),
    # the system
    "connects": (
        attack("import socket\nsocket.create_connection(('127.0.0.1', {PORT}), 1).send(b'x')\ndone = True"),
        "failed",
    ),
    "sends_a_datagram": (
        attack(
            "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {PORT}))\ndone = True"
        ),
        "failed",
    ),
    "connects_to_a_local_socket": (
        attack("import socket\nsocket.socket(socket.AF_UNIX).connect({SOCKET!r})\ndone = True"),
        "failed",
    ),
    "sends_by_a_pair_of_datagram_sockets": (
        attack("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\ndone = True"),
        "failed",
    ),
    "raises_its_limits": (
        attack(
            "import resource as r\nfor limit in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE):\n"
            "    try: r.setrlimit(limit, (r.RLIM_INFINITY, r.RLIM_INFINITY)); done = True\n"
            "    except (ValueError, OSError): pass"
        ),
        "failed",
    ),
    "opens_many_files": (
        attack("import os\nfor _ in range(1000): os.open('/dev/null', os.O_RDONLY)\ndone = True"),
        "failed",
    ),
    "becomes_another_user": (attack("import os\nos.setuid(12345)\ndone = True"), "failed"),
    "asynchronous_input_and_output": (attack(LIBC + "done = libc.syscall(425, 8, bytes(120)) >= 0"), "failed"),
    "shared_memory": (attack(LIBC + "done = libc.shmget(0x7a7a, 4096, 0o1666) >= 0"), "failed"),
    "keyring": (attack(LIBC + "done = libc.syscall(248, b'user', b'x', b'y', 1, -3) >= 0"), "failed"),
    "host_name": (attack(LIBC + "done = libc.sethostname(b'x', -1) < 0 and not denied()"), "failed"),
    "programs_the_kernel": (
        attack(LIBC + "done = libc.syscall(321, 0, bytes(128), 128) < 0 and not denied()"),
        "failed",
    ),
    "types_into_the_terminal": (
        attack("import fcntl\ntry: fcntl.ioctl(1, 0x5412, b'x')\nexcept OSError as e: done = e.errno != 1"),
        "failed",
    ),
    "old_system_calls": (  # of 32 bits, which the table of 64 does not count: the process is killed
        attack(
            "import ctypes, mmap\ncode = bytes.fromhex('b814000000cd80c3')\nm = mmap.mmap(-1, 4096, prot=7)\n"
            "m.write(code)\ndone = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() > 0"
        ),
        "failed error",
    ),
    # crashes and exits
    "deep_recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", "error memory timeout"),
    "deep_source": ("x = " + "(" * 50000 + ")" * 50000 + "\ndef add(a, b): return a + b", "error memory"),
    "null_pointer": ("import ctypes\nctypes.string_at(0)", "error"),
    "exits_at_once": ("import os\nos._exit(0)", "error"),
    "exits_in_the_call": ("import os\ndef add(a, b): os._exit(0)", "error"),
    "sys_exit": ("import sys\nsys.exit(0)", "error"),
    "sys_exit_in_the_call": ("import sys\ndef add(a, b): sys.exit(0)", "error"),
    "exit_in_a_thread": (
        "import threading, os\nt = threading.Thread(target=os._exit, args=(0,))\nt.start()\nt.join()",
        "error",
    ),
    "exit_at_the_end": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)", "error"),
    "aborts": ("import os\nos.abort()", "error"),
    "kills_itself": ("import os\nos.kill(os.getpid(), 15)", "error"),
    "prints_without_end": ("while True: print('x' * 10000)", "output"),
    "prints_without_end_on_standard_error": ("import os\nwhile True: os.write(2, b'x' * 10000)", "output"),
    "closes_all_files": ("import os\nos.closerange(0, 256)\ndef add(a, b): return a + b", "error"),
    "leaves_threads": (
        "import threading, time\nfor _ in range(4): threading.Thread(target=time.sleep, args=(1000,)).start()",
        "error",
    ),
    "empty": ("", "error"),
    "no_program": ("def add(a, b:", "error"),
    "null_characters": ("\0\0", "error"),
    # forging the verdict
    "equal_to_all": (
        "class All:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = None\n    __lt__ = __gt__ = __le__ = __ge__ = __eq__\ndef add(a, b): return All()",
        "failed",
    ),
    "number_equal_to_all": (
        "class All(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef add(a, b): return All()",
        "failed",
    ),
    "text_equal_to_all": (
        "class All(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef add(a, b): return All()",
        "failed",
    ),
    "claims_to_be_a_number": (
        "class All:\n    __class__ = int\n    def __eq__(self, other): return True\ndef add(a, b): return All()",
        "failed error",
    ),
    "patches_assertions": (
        "import builtins\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n"
        "builtins.__dict__['assert'] = None\nfor name in ('all', 'abs', 'len', 'isinstance', 'eval', 'exec'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\ndef add(a, b): return 0",
        "failed error",
    ),
    "patches_check": ("def check(*args): pass\ncandidate = check\ndef add(a, b): return 0", "failed"),
    "patches_the_runner": (
        "import sys\nfor m in list(sys.modules.values()):\n    for name in ('judge', 'receive', 'send', '_exception'):\n"
        "        if hasattr(m, name): setattr(m, name, lambda *a: ('passed', ''))\ndef add(a, b): return 0",
        "failed error timeout",
    ),
    "patches_frames": (
        "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        f.f_globals['passed'] = True\n"
        "        for k in list(f.f_locals): \n            if k == 'outcome': f.f_locals[k] = 'passed'\n"
        "        f = f.f_back\n    return 0",
        "failed error",
    ),
    "traces_calls": (
        "import sys, threading\ndef t(frame, event, arg):\n    frame.f_trace_lines = False\n    return t\nsys.settrace(t)\n"
        "sys.setprofile(t)\nsys._getframe().f_trace = t\ndef add(a, b): return 0",
        "failed error timeout",
    ),
    "raises_success": ("class Passed(BaseException): pass\ndef add(a, b): raise Passed('passed')", "error"),
    "writes_to_all_pipes": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{{"ready": 7}}\\n{{"outcome": "passed", "message": ""}}\\n\')\n'
        "    except OSError: pass\nos._exit(0)",
        "error",
    ),
    "prints_a_verdict": (
        'print(\'{{"outcome": "passed", "message": ""}}\', flush=True)\nimport os\nos._exit(0)',
        "error",
    ),
    "opens_the_verdict": (
        attack(
            "import os\nfor pid in range(os.getpid() - 5, os.getpid() + 5):\n    for fd in range(16):\n"
            "        try: os.open(f'/proc/{{pid}}/fd/{{fd}}', os.O_WRONLY); done = pid != os.getpid()\n"
            "        except OSError: pass"
        ),
        "failed",
    ),
    "reads_the_judges_memory": (
        "import os\ndef add(a, b):\n    for pid in range(os.getpid() - 5, os.getpid() + 50):\n        try:\n"
        "            if b'judge' in open(f'/proc/{{pid}}/cmdline', 'rb').read(): return open(f'/proc/{{pid}}/mem') and a + b\n"
        "        except OSError: pass",
        "failed",
    ),
    "writes_its_own_memory": (attack("open('/proc/self/mem', 'r+b')\ndone = True"), "failed"),
    "module_in_its_folder": (
        "for name in ('math', 'json', 'ast', 'random', 'collections'):\n    open(name + '.py', 'w').write('1/0')\n"
        "def add(a, b): return 0",
        "failed",
    ),
    "pickles_itself": (
        "class Evil:\n    def __reduce__(self): return (exec, ('raise SystemExit',))\ndef add(a, b): return Evil()",
        "failed",
    ),
    "nested_without_end": (
        "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
        "error memory",
    ),
    "contains_itself": ("x = []\nx.append(x)\ndef add(a, b): return x", "error"),
    "answer_without_end": ("def add(a, b): return 'x' * 2**26", "error memory"),
}
# What a candidate that knows the pipes of this sandbox could write on them. `reply`, `say` and `hear` are the pipes.
PIPES = """
import sys, json
m = next(v for v in sys.modules.values() if hasattr(v, 'Peer'))
import gc
peer = next(o for o in gc.get_objects() if type(o).__name__ == 'Peer')
say = lambda message: m.send(peer.outgoing, message)
hear = lambda: m.receive(peer.incoming)
def ask(operation, target, *args):
    say({{'do': operation, 'target': target, 'args': list(args), 'kwargs': {{}}}})
    return hear()
"""
ATTACKS |= {
    "sends_success": (PIPES + "say({{'outcome': 'passed', 'message': ''}})\nos._exit(0)", "error"),
    "evaluates_in_the_judge": (
        PIPES + "def add(a, b):\n    got = ask('name', '1 + 1')\n    return a + b if 'value' in got else None",
        "failed",
    ),
    "makes_a_class_in_the_judge": (
        PIPES + "def add(a, b):\n"
        "    made = ask('call', {{'type': 'type'}}, 'All', {{'tuple': [{{'type': 'object'}}]}}, {{'dict': []}})\n"
        "    return a + b if 'value' in made else None",
        "failed",
    ),
    "unknown_kind_of_value": (
        PIPES + "def add(a, b):\n    say({{'value': {{'exec': 'passed'}}}})\n    hear()",
        "error",
    ),
    "no_json": (
        PIPES + "def add(a, b):\n    os.write(peer.outgoing, b'\\0' * 7 + b'\\1x')\n    hear()\nimport os",
        "error",
    ),
    "nested_message": (
        PIPES + "import os\ndef add(a, b):\n    text = b'[' * 10**6 + b']' * 10**6\n"
        "    os.write(peer.outgoing, len(text).to_bytes(8, 'big') + text)\n    hear()",
        "error",
    ),
    "announces_a_huge_message": (
        PIPES + "import os\ndef add(a, b):\n    os.write(peer.outgoing, b'\\x7f' * 8)\n    hear()",
        "error",
    ),
    "changes_no_argument_of_the_call": (
        PIPES + "def add(a, b):\n    say({{'value': a + b, 'changed': [[7, [1]]]}})\n    hear()",
        "error",
    ),
}


class Surroundings:
    """What an attack may reach for, and what has to be as before when it is over."""

    def __init__(self, folder):
        self.folder = folder
        self.temporary = os.path.join(folder, "temporary")
        os.mkdir(self.temporary)
        self.secret = os.path.join(folder, "secret")
        self.name = os.path.basename(folder) + "-left"
        with open(self.secret, "w") as file:
            file.write("secret")
        os.chmod(self.secret, 0o666)
        os.chmod(folder, 0o777)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(os.path.join(folder, "socket"))
        self.local.listen()

    def filled(self, name):
        code = ATTACKS[name][0]
        return (
            code
            if "{" not in code
            else code.format(
                MARK=os.path.join(self.folder, "mark"),
                SECRET=self.secret,
                NAME=self.name,
                PORT=self.listener.getsockname()[1],
                SOCKET=os.path.join(self.folder, "socket"),
            )
        )

    def state(self):
        files = sorted(
            (str(path), path.lstat().st_mode, path.lstat().st_size) for path in Path(self.folder).rglob("*")
        )
        return {
            "files": files,
            "shared memory": os.path.exists(f"/dev/shm/{self.name}"),
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "open files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "processes": processes(),
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        }


def processes():
    """Children of this process, and candidates' processes that have lost their parents."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                command = file.read()
            if parent == os.getpid() or (parent == 1 and b"sandbox_child" in command):
                found.append((int(entry), command))
    return sorted(found)


@contextlib.contextmanager
def surroundings(folder):
    around = Surroundings(folder)
    before = tempfile.tempdir
    tempfile.tempdir, os.environ["TRL_GSPO_SECRET"] = around.temporary, "hunter2"
    try:
        yield around
    finally:
        tempfile.tempdir = before
        del os.environ["TRL_GSPO_SECRET"]
        around.listener.close()
        around.local.close()


def run_attack(name, folder, landlock=True):
    """Score and outcome of an attack, and how the surroundings differ after it."""
    with surroundings(folder) as around:
        before = around.state()
        limits = BRIEF if name in WAITING else QUICK
        (result,) = run_programs([Program(around.filled(name), TESTS)], limits, landlock=landlock)
        after = around.state()
        left = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    return result, left


def main():
    with tempfile.TemporaryDirectory() as folder, surroundings(os.path.realpath(folder)) as around:
        before = around.state()
        names = [name for name in ATTACKS if "timeout" not in ATTACKS[name][1]]
        programs = [Program(around.filled(name), TESTS) for name in names]
        results = run_programs(programs, QUICK, workers=2)
        after = around.state()
        outcomes = {name: [result.outcome, result.score] for name, result in zip(names, results, strict=True)}
        left = {key: [str(before[key]), str(after[key])] for key in before if before[key] != after[key]}
        json.dump({"user": os.getuid(), "outcomes": outcomes, "left": left}, sys.stdout)


if __name__ == "__main__":
    main()
