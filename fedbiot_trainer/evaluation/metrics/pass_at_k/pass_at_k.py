"""pass@k of generated Python programs, each run in a sandbox."""

import ast
import contextlib
import json
import math
import os
import secrets
import select
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import evaluate

from .sandbox import READY, TOKEN_BYTES


_DESCRIPTION = """
Share of programming problems that at least one of k generated programs solves (pass@k), as the unbiased estimate of Chen
et al. (2021) from n >= k programs for each problem. A program solves a problem if the problem's tests run after it, in the
same module, and end without an error.

This runs programs that a model wrote and nobody has read. It refuses to, unless the environment has HF_ALLOW_CODE_EVAL=1.

What a program cannot do: Each runs in a fresh Python (`-I`) with an empty folder as its working directory, no input, and
nothing of the caller's environment. The kernel (a seccomp filter, on Linux on x86_64 and aarch64) refuses it sockets,
processes, threads, writing, deleting or renaming files, and signals to others; limits bound its wall time, CPU time and
memory. A program that exits early, fills the memory, never ends or forks without end has failed, and the next is not
affected. Where the kernel has no such filter, nothing is run.

What it can do: read any file that the caller can read, although it has nowhere to send what it reads, and use up to the
limits. The tests run in the process of the program: one written to deceive just this metric, by searching the process for
the end of the pipe that holds the proof of completion or by changing what the tests call, can pass. The kernel itself is
trusted. For programs of people who mean harm, use a virtual machine.
"""

_CITATION = """
@article{chen2021codex,
  title = {Evaluating Large Language Models Trained on Code},
  author = {Chen, Mark and Tworek, Jerry and Jun, Heewoo and Yuan, Qiming and Pinto, Henrique Ponde de Oliveira and
    others},
  journal = {arXiv preprint arXiv:2107.03374},
  year = {2021}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]` or `list[list[str]]`):
        A program for each problem, or several. With several, every problem has at least `max(k)`.
    references (`list[str]` or `list[list[str]]`):
        The tests of each problem: Python code that raises an error if the program is wrong, whole or in pieces (lines).
        It must not exit.
    k (`list[int]`, *optional*, defaults to `[1]`):
        Which pass@k to compute.
    num_workers (`int`, *optional*, defaults to `4`):
        Programs that run at a time.
    timeout (`float`, *optional*, defaults to `3.0`):
        Seconds (wall time) for a program with its tests.
    memory_gb (`float`, *optional*, defaults to `1.0`):
        Address space of a program, in GB.

Returns:
    `dict[str, float]`: `pass_at_1` and so on for each k, from 0 to 1.

Raises:
    ValueError: If HF_ALLOW_CODE_EVAL is not 1, an argument is out of range, tests are empty or no Python, or there are too
        few programs.
    RuntimeError: If this machine cannot run a sandbox.

Examples:
    >>> os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    >>> metric = evaluate.load("fedbiot_trainer/evaluation/metrics/pass_at_k")
    >>> programs = [["def add(a, b):\\n    return a * b", "def add(a, b):\\n    return a + b"]]
    >>> metric.compute(predictions=programs, references=["assert add(2, 3) == 5"], k=[1, 2])
    {'pass_at_1': 0.5, 'pass_at_2': 1.0}
"""

_WARNING = """\
`pass_at_k` would run Python programs that a model wrote and that nobody has read. They run in a sandbox without network,
processes and write access, with limits on time and memory, but they can read this machine's files, and no sandbox is free
of gaps. If that is fine on this machine, set the environment variable HF_ALLOW_CODE_EVAL to "1"."""


def run_program(program: str, tests: str, timeout: float, memory_bytes: int, folder: str) -> bool:
    """
    Run a program and its tests in the sandbox.

    Args:
        program (`str`): Python code.
        tests (`str`): Python code to run after it, in the same module.
        timeout (`float`): Seconds for both, from when the sandbox stands.
        memory_bytes (`int`): Address space of the process.
        folder (`str`): Working directory.

    Returns:
        `bool`: Whether both ended without an error.

    Raises:
        RuntimeError: If the sandbox cannot be set up. The program has not been started then.
    """
    with contextlib.ExitStack() as opened:
        # What nobody in the process can guess: it lies in a pipe that is read when the tests have ended.
        secret = secrets.token_bytes(TOKEN_BYTES)
        token, token_end = os.pipe()
        opened.callback(os.close, token)
        with os.fdopen(token_end, "wb") as pipe:
            pipe.write(secret)
        report, report_end = os.pipe()
        opened.callback(os.close, report)
        request = opened.enter_context(tempfile.TemporaryFile("w+"))
        json.dump(
            {
                "program": program, "tests": tests, "seconds": timeout, "memory_bytes": memory_bytes,
                "report": report_end, "token": token,
            },
            request,
        )  # fmt: skip
        request.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("sandbox.py"))],
                stdin=request,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(report_end, token),
                cwd=folder,
                env={"OMP_NUM_THREADS": "1"},  # there are no threads; a BLAS that starts some on import would fail
                start_new_session=True,
            )
        finally:
            os.close(report_end)
        opened.callback(process.wait)
        opened.callback(process.kill)

        if os.read(report, 1) != READY:
            reason = os.read(report, 4096).decode() or "the process ended"
            raise RuntimeError(
                f"`pass_at_k` cannot set up its sandbox here: {reason}. Without one it runs nothing. Use a machine (or "
                "container settings) with seccomp filters."
            )
        poll = select.poll()
        poll.register(report, select.POLLIN)
        return bool(poll.poll(1000 * timeout)) and os.read(report, TOKEN_BYTES + 1) == secret


def estimate(num_programs: int, num_right: int, k: int) -> float:
    """Chance that at least one of `k` programs drawn from `num_programs` is right (Chen et al., equation 1)."""
    return 1 - math.comb(num_programs - num_right, k) / math.comb(num_programs, k)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PassAtK(evaluate.Metric):
    def _info(self):
        text, texts = datasets.Value("string"), datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": predictions, "references": references})
                for predictions in (text, texts)
                for references in (text, texts)
            ],
            reference_urls=["https://arxiv.org/abs/2107.03374"],
        )

    def _compute(self, predictions, references, k=(1,), num_workers=4, timeout=3.0, memory_gb=1.0):
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError(_WARNING)
        programs = [[one] if isinstance(one, str) else one for one in predictions]
        tests = ["\n".join([one] if isinstance(one, str) else one) for one in references]
        _check(programs, tests, k, num_workers, timeout, memory_gb)

        memory_bytes = int(memory_gb * 1e9)
        rows = [row for row, of_problem in enumerate(programs) for _ in of_problem]
        right = [0] * len(programs)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num_workers) as workers:
            passed = workers.map(
                lambda row, program: run_program(program, tests[row], timeout, memory_bytes, folder),
                rows,
                (program for of_problem in programs for program in of_problem),
            )
            for row, is_right in zip(rows, passed, strict=True):
                right[row] += is_right
        return {
            f"pass_at_{n}": sum(estimate(len(p), r, n) for p, r in zip(programs, right, strict=True)) / len(programs)
            for n in k
        }


def _check(programs, tests, k, num_workers, timeout, memory_gb):
    for name, value in (("num_workers", num_workers), ("timeout", timeout), ("memory_gb", memory_gb)):
        if value <= 0:
            raise ValueError(f"`{name}` is {value}, but it must be positive.")
    if not k or min(k) < 1:
        raise ValueError(f"`k` is {list(k)}, but it must hold at least one number, each of them 1 or more.")
    if not programs:
        raise ValueError("`predictions` is empty, so there is no share to take. Pass at least one.")
    for row, of_problem in enumerate(programs):
        if len(of_problem) < max(k):
            raise ValueError(
                f"`k` is {list(k)}, but `predictions[{row}]` has {len(of_problem)} programs. Generate at least "
                f"{max(k)} for each problem, or ask for a smaller k."
            )
    for row, code in enumerate(tests):
        try:
            statements = ast.parse(code).body
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"`references[{row}]` is no Python code ({error}), so it cannot test a program."
            ) from error
        if not statements:
            raise ValueError(
                f"`references[{row}]` is {code!r}, which tests nothing: any program would pass. Pass the problem's tests."
            )
