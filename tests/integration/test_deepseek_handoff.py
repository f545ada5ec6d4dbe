"""DeepSeek-V4 computed on one worker and answered on another: blocks travel while the prompt is computed, windows land
with the commit, and every token is that of one worker alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deepseek_checkpoints import make_prepared, v4_config, v32_config
from tests.scripted_router import SessionClient, generate_locally, hand_over, request_key, task
from tests.worker_nodes import assert_nothing_held, random_prompt, session, worker
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

ROOM = {"max_context": 1024, "kv_bytes": 24 << 20, "max_sequences": 6, "chunk_tokens": 200}
ALL_LENGTHS = range(1, 601)
SOME_LENGTHS = [1, 3, 4, 5, 8, 127, 128, 129, 132, 256, 257, 384, 513]
KINDS = {
    "raw": "float32",
    "split": "float32",
    "split of bfloat16": "bfloat16",
    "raw of fp8": "fp8",
    "split of fp8": "fp8",
}


class Workers(NamedTuple):
    """A prefill worker, a decode worker, and one that does both, for comparison."""

    prefill: SessionClient
    decode: SessionClient
    alone: SessionClient
    nodes: tuple[WorkerNode, ...]


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = v4_config(num_hidden_layers=3, compress_ratios=[0, 4, 128], index_topk=48)
    return make_prepared(config, tmp_path_factory.mktemp("v4"))


OFTEN = ("raw", "split of fp8")  # the others take part in the longer tests only


@pytest.fixture(
    scope="module",
    params=[kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def workers(v4: Path, request: pytest.FixtureRequest) -> Iterator[Workers]:
    with start(v4, request.param.split()[0], KINDS[request.param]) as started:
        yield started


class start:
    """Three workers, which must hold nothing when they stop."""

    def __init__(self, model: Path, codec: str, kv_dtype: str = "float32") -> None:
        roles = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH)
        self._nodes = [worker(model, role, codec=codec, kv_dtype=kv_dtype, **ROOM) for role in roles]

    def __enter__(self) -> Workers:
        self._started = [node.__enter__() for node in self._nodes]
        self._sessions = [session(node) for node in self._started]
        clients = [each.__enter__() for each in self._sessions]
        return Workers(*clients, tuple(self._started))

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            assert_nothing_held(*self._started)
        for each in (*self._sessions, *self._nodes):
            each.__exit__(None, None, None)


def check_handoff(workers: Workers, num_prompt: int, **sampling: object) -> None:
    work = task(random_prompt(num_prompt, num_prompt), max_tokens=6, **sampling)
    key = request_key(f"of {num_prompt}")
    hand_over(workers.prefill, workers.decode, key, work)
    [handed_over] = workers.decode.answer(key)
    [expected] = generate_locally(workers.alone, key, work)
    assert handed_over.token_ids == expected.token_ids, f"a prompt of {num_prompt} tokens"


def test_handed_over_answers_equal_local_ones(workers: Workers) -> None:
    for num_prompt in SOME_LENGTHS:
        check_handoff(workers, num_prompt)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_prompts_of_every_length_are_handed_over(workers: Workers) -> None:
    for num_prompt in ALL_LENGTHS:
        check_handoff(workers, num_prompt, temperature=0.9, seed=num_prompt)


@pytest.mark.parametrize("num_tokens", [150, pytest.param(300, marks=pytest.mark.slow)])
def test_a_long_answer_from_a_handed_over_cache(workers: Workers, num_tokens: int) -> None:
    """Across boundaries of blocks and of every compression, with guesses."""
    work = task(random_prompt(3, 250), max_tokens=num_tokens)
    key = request_key(f"long {num_tokens}")
    hand_over(workers.prefill, workers.decode, key, work)
    [handed_over], [expected] = workers.decode.answer(key), generate_locally(workers.alone, key, work)
    assert handed_over.token_ids == expected.token_ids
    assert len(expected.token_ids) == num_tokens


def test_choices_go_on_from_one_handed_over_window(workers: Workers) -> None:
    work = task(random_prompt(4, 190), max_tokens=40, n=3, temperature=1.0, seed=9)
    key = request_key("choices")
    hand_over(workers.prefill, workers.decode, key, work)
    handed_over, expected = workers.decode.answer(key, 3), generate_locally(workers.alone, key, work)
    assert [choice.token_ids for choice in handed_over] == [choice.token_ids for choice in expected]


def test_the_next_turn_sends_what_the_decode_worker_lacks(workers: Workers) -> None:
    prompt = list(random_prompt(5, 300))
    first, second = request_key("turn 1"), request_key("turn 2")
    hand_over(workers.prefill, workers.decode, first, task(prompt, max_tokens=100))
    [answer] = workers.decode.answer(first)
    turns = task([*prompt, *answer.token_ids, *random_prompt(6, 40)], max_tokens=20)
    lease = hand_over(workers.prefill, workers.decode, second, turns)
    [handed_over], [expected] = workers.decode.answer(second), generate_locally(workers.alone, second, turns)
    assert handed_over.token_ids == expected.token_ids
    assert lease.cached_tokens == 384
    finished = workers.prefill.prefill_finished(second)
    assert finished.transferred_tokens == 440 - 384
    assert finished.cached_tokens == 256  # the prompt of before, up to where it can be taken up


def test_v32_is_handed_over_as_any_paged_cache(tmp_path: Path) -> None:
    model = make_prepared(v32_config(index_topk=100), tmp_path / "v32")
    with start(model, "auto") as workers:
        for num_prompt in (1, 63, 64, 65, 200, 333):
            check_handoff(workers, num_prompt)
