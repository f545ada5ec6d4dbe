"""Traces of real requests: read, cut to a slice of whole conversations, and scaled to what a small model can be asked.

A trace names the blocks of each prompt by ids; two prompts that begin with the same ids begin alike. Lengths are
divided by one factor, so that a trace's block becomes some tokens, drawn by its id: who shares what with whom stays
as it was. Two formats: lines of JSON as Mooncake publishes them (Qin et al., Mooncake, FAST 2025: `timestamp` in ms,
`input_length`, `output_length`, `hash_ids` of 512 tokens each), and one JSON object per session with `block_size` and
`requests` (`t` in seconds, `in`, `out`, `hash_ids`), alone or as a directory of them. Pure but for reading the files.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from bench.prompts import distinct_prompt

MOONCAKE_BLOCK_TOKENS = 512
COMMON_SHARE = 0.01
"""A block that more of all requests have than this is a service's own beginning, and makes no conversation."""
MIN_TURNS = 2
MAX_TURNS = 16
"""Of one conversation, so that a slice has many of them."""

BlockId = tuple[str, int]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace, in the trace's own tokens. `at_s`: from the trace's beginning."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[BlockId, ...]
    session: str


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by time, and how many tokens one of their blocks has."""

    requests: tuple[TraceRequest, ...]
    block_tokens: int


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """One request to be asked. `at_s`: from the slice's beginning, in the trace's own time."""

    at_s: float
    prompt: tuple[int, ...]
    answer_tokens: int
    session: str


@dataclass(frozen=True, slots=True)
class Replay:
    """A slice that fits a model. Lengths are the trace's, divided by `factor`."""

    requests: tuple[ReplayRequest, ...]
    factor: int

    @property
    def span_s(self) -> float:
        """From the first request to the last, in the trace's own time."""
        return self.requests[-1].at_s

    def parts(self, num_parts: int) -> list[Replay]:
        """One after the other, of as many requests each as can be; each begins at 0 s.

        Raises:
            ValueError: there are fewer requests than parts.
        """
        size = -(-len(self.requests) // num_parts)
        if not 1 <= num_parts <= len(self.requests):
            raise ValueError(f"{len(self.requests)} requests cannot be cut into {num_parts} parts")
        cuts = [self.requests[start : start + size] for start in range(0, len(self.requests), size)]
        return [
            Replay(tuple(replace(each, at_s=each.at_s - cut[0].at_s) for each in cut), self.factor)
            for cut in cuts
        ]


def read_trace(path: Path) -> Trace:
    """A trace's requests, by time.

    Raises:
        ValueError: the file is not of a format that is known, or has no requests.
        OSError: it cannot be read.
    """
    try:
        if path.is_dir():
            parts = [_read_session(file) for file in sorted(path.glob("*.json"))]
        else:
            parts = [_read_lines(path) if path.suffix == ".jsonl" else _read_session(path)]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__} {error}; expected lines with timestamp, input_length, "
            "output_length and hash_ids, or a JSON object with block_size and requests"
        ) from error
    requests = sorted((request for part in parts for request in part.requests), key=lambda r: r.at_s)
    sizes = {part.block_tokens for part in parts}
    if not requests or len(sizes) != 1:
        raise ValueError(
            f"{path}: {len(requests)} requests with blocks of {sorted(sizes)} tokens; one size, please"
        )
    return Trace(tuple(requests), sizes.pop())


def _read_lines(path: Path) -> Trace:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    having = Counter(block for row in rows for block in set(row["hash_ids"]))
    most = max(1.0, COMMON_SHARE * len(rows))
    requests = []
    for row in rows:
        ids = row["hash_ids"]
        own = next((block for block in ids if having[block] <= most), ids[-1] if ids else 0)
        requests.append(
            TraceRequest(
                row["timestamp"] / 1e3,
                row["input_length"],
                row["output_length"],
                tuple(("", block) for block in ids),
                str(own),
            )
        )
    return Trace(tuple(requests), MOONCAKE_BLOCK_TOKENS)


def _read_session(path: Path) -> Trace:
    session = json.loads(path.read_text(encoding="utf-8"))
    scope = "" if session.get("hash_id_scope") == "global" else path.stem
    requests = [
        TraceRequest(
            row["t"], row["in"], row["out"], tuple((scope, block) for block in row["hash_ids"]), name
        )
        for name, row in _session_rows(path.stem, session["requests"])
    ]
    return Trace(tuple(requests), session["block_size"])


def _session_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Requests with the name of whose conversation they are: a sub-agent has one of its own."""
    for number, row in enumerate(rows):
        if "hash_ids" in row:
            yield name, row
        elif "requests" in row:
            yield from _session_rows(f"{name}-{number}", row["requests"])


def slice_of(trace: Trace, num_requests: int, longest_prompt: int, seed: int) -> Trace:
    """The first turns, `MIN_TURNS` to `MAX_TURNS`, of conversations drawn by `seed` until they have `num_requests`, by
    time. A conversation ends before a prompt of more than `longest_prompt` tokens.

    A busy service's next hundred requests belong to a hundred conversations and share nothing; a share of its
    conversations over a longer time keeps what they share.

    Raises:
        ValueError: the trace has no such conversation.
    """
    sessions: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in trace.requests:
        sessions[request.session].append(request)
    beginnings = [
        list(takewhile(lambda turn: turn.prompt_tokens <= longest_prompt, turns[:MAX_TURNS]))
        for turns in sessions.values()
    ]
    several = [turns for turns in beginnings if len(turns) >= MIN_TURNS]
    if not several:
        raise ValueError(
            f"no conversation in the trace begins with two turns of at most {longest_prompt} tokens: there is "
            "nothing to find in a cache"
        )
    random.Random(seed).shuffle(several)
    chosen: list[TraceRequest] = []
    for turns in several:
        if len(chosen) >= num_requests:
            break
        chosen += turns[: num_requests - len(chosen)]
    return Trace(tuple(sorted(chosen, key=lambda request: request.at_s)), trace.block_tokens)


def scaled(trace: Trace, factor: int, longest_answer: int) -> Replay:
    """Lengths divided by `factor`; answers are cut at `longest_answer` tokens.

    Raises:
        ValueError: a block of the trace is not a whole number of tokens then.
    """
    if factor < 1 or trace.block_tokens % factor:
        raise ValueError(
            f"blocks of {trace.block_tokens} tokens cannot be divided by {factor}; take a divisor of their size"
        )
    block_tokens = trace.block_tokens // factor
    began_s = trace.requests[0].at_s
    return Replay(
        tuple(
            ReplayRequest(
                request.at_s - began_s,
                _content(request, block_tokens, factor),
                min(longest_answer, max(1, request.answer_tokens // factor)),
                request.session,
            )
            for request in trace.requests
        ),
        factor,
    )


def _content(request: TraceRequest, block_tokens: int, factor: int) -> tuple[int, ...]:
    """As many tokens as the scaled length says, and at least one; what no block names is the request's own."""
    num_tokens = max(1, request.prompt_tokens // factor)
    tokens: list[int] = []
    for scope, number in request.blocks:
        tokens += distinct_prompt(block_tokens, random.Random(f"{scope}/{number}").getrandbits(63))
    if len(tokens) < num_tokens:
        own = random.Random(f"{request.session}/{request.at_s}/{num_tokens}").getrandbits(63)
        tokens += distinct_prompt(num_tokens - len(tokens), own)
    return tuple(tokens[:num_tokens])


def infinite_hits(prompts: Sequence[Sequence[int]], block_tokens: int) -> list[int]:
    """Of prompts in the order in which they were asked: how many tokens of each one worker with an infinite cache
    would not compute.

    Exact to the block, and one token is always left to compute, as in every worker. Answers are not in it: a trace's
    next prompt holds the trace's answer, not the model's.
    """
    known: set[int] = set()
    hits = []
    for prompt in prompts:
        keys, key = [], 0
        for end in range(block_tokens, len(prompt) + 1, block_tokens):
            key = hash((key, tuple(prompt[end - block_tokens : end])))
            keys.append(key)
        num_found = next((number for number, key in enumerate(keys) if key not in known), len(keys))
        known.update(keys)
        hits.append(min(num_found, (len(prompt) - 1) // block_tokens) * block_tokens)
    return hits
