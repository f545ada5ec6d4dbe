"""Drives an Engine as a worker would, without one: reserves, submits, steps, collects, releases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.events import SequenceFailed, TokenDrawn
from engine.request import FinishReason, Logprobs, SamplingParams

ROOT_KEY = b"tests"


@dataclass
class Outcome:
    """One choice's answer."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs | None] = field(default_factory=list)
    finish: FinishReason | None = None
    failure: str | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.failure is not None


class Driver:
    """Requests by number; `outcomes[number][choice]` fills as steps are taken."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outcomes: dict[int, list[Outcome]] = {}
        self.cached_tokens: dict[int, int] = {}
        self.num_drafts = self.num_drafts_kept = self.num_prefill_tokens = 0

    def start(self, number: int, prompt: Sequence[int], sampling: SamplingParams) -> bool:
        """False where the engine has no room now."""
        lease_id = number.to_bytes(16, "little")
        cached = self.engine.reserve(lease_id, prompt, sampling.n, ROOT_KEY)
        if cached is None:
            return False
        self.cached_tokens[number] = cached
        self.engine.submit(lease_id, prompt, sampling, prefill_only=False)
        self.outcomes[number] = [Outcome() for _ in range(sampling.n)]
        return True

    def step(self) -> None:
        """One step; requests whose choices have all ended are released."""
        result = self.engine.step()
        self.num_drafts += result.num_drafts
        self.num_drafts_kept += result.num_drafts_kept
        self.num_prefill_tokens += result.num_prefill_tokens
        for event in result.events:
            number = int.from_bytes(event.lease_id, "little")
            outcomes = self.outcomes[number]
            if isinstance(event, TokenDrawn):
                outcome = outcomes[event.choice]
                assert event.index == len(outcome.token_ids)
                outcome.token_ids.append(event.drawn.token_id)
                outcome.logprobs.append(event.drawn.logprobs)
                outcome.finish = event.drawn.finish
            elif isinstance(event, SequenceFailed):
                for outcome in outcomes if event.choice is None else [outcomes[event.choice]]:
                    outcome.failure = event.cause
            if all(outcome.ended for outcome in outcomes):
                self.engine.release(event.lease_id)

    def run(self) -> None:
        """Step until everything started has ended."""
        while self.engine.has_work():
            self.step()


def answer(engine: Engine, prompt: Sequence[int], sampling: SamplingParams) -> list[Outcome]:
    """One request alone."""
    driver = Driver(engine)
    assert driver.start(0, prompt, sampling)
    driver.run()
    return driver.outcomes[0]
