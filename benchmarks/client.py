"""The other end of a worker process: start it, ask it, tell why it died."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from benchmarks.protocol import Parameters

LIMIT_S = 600.0
"""Longest wait for an answer, seconds."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


class WorkerError(RuntimeError):
    """A worker gave no answer, or one that says why it cannot."""


class Worker:
    """A worker process, started and warmed up; a context manager that ends it.

    Attributes:
        ready: Its first answer: what it measured, or the tasks that it can be timed at.
        settle_s: Pause before each sample, seconds.

    Args:
        suite: Name of the suite.
        parameters: Parameters of the arm.
        threads: Threads that it computes with.
        sample_s: Least duration of a sample, seconds.
        settle_s: Pause before each sample, seconds.

    Raises:
        WorkerError: It died before it was ready.
    """

    def __init__(
        self,
        suite: str,
        parameters: Parameters,
        threads: int,
        sample_s: float = 0.005,
        settle_s: float = 0.0,
    ) -> None:
        request = {
            "suite": suite,
            "parameters": dict(parameters),
            "threads": threads,
            "sample_s": sample_s,
        }
        self.settle_s = settle_s
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **pinned(threads)},
            text=True,
        )
        try:
            self.ready = self._answer()
        except WorkerError:
            self.close()
            raise

    def time(self, task: str) -> float:
        """Return seconds per call of one sample of a task.

        Args:
            task: Its name.

        Returns:
            Seconds per call.

        Raises:
            WorkerError: The worker died of it.
        """
        time.sleep(self.settle_s)
        with suppress(BrokenPipeError):  # it is dead already; no answer will say so
            print(task, file=self._process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        reason: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        too_late = threading.Timer(LIMIT_S, self._process.kill)
        too_late.start()
        try:
            line = self._process.stdout.readline() if self._process.stdout else ""
        finally:
            too_late.cancel()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        if code < 0 or not lines:
            return f"the process ended with code {code}"
        return lines[-1]


def pinned(threads: int) -> dict[str, str]:
    """Return the environment that holds every library to a number of threads.

    Args:
        threads: The number.

    Returns:
        Variables by name. Inductor compiles in the worker itself, so that no process of its
        own stays behind.
    """
    return {**dict.fromkeys(THREAD_VARIABLES, str(threads)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
