"""llama.cpp by itself, measured by its own interpreter: `python llama_cpp_process.py WANTED`, one JSON object.

Imports nothing of Headrace. Prints seconds as one JSON object (`measure`).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

RUNS, STEPS = 3, 40
BATCH_TOKENS = 512
LONG_TOKENS = 1024  # prompts of more take most of a minute: once is enough


class Context:
    """A model, with a cache for several answers."""

    def __init__(self, file: str, num_threads: int, num_sequences: int, num_tokens: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it
        llama_cpp.llama_log_set(self._log, None)
        of_model = llama_cpp.llama_model_default_params()
        # Its AMX products fault on weights of this kind (0.3.36); on a processor without AMX nothing is lost.
        of_model.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), of_model)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = num_tokens, num_sequences, True
        options.n_batch = options.n_ubatch = BATCH_TOKENS
        options.n_threads = options.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"{file} could not be opened")
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def clear(self) -> None:
        """Forget every answer."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def read(self, prompt: list[int], sequence: int) -> None:
        """A whole prompt, up to the scores of its next token."""
        for first in range(0, len(prompt), BATCH_TOKENS):
            part = prompt[first : first + BATCH_TOKENS]
            last = len(prompt) - 1
            self.step((t, first + i, sequence, first + i == last) for i, t in enumerate(part))

    def step(self, rows: Iterable[tuple[int, int, int, bool]]) -> None:
        """token, position, sequence, whether its scores are wanted"""
        batch: Any = self._batch
        batch.n_tokens = 0
        for token, position, sequence, scored in rows:
            i = batch.n_tokens
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, scored
            batch.n_tokens += 1
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode says {status}")
        self._api.llama_synchronize(self._context)


def measure(wanted: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each prompt and of a step of each number of answers, in the order in which they are wanted."""
    prompt_tokens, streams = wanted["prompt_tokens"], wanted["streams"]
    room = max([*wanted["prompts"], max(streams) * (prompt_tokens + STEPS)]) + BATCH_TOKENS
    context = Context(wanted["file"], wanted["num_threads"], max(streams), room)
    context.read(_prompt(64, 0), 0)
    return {
        "prefill_s": [_prefill_s(context, num_tokens) for num_tokens in wanted["prompts"]],
        "step_s": [_step_s(context, num_streams, prompt_tokens) for num_streams in streams],
    }


def _prefill_s(context: Context, num_tokens: int) -> float:
    runs = []
    for seed in range(RUNS if num_tokens <= LONG_TOKENS else 1):
        context.clear()
        began = time.perf_counter()
        context.read(_prompt(num_tokens, seed), 0)
        runs.append(time.perf_counter() - began)
    return statistics.median(runs)


def _step_s(context: Context, num_streams: int, prompt_tokens: int) -> float:
    context.clear()
    for sequence in range(num_streams):
        context.read(_prompt(prompt_tokens, sequence), sequence)
    taken = []
    for step in range(STEPS):
        began = time.perf_counter()
        context.step((1_000 + step, prompt_tokens + step, each, True) for each in range(num_streams))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _prompt(num_tokens: int, seed: int) -> list[int]:
    return [1_000 + (i * 7 + seed * 1_009) % 40_000 for i in range(num_tokens)]


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))  # noqa: T201
