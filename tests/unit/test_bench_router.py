"""The pure parts of `headrace bench router`: what it compares, what it checks, and the fleets it places on."""

from __future__ import annotations

import json
import sys
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.report import BenchReport
from bench.router import added_ttft, medians
from bench.router_load import AnswerCheck, Load, Prompts
from bench.router_placement import NUM_PROMPTS, Fleet, PlacementTimes, measure
from bench.router_report import RouterReport
from bench.router_settings import BLOCK_TOKENS, NUM_BYTES_PER_PROMPT, new_secret
from bench.router_steps import StepClock
from bench.router_worker import KEY_IDENTITY, MockCache
from cluster.cli import main
from headrace.v1 import inference_pb2 as pb
from router.core.index_feed import KeyScheme
from router.core.tenants import DEFAULT_TENANT
from router.prompt_keys import KeyRoots, PromptKeys

pytestmark = pytest.mark.unit


def delta(first_index: int, num_tokens: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(first_index=first_index, token_ids=range(num_tokens)))


DONE = pb.GenerateResponse(done=pb.Done())


# --- answers ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_a_whole_answer_passes_however_it_is_cut(parts: list[int]) -> None:
    check = AnswerCheck(sum(parts))
    check.take(pb.GenerateResponse(accepted=pb.Accepted()))
    for part in parts:
        assert check.take(delta(check.num_tokens, part)) == part
    check.take(DONE)
    check.end()


@pytest.mark.parametrize("first_index", [0, 1, 3])
def test_a_token_that_is_missing_or_comes_twice_is_found(first_index: int) -> None:
    check = AnswerCheck(8)
    check.take(delta(0, 2))
    with pytest.raises(RuntimeError, match=f"token {first_index} came where 2 was due"):
        check.take(delta(first_index, 2))


@pytest.mark.parametrize(
    "messages", [[delta(0, 3), DONE], [delta(0, 5), DONE], [delta(0, 4)]], ids=["short", "long", "cut"]
)
def test_an_answer_that_ends_elsewhere_is_found(messages: list[pb.GenerateResponse]) -> None:
    check = AnswerCheck(4)
    for message in messages:
        check.take(message)
    with pytest.raises(RuntimeError, match="of 4 tokens"):
        check.end()


@pytest.mark.parametrize("wrong", [{}, {"concurrency": 1, "rate": 1.0}, {"concurrency": 1, "num_tokens": 0}])
def test_a_load_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"a load has|at least one token"):
        Load(**({"target": "routed", "num_tokens": 1} | wrong))  # type: ignore[arg-type]


def test_prompts_have_their_size_and_do_not_begin_alike() -> None:
    prompts = Prompts()
    texts = [prompts.next() for _ in range(100)]
    assert {len(text.encode()) for text in texts} == {NUM_BYTES_PER_PROMPT}
    assert len({text[:16] for text in texts}) == 100


def test_a_step_takes_no_negative_time() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        StepClock().set_pace(-0.1)


# --- mock workers ----------------------------------------------------------------------------------------


def test_a_mock_worker_names_blocks_as_the_router_does() -> None:
    secret = new_secret()
    cache, token_ids = MockCache(secret), list(range(4 * BLOCK_TOKENS + 1))
    cache.take(token_ids)
    keys = PromptKeys(KeyRoots(secret), DEFAULT_TENANT, token_ids).keys(KeyScheme(KEY_IDENTITY, BLOCK_TOKENS))
    assert len(keys) == 4
    assert set(cache.journal.keys()) == set(keys)


def test_a_mock_worker_finds_what_a_prompt_shares_with_earlier_ones() -> None:
    cache = MockCache(new_secret())
    first = list(range(3 * BLOCK_TOKENS))
    assert cache.take(first) == 0
    assert cache.take(first) == 2 * BLOCK_TOKENS  # one token at least is left to compute
    assert cache.take([*first[:BLOCK_TOKENS], *reversed(first)]) == BLOCK_TOKENS


@given(st.lists(st.integers(0, 30), max_size=60))
def test_a_mock_worker_caches_no_more_than_its_bound(beginnings: list[int]) -> None:
    cache = MockCache(new_secret(), max_blocks=5)
    for beginning in beginnings:
        cache.take([beginning] * (2 * BLOCK_TOKENS))
        assert cache.journal.num_blocks <= 5


# --- placement -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [2, 10])
def test_a_fleet_indexes_as_many_blocks_as_asked_for(num_workers: int) -> None:
    assert Fleet(num_workers, num_blocks=20_000).num_indexed == 20_000


def test_every_prompt_finds_a_place_and_is_timed() -> None:
    times = PlacementTimes()
    Fleet(4, num_blocks=20_000).place(NUM_PROMPTS + 5, times)
    assert [len(each) for each in (times.hash_s, times.match_s, times.place_s)] == [NUM_PROMPTS + 5] * 3


def test_one_worker_is_no_fleet() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Fleet(1)


def test_warming_up_is_not_counted() -> None:
    assert len(measure(4, 20, num_blocks=1000).place_s) == 20


def test_placement_is_the_index_and_the_choice_together() -> None:
    times = PlacementTimes(hash_s=[1.0], match_s=[1e-6, 2e-6, 3e-6], place_s=[10e-6, 20e-6, 30e-6])
    metrics = times.metrics(100)
    assert metrics["placement_us_100"] == pytest.approx(22)
    assert metrics["placement_p99_us_100"] == pytest.approx(32.78)
    assert metrics["index_match_us_100"] == pytest.approx(2)


# --- figures ---------------------------------------------------------------------------------------------


def test_what_the_router_adds_is_a_difference_in_milliseconds() -> None:
    added = added_ttft(16, [0.001, 0.002, 0.003], [0.002, 0.005, 0.009])
    assert added["added_ttft_p50_ms_c16"] == pytest.approx(3.0)
    assert added["added_ttft_p99_ms_c16"] == pytest.approx(5.94)


def test_repeats_become_medians() -> None:
    assert medians([{"a": 1, "b": 5}, {"a": 9}, {"a": 2}]) == {"a": 2, "b": 5}


def test_peers_stand_beside_the_figures_and_not_among_them() -> None:
    report = RouterReport(BenchReport("router", {"cpu_s_per_1k_requests": 1.5, "hashing_us": 100.0}))
    printed = StringIO()
    report.show(Console(file=printed, width=200))
    line = next(line for line in printed.getvalue().splitlines() if "cpu_s_per_1k_requests" in line)
    assert "1.500" in line
    assert "vllm-router 0.94" in line
    assert json.loads(report.to_json())["metrics"] == {"cpu_s_per_1k_requests": 1.5, "hashing_us": 100.0}


def test_only_this_benchmark_has_a_quick_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["headrace", "bench", "codecs", "--quick"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "codecs has one length" in capsys.readouterr().err
