"""A trace's slice and its scaling keep who shares what with whom; an infinite cache is exact to the block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.replay_trace import MAX_TURNS, Trace, TraceRequest, infinite_hits, read_trace, scaled, slice_of

pytestmark = pytest.mark.unit


def lines(path: Path, *rows: tuple[int, int, int, list[int]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n\n")
    return path


def session(path: Path, scope: str, *rows: dict[str, Any]) -> None:
    path.write_text(json.dumps({"block_size": 64, "hash_id_scope": scope, "requests": list(rows)}))


def turn(t: float, num_tokens: int, ids: list[int]) -> dict[str, Any]:
    return {"t": t, "in": num_tokens, "out": 7, "hash_ids": ids, "type": "n"}


def trace_of(*requests: tuple[float, int, tuple[int, ...], str], block_tokens: int = 512) -> Trace:
    return Trace(
        tuple(TraceRequest(at, n, 90, tuple(("", b) for b in ids), who) for at, n, ids, who in requests),
        block_tokens,
    )


def common_tokens(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


# --- reading ---------------------------------------------------------------------------------------------


def test_lines_are_read_by_time_and_a_beginning_that_all_have_makes_no_conversation(tmp_path: Path) -> None:
    rows = [(1000 * number, 1024, 5, [0, 100 + number // 2]) for number in range(8)]
    trace = read_trace(lines(tmp_path / "trace.jsonl", *reversed(rows)))
    assert [request.at_s for request in trace.requests] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert trace.block_tokens == 512
    # Among eight requests nothing that two have is rare, so each conversation is named by its last block.
    assert [request.session for request in trace.requests] == [
        "100",
        "100",
        "101",
        "101",
        "102",
        "102",
        "103",
        "103",
    ]


def test_sessions_have_ids_of_their_own_unless_their_scope_is_global(tmp_path: Path) -> None:
    session(tmp_path / "a.json", "local", turn(0, 128, [1, 2]))
    session(tmp_path / "b.json", "local", turn(1, 128, [1, 2]))
    local = read_trace(tmp_path)
    assert local.block_tokens == 64
    assert local.requests[0].blocks != local.requests[1].blocks
    session(tmp_path / "a.json", "global", turn(0, 128, [1, 2]))
    session(tmp_path / "b.json", "global", turn(1, 128, [1, 2]))
    both = read_trace(tmp_path).requests
    assert both[0].blocks == both[1].blocks
    assert [request.session for request in both] == ["a", "b"]


def test_a_sub_agent_is_a_conversation_of_its_own(tmp_path: Path) -> None:
    sub_agent = {"type": "subagent", "requests": [turn(2, 64, [9])]}
    session(tmp_path / "a.json", "local", turn(0, 64, [1]), sub_agent, turn(3, 128, [1, 2]))
    assert [r.session for r in read_trace(tmp_path / "a.json").requests] == ["a", "a-1", "a"]


@pytest.mark.parametrize("content", ["{", '{"timestamp": 1}', "[1]", ""])
def test_what_is_no_trace_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    for name in ("trace.jsonl", "trace.json"):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(ValueError, match=name):
            read_trace(path)


def test_sessions_of_several_block_sizes_are_refused(tmp_path: Path) -> None:
    session(tmp_path / "a.json", "local", turn(0, 64, [1]))
    (tmp_path / "b.json").write_text(json.dumps({"block_size": 32, "requests": [turn(0, 64, [1])]}))
    with pytest.raises(ValueError, match=r"\[32, 64\]"):
        read_trace(tmp_path)


# --- a slice ---------------------------------------------------------------------------------------------


def test_a_slice_has_whole_conversations_of_several_turns_by_time() -> None:
    requests = [(float(10 * t + s), 512, (s,), f"s{s}") for s in range(9) for t in range(1 + s % 3)]
    trace = trace_of(*sorted(requests))
    for seed in range(5):
        chosen = slice_of(trace, 6, 512, seed).requests
        assert [r.at_s for r in chosen] == sorted(r.at_s for r in chosen)
        assert len(chosen) == 6
        names = {r.session for r in chosen}
        assert not names & {"s0", "s3", "s6"}, "they have one turn"
    assert slice_of(trace, 6, 512, 0) == slice_of(trace, 6, 512, 0)
    assert len({slice_of(trace, 6, 512, seed) for seed in range(5)}) > 1


def test_a_slice_has_the_beginnings_of_long_conversations() -> None:
    turns = [(float(number), 512 + number, (1,), "a") for number in range(40)]
    assert slice_of(trace_of(*turns), 100, 1000, 0).requests == trace_of(*turns[:MAX_TURNS]).requests
    assert slice_of(trace_of(*turns), 100, 514, 0).requests == trace_of(*turns[:3]).requests


@given(num_requests=st.integers(1, 30), num_parts=st.integers(1, 30))
def test_parts_follow_one_another_and_each_begins_at_once(num_requests: int, num_parts: int) -> None:
    replay = scaled(trace_of(*((float(n), 512, (n,), "a") for n in range(num_requests))), 1, 1)
    if num_parts > num_requests:
        with pytest.raises(ValueError, match="cannot be cut"):
            replay.parts(num_parts)
        return
    parts = replay.parts(num_parts)
    assert len(parts) <= num_parts
    assert [r.prompt for part in parts for r in part.requests] == [r.prompt for r in replay.requests]
    assert all([r.at_s for r in part.requests] == list(range(len(part.requests))) for part in parts)


def test_a_trace_of_single_requests_has_no_slice() -> None:
    long = trace_of((0, 512, (1,), "a"), (1, 513, (1,), "a"))
    with pytest.raises(ValueError, match="two turns of at most 512 tokens"):
        slice_of(long, 2, 512, 0)
    assert slice_of(long, 2, 513, 0) == long
    with pytest.raises(ValueError, match="two turns"):
        slice_of(trace_of((0, 512, (1,), "a"), (1, 512, (2,), "b")), 2, 512, 0)


# --- scaling ---------------------------------------------------------------------------------------------


def test_lengths_are_divided_and_times_are_not() -> None:
    trace = trace_of((5, 4096, tuple(range(8)), "a"), (8, 601, (0, 9), "a"), (9, 2, (10,), "b"))
    replay = scaled(trace, 4, 10)
    assert [len(request.prompt) for request in replay.requests] == [1024, 150, 1]
    assert [request.at_s for request in replay.requests] == [0, 3, 4]
    assert [request.answer_tokens for request in replay.requests] == [10, 10, 10]
    assert [request.answer_tokens for request in scaled(trace, 16, 10).requests] == [5, 5, 5]
    assert replay.span_s == 4
    for factor in (0, 3, 1024):
        with pytest.raises(ValueError, match=f"cannot be divided by {factor}"):
            scaled(trace, factor, 10)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=6), st.integers(0, 4)
)
def test_prompts_have_in_common_what_their_blocks_have(all_ids: list[list[int]], halvings: int) -> None:
    # An id names a prefix: the same number behind another beginning is another block.
    prefixes = [tuple(hash(tuple(ids[: end + 1])) for end in range(len(ids))) for ids in all_ids]
    trace = trace_of(*((0.0, 64 * len(ids), ids, "s") for ids in prefixes), block_tokens=64)
    replay = scaled(trace, 1 << halvings, 10)
    block_tokens = 64 // replay.factor
    for ids, request in zip(prefixes, replay.requests, strict=True):
        assert len(request.prompt) == len(ids) * block_tokens
        for others, other in zip(prefixes, replay.requests, strict=True):
            in_common = common_tokens(ids, others)
            found = common_tokens(request.prompt, other.prompt) // block_tokens
            assert found == in_common


def test_what_no_block_names_is_a_requests_own() -> None:
    replay = scaled(trace_of((0, 1000, (1,), "a"), (1, 1000, (1,), "b")), 1, 10)
    one, other = (request.prompt for request in replay.requests)
    assert len(one) == len(other) == 1000
    assert common_tokens(one, other) in range(512, 515)


# --- an infinite cache -----------------------------------------------------------------------------------


def test_the_first_of_each_beginning_computes_it_and_one_token_is_always_left() -> None:
    prompt = list(range(10))
    assert infinite_hits([prompt, prompt, prompt[:8], prompt[:9], [*prompt[:4], 99, *prompt[5:]]], 4) == [
        0,
        8,
        4,
        8,
        4,
    ]


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), max_size=8), st.integers(1, 4))
def test_hits_are_those_of_a_cache_of_whole_prefixes(prompts: list[list[int]], block_tokens: int) -> None:
    cached: set[tuple[int, ...]] = set()
    for prompt, hit in zip(prompts, infinite_hits(prompts, block_tokens), strict=True):
        ends = range(block_tokens, max(len(prompt), 1), block_tokens)
        assert hit == max((end for end in ends if tuple(prompt[:end]) in cached), default=0)
        cached |= {tuple(prompt[:end]) for end in range(block_tokens, len(prompt) + 1, block_tokens)}
