"""A process that is made to be killed, stopped and spoken to, and that is started again whenever it ends."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.plan import MALLOC_ENVIRONMENT

START_TIMEOUT_S = 180.0
RESTART_PAUSE_S = 0.5
ANSWER_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
MAX_FALSE_STARTS = 3


class Member:
    """One process, started again whenever it ends."""

    def __init__(
        self, name: str, settings: Any, directory: Path, heard: Callable[[dict[str, Any]], None]
    ) -> None:
        self.name = name
        self.num_crashes = 0
        """Ends that nobody asked for."""
        self.ready = asyncio.Event()
        self._file = directory / f"{name}.pickle"
        self._log = directory / f"{name}.log"
        self._heard = heard
        self._process: asyncio.subprocess.Process | None = None
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._commands = asyncio.Lock()
        self._is_killed = False
        self._is_stopping = False
        self._num_false_starts = 0
        self.is_frozen = False
        self._task: asyncio.Task[None] | None = None
        self._file.touch(mode=0o600)
        self._file.write_bytes(pickle.dumps(settings))

    def start(self) -> None:
        """Begin, and go on until `stop`."""
        self._task = asyncio.create_task(self._keep_running(), name=self.name)

    async def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises ClusterError where it does not come up in time, or ends again and again before it is."""
        give_up_at = time.monotonic() + timeout_s
        while not self.ready.is_set():
            if time.monotonic() > give_up_at or self._num_false_starts > MAX_FALSE_STARTS:
                raise ClusterError(f"{self.name} does not come up; its log is {self._log}")
            await asyncio.sleep(POLL_S)

    async def kill(self) -> None:
        """At once, whatever it does, also frozen."""
        self._is_killed = True
        self.ready.clear()
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Until `wake`."""
        self.is_frozen = True
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Nothing where it is not frozen."""
        if self.is_frozen:
            self.is_frozen = False
            self._signal(signal.SIGCONT)

    async def command(self, **what: Any) -> dict[str, Any]:
        """Its answer; empty where it ended meanwhile. Raises ClusterError where it does not answer."""
        async with self._commands:
            process = self._process
            if process is None or process.stdin is None or not self.ready.is_set():
                return {}
            answer = asyncio.create_task(self._answers.get())
            ended = asyncio.create_task(process.wait())
            try:
                process.stdin.write(json.dumps(what).encode() + b"\n")
                await asyncio.wait(
                    {answer, ended}, timeout=ANSWER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
                )
                if answer.done():
                    return answer.result()
                if ended.done():
                    return {}
                raise ClusterError(
                    f"{self.name} did not answer {what} in {ANSWER_TIMEOUT_S:g} s; see {self._log}"
                )
            except ConnectionError:
                return {}
            finally:
                answer.cancel()
                ended.cancel()

    async def stop(self) -> None:
        """In order, or else at once."""
        self._is_stopping = True
        self.wake()
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            self._signal(signal.SIGKILL)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_running(self) -> None:
        while not self._is_stopping:
            await self._run_once()
            is_false_start = not self.ready.is_set() and not self._is_killed
            self._num_false_starts = self._num_false_starts + 1 if is_false_start else 0
            self.ready.clear()
            self.is_frozen = False
            if not self._is_killed and not self._is_stopping:
                self.num_crashes += 1
            self._is_killed = False
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _run_once(self) -> None:
        with self._log.open("ab") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.chaos_process", str(self._file),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                env=os.environ | MALLOC_ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        try:
            assert process.stdout is not None
            while line := await process.stdout.readline():
                self._hear(json.loads(line))
            await process.wait()
        finally:
            self._signal(signal.SIGKILL)

    def _hear(self, said: dict[str, Any]) -> None:
        if "answer" in said:
            self._answers.put_nowait(said["answer"])
            return
        if said.get("ready"):
            # Answers to commands of the process before must not pass for this one's.
            self._answers = asyncio.Queue()
            self.ready.set()
        self._heard(said)

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(number)
