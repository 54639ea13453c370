"""The code reward's sandbox: attacks.py has what it has to withstand."""

# ruff: noqa: E501 - programs as strings, broken where their lines break

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from attacks import ATTACKS, QUICK, TESTS, attack, processes, run_attack, surroundings
from datasets import Dataset

from trl_gspo import GSPOConfig, GSPOTrainer, sandbox, sandbox_child
from trl_gspo.rewards import extract_code, get_code_reward, load_reward
from trl_gspo.sandbox import Limits, Program, SandboxError, run_programs


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="candidates are run on Linux alone")

ROOT = Path(__file__).resolve().parents[1]
HUMANEVAL = ROOT.parent / "shared/data/humaneval/HumanEval.jsonl"
needs_humaneval = pytest.mark.skipif(not HUMANEVAL.exists(), reason=f"{HUMANEVAL} is absent")
ADD = "def add(a, b): return a + b"


def one(code, tests=TESTS, limits=QUICK, landlock=True, packages=False, **columns):
    return run_programs([Program(code, tests, **columns)], limits, packages=packages, workers=1, landlock=landlock)[0]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_scores_0_and_leaves_nothing(name, tmp_path):
    result, left = run_attack(name, str(tmp_path))
    assert result.score == 0.0, result
    assert result.outcome in ATTACKS[name][1].split(), result
    assert not left


# What an older kernel, without Landlock, does not keep from a candidate: reading. docs/code_reward.md says so.
READING = {
    *("reads_a_file", "reads_passwords", "lists_the_root", "reads_the_parents_environment"),
}


def without_landlock():
    reaching = re.compile(r"open\(|os\.(link|symlink|remove|mk|chmod|exec|system)|/proc|subprocess|_vm_")
    return [name for name, (code, _) in ATTACKS.items() if reaching.search(code) and name not in READING]


@pytest.mark.parametrize("name", without_landlock())
def test_an_attack_on_files_without_landlock(name, tmp_path):
    result, left = run_attack(name, str(tmp_path), landlock=False)
    assert result.score == 0.0, result
    assert not left


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="not root")
def test_root_has_no_privileges_left(tmp_path):
    closed = tmp_path / "closed"
    closed.write_text("secret")
    os.chown(closed, 65534, 65534)
    closed.chmod(0o600)
    # Without Landlock nothing but the lack of capabilities keeps root from reading it.
    assert one(attack(f"done = bool(open({str(closed)!r}).read())"), landlock=False).outcome == "failed"


def test_without_landlock_it_warns_once(caplog, monkeypatch):
    monkeypatch.setattr(sandbox, "_warned", set())
    results = run_programs([Program(ADD, TESTS)] * 2, QUICK, landlock=False)
    assert [result.outcome for result in results] == ["passed"] * 2
    assert len([record for record in caplog.records if "no Landlock" in record.getMessage()]) == 1
    caplog.clear()
    if sandbox_child.landlock_version():
        run_programs([Program(ADD, TESTS)], QUICK)
        assert not caplog.records


def interpreters_of_others():
    """Python interpreters that an ordinary user can start."""
    for path in (sys.executable, "/usr/bin/python3"):
        try:
            test = "import sys; sys.exit(sys.version_info < (3, 10))"
            if not subprocess.run([path, "-c", test], user=65534, group=65534, extra_groups=[]).returncode:
                yield path
        except (OSError, subprocess.SubprocessError):
            continue


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="the other tests run as an ordinary user already")
def test_attacks_as_an_ordinary_user():
    interpreter = next(interpreters_of_others(), None)
    if interpreter is None:
        pytest.skip("no Python here that another user can start")
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are for their owner alone
        package, folder = Path(place) / "trl_gspo", Path(place) / "temporary"
        package.mkdir()
        folder.mkdir()
        for name in ("__init__.py", "sandbox.py", "sandbox_child.py"):
            shutil.copy(ROOT / "trl_gspo" / name, package)
        shutil.copy(ROOT / "tests/attacks.py", place)
        for path, mode in ((place, 0o755), (package, 0o755), (folder, 0o777)):
            os.chmod(path, mode)
        ran = subprocess.run(
            [interpreter, f"{place}/attacks.py"],
            env={"PYTHONPATH": place, "TMPDIR": str(folder), "PATH": os.environ["PATH"]},
            cwd=folder,
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
        left = os.listdir(folder)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["user"] == 65534
    assert len(said["outcomes"]) > 90
    wrong = {name: got for name, got in said["outcomes"].items() if got[0] not in ATTACKS[name][1] or got[1] != 0.0}
    assert not wrong
    assert not said["left"]
    assert not left


# What legitimate programs need.

GOOD = {
    "plain": (ADD, TESTS),
    "prints": ("def add(a, b):\n    print(a, b)\n    return a + b", TESTS),
    "writes_in_its_folder": (
        "import os, tempfile\nos.mkdir('d')\nwith open('d/x', 'w') as f: f.write('5')\n"
        "os.rename('d/x', 'y')\ndef add(a, b):\n    assert open('y').read() == '5' and os.listdir('d') == []\n"
        "    with open('/dev/null', 'w') as f: f.write('x')\n    return a + b",
        TESTS,
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef add(a, b):\n"
        "    with ThreadPoolExecutor(4) as pool: return sum(pool.map(int, [a, b]))",
        TESTS,
    ),
    "asyncio": ("import asyncio\nasync def f(a, b): return a + b\ndef add(a, b): return asyncio.run(f(a, b))", TESTS),
    "imports": (
        "import bisect, collections, ctypes, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json\n"
        "import math, random, re, sqlite3, statistics, string, time, typing, unittest, zoneinfo\n" + ADD,
        TESTS,
    ),
    "own_alarm": ("import signal\nsignal.alarm(100)\n" + ADD, TESTS),
    "nearly_all_memory": ("x = bytearray(2**27)\n" + ADD, TESTS),
    "classes": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]\n"
        "    def __iter__(self): return iter(self.items)\n    def __str__(self): return f'Stack({self.items})'",
        "s = Stack()\ns.push(3)\ns.push([4])\nassert len(s) == 2 and s[1] == [4] and s.items == [3, [4]]\n"
        "assert list(s) == [3, [4]] and [4] in s and 5 not in s and str(s) == 'Stack([3, [4]])'\ns.items = []\n"
        "assert not s",
    ),
    "values": (
        "import collections, decimal, fractions\nP = collections.namedtuple('P', 'x y')\n"
        "def f(x): return x\ndef g(): return P(1, {2: (3, {4})}), collections.Counter('aab')\n"
        "def h(): return decimal.Decimal('0.1'), fractions.Fraction(1, 3), 1j, b'\\xff', range(3), frozenset([1])",
        "from decimal import Decimal\nfrom fractions import Fraction\nimport math\n"
        "for x in [None, True, 0, -1, 10**5000, 1.5, -0.0, math.inf, '\\ud800\\n', '', [], [1, [2]], (), (1,), {}, {1: 'a', (2,): [3]},"
        " set(), {1, 2}, frozenset('a'), b'\\x00\\xff', bytearray(b'x'), 2j, range(1, 9, 2), int, Decimal('1.10')]:\n"
        "    y = f(x)\n    assert y == x and type(y) is type(x), x\nassert math.isnan(f(math.nan))\n"
        "assert g() == ((1, {2: (3, {4})}), {'a': 2, 'b': 1})\n"
        "assert h() == (Decimal('0.1'), Fraction(1, 3), 1j, b'\\xff', range(3), {1})",
    ),
    "generators": (
        "def f(n):\n    for i in range(n): yield i * i\ndef endless():\n    while True: yield 1",
        "assert list(f(4)) == [0, 1, 4, 9]\nassert sum(f(3)) == 5\ng = endless()\nassert [next(g), next(g)] == [1, 1]",
    ),
    "functions_as_arguments": (
        "def f(g, xs): return [g(x) for x in xs]\ndef compose(g, h): return lambda x: g(h(x))",
        "assert f(lambda x: x * 2, [1, 2]) == [2, 4]\nassert f(len, ['ab']) == [2]\nassert f(str, [1]) == ['1']\n"
        "assert compose(lambda x: x + 1, lambda x: x * 2)(5) == 11\nassert f(iter([7]).__next__.__class__, []) == []",
    ),
    "arguments_changed_in_place": (
        "def f(xs, d, s=None):\n    xs.sort()\n    d['k'] = [1]\n    s.add(9)\n    xs.append(xs[:])",
        "xs, d, s = [3, 1], {}, set()\nassert f(xs, d, s=s) is None\nassert xs == [1, 3, [1, 3]] and d == {'k': [1]} and s == {9}",
    ),
    "nodes_of_the_tests": (
        "def reverse(head):\n    last = None\n    while head is not None:\n        head.next, last, head = last, head, head.next\n"
        "    return last",
        "class Node:\n    def __init__(self, val, next=None): self.val, self.next = val, next\n"
        "got = reverse(Node(1, Node(2, Node(3))))\nassert isinstance(got, Node)\n"
        "assert [got.val, got.next.val, got.next.next.val, got.next.next.next] == [3, 2, 1, None]",
    ),
    "exceptions": (
        "class Mine(ValueError): pass\ndef f(x):\n    if x: raise Mine('no')\n    return {}[x]",
        "for x, kind in ((1, ValueError), (0, KeyError)):\n    try: f(x)\n    except kind as e: assert x == 0 or 'no' in str(e)\n"
        "    else: assert False",
    ),
    "modules_of_the_candidate": ("import math\ndef f(): return 4.0", "assert math.sqrt(f()) == 2.0"),
    "constants": ("LIMIT = 7\ndef f(): return LIMIT", "assert f() == LIMIT"),
    "main_block": (ADD + "\nif __name__ == '__main__':\n    print(input())", TESTS),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_program_passes(name):
    code, tests = GOOD[name]
    result = one(code, tests)
    assert result.score == 1.0, result


@pytest.mark.parametrize(
    ("code", "prefix", "entry_point", "tests", "outcome"),
    [
        ("    return a + b", "def add(a, b):\n    '''Adds.'''\n", "add", TESTS, "passed"),
        ("    return a + b", "def add(a, b):\n", "add", TESTS, "passed"),
        ("    return a + b", "def add(a, b):\n    '''Adds.'''\n", None, TESTS, "passed"),
        # A whole program needs the imports and helpers of the prefix all the same.
        (
            "def add(a: List[int], b): return inc(a) + b - 1",
            "from typing import List\ndef inc(x): return x + 1\ndef add(a, b):\n    '''Adds.'''\n",
            "add",
            TESTS,
            "passed",
        ),
        ("from __future__ import annotations\n" + ADD, "import math\n", "add", TESTS, "passed"),
        ("add = lambda a, b: a + b", "x = 1\n", "add", TESTS, "passed"),
        ("def sub(a, b): return a - b", "", "add", TESTS, "error"),
        ("def sub(a, b): return a - b", "def add(a, b):\n    '''Adds.'''\n", "add", TESTS, "failed"),
        # The tests' helpers are those of the prefix, whatever the candidate makes of them.
        (
            "def close(a, b): return True\ndef root(): return 9.0",
            "def close(a, b): return abs(a - b) < 1e-6\ndef root():\n    '''Of 4.'''\n",
            "root",
            "assert close(root(), 2.0)",
            "failed",
        ),
        ("def len(x): return 3\ndef f(): return []", "", "f", "assert len(f()) == 3", "failed"),
        (
            "class math:\n    fabs = lambda x: 0\ndef f(): return 9",
            "",
            "f",
            "assert math.fabs(f() - 1) < 1e-6",
            "failed",
        ),
        (
            "class Solution:\n    def add(self, a, b): return a + b",
            "",
            "Solution().add",
            "def check(candidate):\n    assert candidate(1, b=2) == 3",
            "passed",
        ),
        (
            "class Solution:\n    def add(self, a, b): return a + b",
            "class Solution:\n    '''It.'''\n",
            "Solution().add",
            "assert Solution().add(1, 2) == 3\nassert candidate(1, 2) == 3",
            "passed",
        ),
        # `check` is called where the tests only define it, and not again where they call it.
        (
            ADD,
            "",
            "add",
            "n = []\ndef check(c):\n    n.append(c(1, 2))\n    assert len(n) == 1 and n[0] == 3\ncheck(add)",
            "passed",
        ),
        (ADD, "", "add", "def check(c):\n    assert c(1, 2) == 4", "failed"),
        (ADD, "", "add", "assert True", "unused"),
        (ADD, "", None, "def check(c):\n    assert c(1, 2) == 3", "unused"),
        (ADD, "", "add", "add(1, 2)\nraise ValueError('x')", "error"),
        (ADD, "", "add", "import sys\nadd(1, 2)\nsys.exit(0)", "error"),
        # No test may take a candidate's end for an exception of its own.
        ("import os\ndef add(a, b): os._exit(0)", "", "add", "try: add(1, 2)\nexcept Exception: pass", "error"),
        ("import os\ndef add(a, b): os._exit(0)", "", "add", "try: add(1, 2)\nexcept: pass", "error"),
        (
            "import os\ndef add(a, b): os._exit(0)",
            "",
            "add",
            "while True:\n    try: add(1, 2)\n    except Exception: pass",
            "error",
        ),
        (ADD, "", "add", "add(1, 2)\nwhile True: pass", "timeout"),
    ],
)
def test_code_prefix_entry_point_and_tests(code, prefix, entry_point, tests, outcome):
    result = one(code, tests, code_prefix=prefix, entry_point=entry_point)
    assert result.outcome == outcome, result
    assert result.score == {"passed": 1.0, "unused": None}.get(outcome, 0.0)


def test_assertions_hold_without_them_in_the_parent(monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    assert one("def add(a, b): return 0").outcome == "failed"


def test_the_same_candidate_has_the_same_order_of_sets():
    code = "def f(): return ''.join({str(i) for i in range(50)})"
    assert one(code + "\nprint(f())", "f()").output == one(code + "\nprint(f())", "f()").output != ""


def test_private_attributes_of_the_tests_objects_are_refused():
    # By a function's or a frame's attributes a candidate would reach the tests' globals.
    code = """
def f(*pairs):
    got = []
    for target, name in pairs:
        try:
            got.append(getattr(target, name))
        except PermissionError:
            pass
    return got
"""
    tests = """
import functools
class Box:
    def __init__(self): self.open, self._closed = 1, 2
generator = (x for x in [])
assert f((Box(), "open"), (Box(), "_closed"), (functools.partial(int, 3), "func"), (generator, "gi_frame")) == [1]
"""
    assert one(code, tests).outcome == "passed"


@pytest.mark.parametrize(
    ("code", "limits", "message"),
    [
        ("while True: pass", Limits(wall_seconds=60.0, cpu_seconds=1), "more than 1 s of processor time"),
        ("import time\ntime.sleep(60)", Limits(wall_seconds=0.3), "more than 0.3 s"),
    ],
)
def test_limits_of_time(code, limits, message):
    started = time.monotonic()
    result = one(code, limits=limits)
    assert (result.outcome, result.message) == ("timeout", message)
    assert time.monotonic() - started < 30


def test_packages():
    code = "import packaging.version\ndef add(a, b): return a + b"
    assert one(code, limits=Limits(memory_mib=1024)).outcome == "error"
    assert one(code, limits=Limits(memory_mib=1024), packages=True).outcome == "passed"


def test_output_and_message():
    result = one("print('héllo', flush=True)\ndef add(a, b): return 0", "assert add(1, 2) == 3, 'not 3'")
    assert (result.outcome, result.message, result.output) == ("failed", "not 3", "héllo\n")


@pytest.mark.parametrize(
    "option", ["wall_seconds", "cpu_seconds", "memory_mib", "disk_mib", "output_kib", "open_files"]
)
def test_a_senseless_limit_is_named(option):
    for value in (0, -1, "8", True, None):
        with pytest.raises(ValueError, match=option):
            Limits(**{option: value})


# The system.


def test_numbers_of_system_calls():
    tables = (sandbox_child.SYSCALLS, sandbox_child.CHANGE_SYSCALLS, sandbox_child.CONDITIONAL_SYSCALLS)
    calls = {name: numbers for table in (*tables, sandbox_child.ABSENT_SYSCALLS) for name, numbers in table.items()}
    headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    if not all(map(os.path.exists, headers)):
        pytest.skip("the kernel's headers are not installed")
    for column, header in enumerate(headers):
        text = Path(header).read_text()
        known = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        known |= {"newfstatat": known["fstatat"]} if "fstatat" in known else {}
        for name, numbers in calls.items():
            if numbers[column] >= 0:
                assert known[name] == numbers[column], (name, header)
            else:
                assert name not in known, (name, header)


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "armv7l")])
def test_other_systems_are_refused_by_name(monkeypatch, system, machine):
    monkeypatch.setattr(sandbox.sys, "platform", system)
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine)
    with pytest.raises(SandboxError, match=f"{system} on {machine}"):
        get_code_reward(allow_code_execution=True)


def test_what_keeps_processes_from_starting_is_an_error_and_no_score(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    broken.chmod(0o755)
    before = processes()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.sys, "executable", str(broken))
        with pytest.raises(SandboxError, match="no such library"):
            run_programs([Program(ADD, TESTS)])
        patch.setattr(sandbox.sys, "executable", str(tmp_path / "absent"))
        with pytest.raises(SandboxError, match="cannot be started.*absent"):
            run_programs([Program(ADD, TESTS)])
    assert os.listdir(tmp_path) == ["python"]
    assert processes() == before


def test_a_refusal_to_confine_is_an_error_and_no_score(monkeypatch):
    monkeypatch.setattr(sandbox, "_CHILD", sandbox._CHILD.replace("sandbox_child.main()", "raise OSError('seccomp')"))
    with pytest.raises(SandboxError, match="OSError: seccomp"):
        run_programs([Program(ADD, TESTS)])


def test_a_judge_that_is_killed_gives_no_score(tmp_path):
    # Its memory is not the candidate's fault here: the tests take it.
    result = one(ADD, "import os, signal\nadd(1, 2)\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (result.outcome, result.score) == ("lost", None)


def test_many_at_once_keep_apart():
    programs = [Program(f"def f(): return {i}", f"assert f() == {i if i % 3 else -1}") for i in range(60)]
    results = run_programs(programs, workers=8)
    assert [result.score for result in results] == [float(bool(i % 3)) for i in range(60)]
    assert run_programs([]) == []


LONG = """
import json, os, signal, sys, tempfile
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
tempfile.tempdir = sys.argv[1]
from trl_gspo.sandbox import Limits, Program, run_programs
print("started", flush=True)
run_programs([Program("while True: pass", "f()")] * 6, Limits(wall_seconds=100.0, cpu_seconds=100), workers=2)
"""


def members(folder):
    """Processes of candidates whose folder is in `folder`, and of the judges beside them."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"sandbox_child" in command:
            found.append((int(entry), parent))
    return found


@pytest.mark.parametrize(("signum", "cleans"), [(signal.SIGINT, True), (signal.SIGKILL, False)])
def test_an_interrupted_run_leaves_no_process(tmp_path, signum, cleans):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", LONG, str(tmp_path)], env=environment, stdout=-1, stderr=-1)
    mine = []
    deadline = time.monotonic() + 30
    while len(mine) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
        mine = [pid for pid, owner in members(tmp_path) if owner == parent.pid]
    assert len(mine) == 4
    assert len(os.listdir(tmp_path)) == 2
    time.sleep(0.3)
    parent.send_signal(signum)
    _, errors = parent.communicate(timeout=20)
    assert parent.returncode != 0
    time.sleep(0.2)
    assert not [pid for pid in mine if pid in [other for other, _ in members(tmp_path)]]
    if cleans:
        assert b"KeyboardInterrupt" in errors
        assert not os.listdir(tmp_path)


# HumanEval.


def humaneval():
    return [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]


def as_program(row, code):
    return Program(code, row["test"], row["prompt"], row["entry_point"])


@needs_humaneval
@pytest.mark.slow
def test_canonical_solutions_of_humaneval_score_1_in_under_a_minute():
    rows = humaneval()
    started = time.monotonic()
    results = run_programs([as_program(row, row["canonical_solution"]) for row in rows], workers=2)
    seconds = time.monotonic() - started
    wrong = {row["task_id"]: result for row, result in zip(rows, results, strict=True) if result.score != 1.0}
    assert len(rows) == 164 and not wrong
    assert seconds < 60


def mutants(row):
    """Programs that are certainly wrong, made of the canonical solution: by name."""
    name = row["entry_point"]
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    yield "empty", ""
    yield "pass", "    pass\n"
    yield "raises", "    raise NotImplementedError\n"
    yield "exits", "    import os\n    os._exit(0)\n"
    yield "returns_the_function", f"    return {name}\n"
    # One program whose answers are each replaced by an object that no answer can be equal to.
    yield "wrapped", f"{ast.unparse(tree)}\n_right = {name}\ndef {name}(*args): return [_right(*args), None]\n"
    yield "no_function", f"{ast.unparse(tree)}\n{name} = 0\n"
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    for node in returns:
        node.value = ast.Constant("no answer to any problem")
    yield "constant", ast.unparse(tree)


def check_mutants(chosen):
    pairs = [(row, kind, code) for i, row in enumerate(humaneval()) for kind, code in mutants(row) if chosen(i, kind)]
    results = run_programs([as_program(row, code) for row, _, code in pairs], workers=2)
    wrong = [(row["task_id"], kind, r) for (row, kind, _), r in zip(pairs, results, strict=True) if r.score != 0.0]
    assert not wrong
    return len(pairs)


@needs_humaneval
@pytest.mark.slow
def test_empty_and_wrong_solutions_of_humaneval_score_0():
    kinds = ("empty", "wrapped", "constant", "raises")
    assert check_mutants(lambda i, kind: i % 3 == 0 and kind == kinds[i // 3 % 4]) == 55


@needs_humaneval
@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_wrong_solutions_of_humaneval_score_0():
    assert check_mutants(lambda i, kind: True) == 164 * 8


# The reward.


def test_code_reward_is_off_unless_allowed(monkeypatch):
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *a, **k: pytest.fail("something was run"))
    for make in (get_code_reward, lambda: load_reward("code_reward")):
        with pytest.raises(ValueError, match="--allow_code_execution"):
            make()
    # A file of arguments is not enough.
    with pytest.raises(ValueError, match="--allow_code_execution"):
        load_reward("code_reward", {"allow_code_execution": True})


def test_code_reward():
    reward = load_reward("code_reward", {"cpu_seconds": 1}, 512, allow_code_execution=True)
    assert reward.__name__ == "code_reward"
    metrics, extra = {}, {}
    completions = [
        f"Here:\n```python\n{ADD}\n```\nDone.",
        [{"role": "assistant", "content": "    return a + b"}],
        "    return a - b",
        "anything",
        "import os; os._exit(0)",
        "```python\nwhile True: pass\n```",
    ]
    prefix = "def add(a, b):\n    '''Adds.'''\n"
    scores = reward(
        completions=completions,
        tests=[TESTS, TESTS, TESTS, None, TESTS, TESTS],
        code_prefix=[prefix] * 6,
        entry_point=["add"] * 6,
        prompts=[""] * 6,
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    assert scores == [1.0, 1.0, 0.0, None, 0.0, 0.0]
    assert {key: value for key, value in metrics.items() if value} == {
        "code/passed": 0.4,
        "code/failed": 0.2,
        "code/error": 0.2,
        "code/timeout": 0.2,
    }
    assert set(metrics) >= {"code/memory", "code/disk", "code/output", "code/unused", "code/lost"}
    assert extra == {"code_outcome": ["passed", "passed", "failed", "", "error", "timeout"]}
    assert reward(completions=[ADD], tests=[TESTS]) == [1.0]
    assert reward(completions=["x"], tests=[None], log_metric=metrics.clear) == [None]


def test_code_reward_in_the_trainer(model_path, tmp_path):
    row = {"prompt": "12", "tests": TESTS, "code_prefix": "def add(a, b):\n    '''Adds.'''\n", "entry_point": "add"}
    args = GSPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=1,
        max_completion_length=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    reward = get_code_reward(allow_code_execution=True)
    trainer = GSPOTrainer(model=model_path, reward_funcs=reward, args=args, train_dataset=Dataset.from_list([row] * 8))
    trainer.train()
    (logs,) = [entry for entry in trainer.state.log_history if "code/passed" in entry]
    # What a random model says is no Python, or does not add.
    assert logs["rewards/code_reward/mean"] == logs["code/passed"] == 0.0
    assert logs["code/failed"] + logs["code/error"] == 1.0
    assert set(trainer._logs["extra"]["code_outcome"]) <= {"failed", "error"}


def test_code_reward_runs_the_same_completion_once(monkeypatch):
    reward = get_code_reward(allow_code_execution=True)
    ran = []
    real = sandbox.run_programs
    monkeypatch.setattr(
        "trl_gspo.rewards.run_programs", lambda programs, *a: ran.extend(programs) or real(programs, *a)
    )
    assert reward(completions=[ADD, "x = 1", ADD], tests=[TESTS] * 3) == [1.0, 0.0, 1.0]
    assert len(ran) == 2


def test_code_reward_is_none_where_tests_say_nothing(caplog):
    reward = get_code_reward(allow_code_execution=True)
    assert reward(completions=[ADD], tests=["assert True"]) == [None]
    assert "unused" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"timeout": 3}, "reward_kwargs"), ({"memory_mib": 1}, "memory_mib"), ({"workers": 2}, None)],
)
def test_arguments_of_code_reward(kwargs, message):
    if message is None:
        assert callable(load_reward("code_reward", kwargs, allow_code_execution=True))
        return
    with pytest.raises(ValueError, match=message):
        load_reward("code_reward", kwargs, allow_code_execution=True)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nor\n```python\nx = 2\n```\n", "x = 2\n"),
        ("```py\nx = 1\n```\n```\n$ python x.py\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```python\n    return 1\n```", "    return 1\n"),
        ("```python\nx = 1", "```python\nx = 1"),
        ("```Python\nx = 1\n```", "x = 1\n"),
        ("<think>\n```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2\n"),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


def test_surroundings_see_what_is_left(tmp_path):
    # The check of the attacks itself: it has to see a file, a process and a variable.
    with surroundings(str(tmp_path)) as around:
        before = around.state()
        (tmp_path / "mark").touch()
        os.environ["LEFT"] = "1"
        child = subprocess.Popen(["sleep", "10"])
        after = around.state()
        child.kill()
        child.wait()
        del os.environ["LEFT"]
    assert {key for key in before if before[key] != after[key]} == {"files", "environment", "processes"}


def test_attack_gives_the_right_answer_if_it_works():
    assert one(attack("done = True")).score == 1.0
