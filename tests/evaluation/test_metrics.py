import platform
import re
import shutil
import socket
import sys
from pathlib import Path

import datasets
import evaluate
import psutil
import pytest

import fedbiot_trainer


ROOT = Path(fedbiot_trainer.__file__).parents[1]
METRICS = ROOT / "fedbiot_trainer" / "evaluation" / "metrics"


def load(name):
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


# ---- loading


def test_documents_name_their_folder():
    texts = [path.read_text() for path in (ROOT / "docs" / "metrics.md", *METRICS.glob("*/*.py"))]
    named = {path for text in texts for path in re.findall(r"evaluate\.load\(\"(.*?)\"\)", text)}
    assert len(named) == 3 and all((ROOT / path / f"{Path(path).name}.py").is_file() for path in named)


@pytest.mark.parametrize("name", ["exact_match", "gsm8k_accuracy", "pass_at_k"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_loads_without_network(name, form, monkeypatch):
    def connect(*args):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    path = METRICS / name
    metric = evaluate.load(str(path if form == "folder" else path / f"{name}.py"))
    assert metric.name == name
    assert metric.description and "Returns:" in metric.inputs_description
    assert bool(metric.citation) == (name != "exact_match")
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    assert features == {"predictions": datasets.Value("string"), "references": datasets.Value("string")}


@pytest.mark.parametrize("name", ["exact_match", "gsm8k_accuracy", "pass_at_k"])
def test_nothing_to_compute(name, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    with pytest.raises(ValueError, match="`predictions` is empty"):
        load(name)._compute([], [])


# ---- exact_match


def test_exact_match():
    predictions = ["18", " 18\n", "1 8", "Yes", "yes", ""]
    references = ["18", "18", "18", "yes", "yes ", " "]
    result = load("exact_match").compute(predictions=predictions, references=references)
    assert result == {"exact_match": pytest.approx(4 / 6)}


# ---- gsm8k_accuracy


@pytest.mark.parametrize(
    "prediction, reference, right",
    [
        ("9 * 2 = 18\n#### 18", "18 eggs. #### 18", True),
        ("#### 18\n\nQuestion: Tom has 5.\n#### 5", "#### 18", True),
        ("#### 18 of the 20", "#### 18", True),
        ("####\n18", "#### 18", True),
        ("18 ####", "#### 18", False),
        ("The answer is $18.", "#### 18", True),
        ("First 3, then 18.00 dollars", "#### 18", True),
        ("18 eggs, 2 left", "#### 18", False),
        ("It is 1,234,567.", "#### 1234567", True),
        ("1234", "#### 1,234", True),
        ("10, 18", "#### 18", True),
        ("10,18", "#### 18", True),
        ("-5", "#### -5", True),
        ("\u22125", "#### -5", True),
        ("He owes -$5.50", "#### -5.5", True),
        ("5", "#### -5", False),
        ("20-5", "#### 5", True),
        ("(20)-5", "#### 5", True),
        ("- 5", "#### 5", True),
        (".5", "#### 0.50", True),
        ("18.5", "#### 18", False),
        ("no number", "#### 18", False),
        ("", "#### 0", False),
        ("18", "18", True),
    ],
)
def test_final_answers(prediction, reference, right):
    result = load("gsm8k_accuracy").compute(predictions=[prediction], references=[reference])
    assert result == {"gsm8k_accuracy": float(right)}


def test_share_of_final_answers():
    result = load("gsm8k_accuracy").compute(predictions=["1", "2", "3"], references=["#### 1", "#### 2", "#### 4"])
    assert result == {"gsm8k_accuracy": pytest.approx(2 / 3)}


def test_reference_without_a_final_answer():
    with pytest.raises(ValueError, match=r"`references\[1\]` is 'none', which has no final answer"):
        load("gsm8k_accuracy").compute(predictions=["1", "1"], references=["#### 1", "none"])


# ---- pass_at_k: values and errors

ADD = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b"]
TESTS = "assert add(2, 3) == 5"


def test_share_of_right_programs(pass_at_k):
    references = [TESTS, TESTS, ["assert add(1, 1) == 2", "assert add(1, 2) == 3"]]
    assert pass_at_k.compute(predictions=[ADD[0], ADD[1]], references=references[:2]) == {"pass_at_1": 0.5}
    assert pass_at_k.compute(predictions=[ADD[1]], references=references[2:]) == {"pass_at_1": 0.0}
    assert pass_at_k.compute(predictions=[ADD[0]], references=references[2:]) == {"pass_at_1": 1.0}


def test_several_programs_for_each_problem(pass_at_k):
    """1 of 4 and 2 of 3 right: 1 - C(n - c, k) / C(n, k), averaged."""
    right, wrong = ADD
    predictions = [[wrong, right, wrong, wrong], [right, right, wrong]]
    result = pass_at_k.compute(predictions=predictions, references=[TESTS, TESTS], k=[1, 2, 3])
    expected = {"pass_at_1": (1 / 4 + 2 / 3) / 2, "pass_at_2": (1 - 3 / 6 + 1) / 2, "pass_at_3": (1 - 1 / 4 + 1) / 2}
    assert result == pytest.approx(expected)


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_runs_nothing_unless_allowed(monkeypatch, value):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", value)
    with pytest.raises(ValueError, match='set the environment variable HF_ALLOW_CODE_EVAL to "1"'):
        load("pass_at_k").compute(predictions=ADD[:1], references=[TESTS])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": []}, r"`k` is \[\], but it must hold"),
        ({"k": [0]}, r"`k` is \[0\], but it must hold at least one number, each of them 1 or more"),
        ({"k": [1, 2]}, r"`k` is \[1, 2\], but `predictions\[0\]` has 1 programs. Generate at least 2"),
        ({"num_workers": 0}, "`num_workers` is 0, but it must be positive"),
        ({"timeout": -1.0}, "`timeout` is -1.0, but it must be positive"),
        ({"memory_gb": 0}, "`memory_gb` is 0, but it must be positive"),
        ({"references": ["assert add(2, 3"]}, r"`references\[0\]` is no Python code"),
        ({"references": ["# later"]}, r"`references\[0\]` is '# later', which tests nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(monkeypatch, changes, message):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    with pytest.raises(ValueError, match=message):
        load("pass_at_k").compute(**{"predictions": ADD[:1], "references": [TESTS], **changes})


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (
            "PR_SET_NO_NEW_PRIVS = 1, 15, 16, 22, 38",
            "PR_SET_NO_NEW_PRIVS = 1, 15, 16, 9999, 38",
            r"prctl\(9999\) failed",
        ),
        ('{"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}', "{}", "it needs 64-bit Linux"),
    ],
    ids=["no filters", "another machine"],
)
def test_runs_nothing_without_a_sandbox(tmp_path, monkeypatch, old, new, reason):
    """A kernel without filters is played by a request that no kernel knows."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    folder = tmp_path / "pass_at_k"
    shutil.copytree(METRICS / "pass_at_k", folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "sandbox.py").read_text()
    assert source.count(old) == 1
    (folder / "sandbox.py").write_text(source.replace(old, new))
    program = f"open({str(tmp_path / 'trace')!r}, 'w')"
    with pytest.raises(RuntimeError, match=f"cannot set up its sandbox here: {reason}.* it runs nothing"):
        evaluate.load(str(folder)).compute(predictions=[program], references=["assert True"])
    assert not (tmp_path / "trace").exists()


def test_sandbox_that_does_not_start(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    metric = load("pass_at_k")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="cannot set up its sandbox here: the process ended"):
        metric.compute(predictions=ADD[:1], references=[TESTS])


# ---- pass_at_k: what honest programs may do


@pytest.mark.parametrize(
    "program",
    [
        "import collections, dataclasses, hashlib, heapq, itertools, json, math, random, re, statistics, typing",
        "import numpy\nassert (numpy.ones((9, 9)) @ numpy.ones((9, 9)))[0, 0] == 9",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 3\nassert asyncio.run(f()) == 3",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)",
        "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))",
        "import sys\nprint('x' * 1000000)\nprint('y', file=sys.stderr)",
        "if __name__ == '__main__':\n    raise ValueError",
        "x = '\\u00e4\\U0001f600'\nassert len(x) == 2",
    ],
    ids=["library", "numpy", "asyncio", "dataclass", "pickle", "output", "main", "unicode"],
)
def test_honest_program(pass_at_k, program):
    assert pass_at_k.compute(predictions=[program], references=["assert True"])["pass_at_1"] == 1


# ---- pass_at_k: attacks that must count as failed

FAILED = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in a test": "import os\ndef add(a, b):\n    os._exit(0)",
    "sys.exit in a test": "def add(a, b):\n    raise SystemExit(0)",
    "kill itself": "import os\nos.kill(os.getpid(), 9)",
    "stop itself": "import os\nos.kill(os.getpid(), 19)",
    "endless loop": "while True:\n    pass",
    "endless loop that catches all": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "input": "input()",
    "memory": "x = ['x' * 10**6 for _ in range(10**6)]",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that catches all": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "syntax error": "def add(a, b:",
    "open quote": "def add(a, b): return 0\nx = '''",
    "unused quote": 'def add(a, b): return 5 if (a, b) == (2, 3) else 0\n"""',
    "guessed token": "import os\nfor i in range(3, 64):\n    try: os.write(i, bytes(32))\n    except OSError: pass\nos._exit(0)",
    "flood": "import os\nwhile True:\n    for i in range(3, 64):\n        try: os.write(i, bytes(4096))\n        except OSError: pass",
    "null": "\0",
}


@pytest.mark.parametrize("program", FAILED.values(), ids=FAILED)
def test_attack_has_failed(pass_at_k, program):
    """The honest program beside it passes."""
    result = pass_at_k.compute(
        predictions=[program, ADD[0]],
        references=[f'"""Sums."""\n{TESTS}'] * 2,
        timeout=1.0,
    )
    assert result == {"pass_at_1": 0.5}


# ---- pass_at_k: what the kernel refuses

REFUSED = {
    "network": "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "local socket": "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "process": "subprocess.run(['true'])",
    "fork": "os.fork()",
    "exec": "os.execv('/bin/true', ['true'])",
    "kill": "os.kill(os.getppid(), 0)",
    "kill group": "os.kill(0, 0)",
    "new file": "open('file', 'w')",
    "file elsewhere": "os.open({folder!r} + '/new', os.O_CREAT | os.O_WRONLY)",
    "append": "open({folder!r} + '/file', 'a')",
    "truncate": "os.truncate({folder!r} + '/file', 0)",
    "truncate on open": "os.open({folder!r} + '/file', os.O_RDONLY | os.O_TRUNC)",
    "nameless file": "os.open({folder!r}, os.O_TMPFILE | os.O_WRONLY)",
    "remove": "os.remove({folder!r} + '/file')",
    "remove tree": "shutil.rmtree({folder!r})",
    "rename": "os.rename({folder!r} + '/file', {folder!r} + '/other')",
    "new folder": "os.mkdir({folder!r} + '/sub')",
    "link": "os.symlink('/', {folder!r} + '/link')",
    "permissions": "os.chmod({folder!r} + '/file', 0)",
    "times": "os.utime({folder!r} + '/file', (0, 0))",
    "limits": "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "limits of others": "resource.prlimit(os.getppid(), resource.RLIMIT_AS)",
    "priority of others": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "owner of signals": "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "keys to a terminal": "fcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "memory without a name": "os.memfd_create('x')",
    "parent's death": "call(157, 1, 0)",
    "trace": "call(101, 16, os.getppid(), 0, 0)",
    "shared memory": "call(29, 0, 4096, 0o1600)",
    "namespaces": "call(272, 0x10000000)",
    "open of 2020": "call(437, -100, b'/', bytes(24), 24)",
    "ring": "call(425, 8, bytes(120))",
    "socket in x32": "call(0x40000000 + 41, 2, 1, 0)",
}
PREAMBLE = """
import ctypes, fcntl, os, resource, shutil, socket, subprocess, termios
def call(*arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(*map(lambda x: ctypes.c_long(x) if isinstance(x, int) else x, arguments)) == -1:
        raise OSError(ctypes.get_errno(), "")
refused = False
try:
    {attempt}
except (OSError, ValueError) as error:
    refused = type(error) is ValueError or error.errno in (1, 38)
"""


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_kernel(pass_at_k, tmp_path, name):
    attempt = REFUSED[name]
    if attempt.startswith("call(") and platform.machine() != "x86_64":
        pytest.skip("the numbers of the system calls are those of x86_64")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("kept")
    before = (folder / "file").stat()
    program = PREAMBLE.replace("{attempt}", attempt.replace("{folder!r}", repr(str(folder))))
    assert pass_at_k.compute(predictions=[program], references=["assert refused"])["pass_at_1"] == 1
    assert [path.name for path in folder.iterdir()] == ["file"]
    after = (folder / "file").stat()
    assert (after.st_size, after.st_mode, after.st_mtime) == (before.st_size, before.st_mode, before.st_mtime)


def test_no_thread(pass_at_k):
    program = "import threading\nthreading.Thread(target=print).start()"
    assert pass_at_k.compute(predictions=[program], references=["assert True"])["pass_at_1"] == 0


def test_nothing_of_the_callers_process(pass_at_k, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    program = "import os, sys\nenvironment, arguments, files = dict(os.environ), sys.argv, os.listdir('.')"
    tests = "assert not {'SECRET', 'PATH', 'HOME', 'HF_HOME'} & set(environment) and len(arguments) == 1 and not files"
    assert pass_at_k.compute(predictions=[program], references=[tests])["pass_at_1"] == 1


def test_leaves_nothing_behind(pass_at_k, tmp_path, monkeypatch):
    """No open files, no children, no folders."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    this = psutil.Process()
    before = this.num_fds()
    pass_at_k.compute(predictions=[[FAILED["sleep"], FAILED["flood"], *ADD]], references=[TESTS], timeout=0.5)
    assert (this.num_fds(), this.children(), list(tmp_path.iterdir())) == (before, [], [])
