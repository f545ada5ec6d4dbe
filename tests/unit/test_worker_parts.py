"""Small parts of a worker: pacing, configuration, affinity, the idle check, words on the wire."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.request import Drawn, FinishReason, Logprobs
from headrace.v1 import inference_pb2, worker_pb2
from worker.affinity import GIVE_WAY_NICE, give_way, pin_current_thread
from worker.config import WorkerConfig, WorkerRole
from worker.idle_check import IdleCheck
from worker.pacing import LandingPace
from worker.wire import (
    MalformedTask,
    check_task,
    first_tokens_from_wire,
    first_tokens_to_wire,
    sampling_params,
)

pytestmark = pytest.mark.unit

# --- pacing ------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_frames_are_spread_while_the_engine_decodes() -> None:
    clock = Clock()
    pace = LandingPace(lambda: True, bytes_per_s=1000.0, clock=clock, sleep=clock.sleep)
    for _ in range(3):
        pace(500)
    assert clock.slept == [0.5, 0.5]


def test_frames_land_at_once_while_it_does_not() -> None:
    clock = Clock()
    pace = LandingPace(lambda: False, bytes_per_s=1000.0, clock=clock, sleep=clock.sleep)
    for _ in range(3):
        pace(500)
    assert clock.slept == []


def test_a_pause_is_not_saved_up_for_a_burst() -> None:
    clock = Clock()
    pace = LandingPace(lambda: True, bytes_per_s=1000.0, clock=clock, sleep=clock.sleep)
    pace(500)
    clock.now = 100.0
    pace(500)
    pace(500)
    assert clock.slept == [0.5]


# --- configuration -----------------------------------------------------------------------------


def _config(**settings: object) -> WorkerConfig:
    defaults: dict[str, object] = {
        "worker_id": "w",
        "role": WorkerRole.BOTH,
        "model_dir": Path("model"),
        "cluster_secret": bytes(32),
    }
    return WorkerConfig(**{**defaults, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_tokens": 0},
        {"kv_bytes": -1},
        {"lease_ttl_s": 0.0},
        {"worker_id": ""},
        {"cluster_secret": b"x"},
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(wrong: dict[str, object]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"WorkerConfig.{name}"):
        _config(**wrong)


def test_a_worker_computes_with_as_many_threads_as_it_has_cores() -> None:
    assert [_config(cpus=cpus).num_threads for cpus in ((), (3,), (0, 1, 2))] == [1, 1, 3]


# --- affinity ----------------------------------------------------------------------------------

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")


@needs_affinity
def test_a_thread_is_moved_alone() -> None:
    before = os.sched_getaffinity(0)
    target = {min(before)}
    seen: list[set[int]] = []

    def run() -> None:
        pin_current_thread(target)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [target]
    assert os.sched_getaffinity(0) == before


@needs_affinity
def test_a_process_is_moved_with_threads_that_run_and_threads_to_come() -> None:
    script = """
import os, threading
from worker.affinity import pin_process
seen, go = [], threading.Event()
def look():
    go.wait()
    seen.append(os.sched_getaffinity(0))
early = threading.Thread(target=look)
early.start()
target = {max(os.sched_getaffinity(0))}
pin_process(target)
go.set()
late = threading.Thread(target=look)
late.start()
early.join(), late.join()
assert seen == [target, target], seen
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@needs_affinity
def test_a_core_that_the_machine_lacks_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match="1000"):
        pin_current_thread({1000})


def test_no_cores_leave_a_thread_where_it_is() -> None:
    before = os.sched_getaffinity(0)
    pin_current_thread(())
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_thread_gives_way_with_its_children_and_no_other() -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def run() -> None:
        give_way()
        give_way()
        look()
        child = threading.Thread(target=look)
        child.start()
        child.join()

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [max(before, GIVE_WAY_NICE)] * 2
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


# --- the idle check ----------------------------------------------------------------------------


class IdleWorker:
    """Counts that a test sets."""

    def __init__(self) -> None:
        self.private = self.pins = self.num_leases = self.num_live = self.num_requests = 0
        self.is_moving = False
        self.lock = threading.RLock()
        self.pool = SimpleNamespace(stats=lambda: SimpleNamespace(private=self.private, pins=self.pins))
        self.check = IdleCheck(self, [self], [self], lambda: self.is_moving)  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize("leak", ["private", "pins", "num_leases", "num_live"])
def test_what_is_held_without_a_request_is_a_violation_when_it_stays(
    leak: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = IdleWorker()
    setattr(worker, leak, 2)
    worker.check.run()
    assert worker.check.num_violations == 0
    worker.check.run()
    assert worker.check.num_violations == 1
    assert "holds what it should not: 2 " in caplog.text


def test_what_is_given_back_a_moment_later_is_no_violation() -> None:
    worker = IdleWorker()
    for private in (1, 0, 1, 0):
        worker.private = private
        worker.check.run()
    assert worker.check.num_violations == 0


def test_what_a_request_holds_is_no_violation() -> None:
    worker = IdleWorker()
    worker.private, worker.pins, worker.num_requests = 3, 2, 1
    for _ in range(3):
        worker.check.run()
    assert worker.check.num_violations == 0


def test_what_is_served_or_written_back_is_no_violation_until_that_ends() -> None:
    worker = IdleWorker()
    worker.pins, worker.is_moving = 2, True
    for _ in range(3):
        worker.check.run()
    assert worker.check.num_violations == 0
    worker.is_moving = False
    worker.check.run()
    worker.check.run()
    assert worker.check.num_violations == 1


# --- words on the wire -------------------------------------------------------------------------


def test_first_tokens_survive_the_wire() -> None:
    first = [
        Drawn(5, Logprobs(-0.5, ((5, -0.5), (9, -1.5))), None),
        Drawn(6, None, FinishReason.STOP),
        Drawn(7, Logprobs(-2.0, ()), FinishReason.LENGTH),
    ]
    wire = first_tokens_to_wire(first)
    assert first_tokens_from_wire(wire) == first
    assert first_tokens_from_wire(list(reversed(wire))) == first


def test_fields_left_out_take_the_contracts_defaults() -> None:
    params = sampling_params(worker_pb2.GenerationTask(sampling=inference_pb2.SamplingParams(max_tokens=3)))
    assert (params.temperature, params.top_p, params.repetition_penalty) == (1.0, 1.0, 1.0)
    assert (params.top_k, params.min_p, params.presence_penalty, params.frequency_penalty) == (0, 0, 0, 0)
    assert (params.max_tokens, params.n, params.logprobs) == (3, 1, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_token_ids": []},
        {"prompt_token_ids": [7, 300]},
        {"prompt_token_ids": [1] * 64},
        {"sampling": inference_pb2.SamplingParams(max_tokens=0)},
        {"sampling": inference_pb2.SamplingParams(max_tokens=1, n=9)},
        {"fidelity": "perfect"},
    ],
)
def test_a_task_that_no_worker_can_run_is_refused(wrong: dict[str, object]) -> None:
    engine = SimpleNamespace(max_context=64, max_sequences=8, config=SimpleNamespace(vocab_size=300))
    good: dict[str, object] = {
        "prompt_token_ids": [7, 299],
        "sampling": inference_pb2.SamplingParams(max_tokens=1),
        "fidelity": "near",
    }
    check_task(worker_pb2.GenerationTask(**good), engine)  # type: ignore[arg-type]
    with pytest.raises(MalformedTask):
        check_task(worker_pb2.GenerationTask(**{**good, **wrong}), engine)  # type: ignore[arg-type]


def test_zero_is_not_the_same_as_left_out() -> None:
    wire = inference_pb2.SamplingParams(temperature=0.0, logprobs=0, max_tokens=1)
    params = sampling_params(worker_pb2.GenerationTask(sampling=wire))
    assert (params.temperature, params.logprobs) == (0.0, 0)


def test_every_field_reaches_the_engine() -> None:
    wire = inference_pb2.SamplingParams(
        temperature=0.5,
        top_k=4,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={9: 1.0, 3: -2.0},
        min_tokens=2,
        max_tokens=8,
        seed=2**64 - 1,
        stop_token_ids=[1, 2],
        ignore_eos=True,
        logprobs=3,
        n=4,
    )
    params = sampling_params(worker_pb2.GenerationTask(sampling=wire, eos_token_ids=[7]))
    assert params.logit_bias == ((3, -2.0), (9, 1.0))
    assert (params.stop_token_ids, params.eos_token_ids) == ({1, 2}, {7})
    assert (params.seed, params.n, params.logprobs, params.ignore_eos) == (2**64 - 1, 4, 3, True)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 4, 0.5, 0.25)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (params.min_tokens, params.max_tokens) == (2, 8)
