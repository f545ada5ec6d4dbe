"""Three shapes of work, and what of it a cluster does in time: pure but for asking."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.prompts import distinct_prompt
from bench.replay_load import Asked, ask
from bench.report import percentile
from headrace import AsyncClient

ANSWER_TOKENS = 32
NUM_IDLE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Prompts of `shortest` to `longest` tokens, of which the first `shared_share` is the same in all. Asked
    `levels` at a time, `num_requests` at each of these levels in a round."""

    name: str
    shortest: int
    longest: int
    shared_share: float = 0.0
    levels: tuple[int, ...]
    num_requests: int

    def prompts(self, seed: int) -> Iterator[list[int]]:
        """Without end, others with each seed but for what is shared."""
        rng = random.Random(f"{self.name}/{seed}")
        shared = distinct_prompt(self.longest, random.Random(self.name).getrandbits(63))
        while True:
            length = rng.randint(self.shortest, self.longest)
            num_shared = int(self.shared_share * length)
            yield shared[:num_shared] + distinct_prompt(length - num_shared, rng.getrandbits(63))


SHAPES = (
    Shape(name="short", shortest=32, longest=64, levels=(8, 16), num_requests=64),
    Shape(name="long", shortest=1500, longest=3000, levels=(2, 3), num_requests=6),
    Shape(name="cached", shortest=1500, longest=1500, shared_share=0.9, levels=(4, 8), num_requests=32),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count: time to first token, and the mean time between its tokens, in seconds."""

    ttft_s: float
    itl_s: float

    def keeps(self, asked: Asked) -> bool:
        return asked.ttft_s <= self.ttft_s and mean_gap_s(asked) <= self.itl_s


@dataclass(slots=True)
class Seen:
    """Of one shape, cluster and level, over all rounds. `took_s`: while requests were under way."""

    asked: list[Asked] = field(default_factory=list)
    took_s: float = 0.0

    def goodput(self, limits: Limits) -> float:
        """Requests a second within the limits."""
        return sum(map(limits.keeps, self.asked)) / self.took_s


def mean_gap_s(asked: Asked) -> float:
    """Between two tokens of an answer; 0 for an answer of one."""
    return sum(asked.gaps_s) / len(asked.gaps_s) if asked.gaps_s else 0.0


def limits_of(idle: list[Asked], times_ttft: float, times_itl: float) -> Limits:
    """So many times the medians of requests that were alone."""
    return Limits(
        times_ttft * percentile([each.ttft_s for each in idle], 50),
        times_itl * percentile([mean_gap_s(each) for each in idle], 50),
    )


async def ask_alone(client: AsyncClient, shape: Shape, seed: int) -> list[Asked]:
    """One request after the other, the first ones for warmth only: caches, and what the router knows of speeds."""
    prompts = shape.prompts(seed)
    together = [ask(client, next(prompts), ANSWER_TOKENS) for _ in range(NUM_IDLE)]
    await asyncio.gather(*together)
    return [await ask(client, next(prompts), ANSWER_TOKENS) for _ in range(NUM_IDLE)]


async def ask_in_loops(client: AsyncClient, shape: Shape, level: int, seed: int, seen: Seen) -> None:
    """The shape's requests, `level` at a time: whoever has an answer asks the next."""
    prompts = shape.prompts(seed)
    left = iter([next(prompts) for _ in range(shape.num_requests)])

    async def loop() -> None:
        for prompt in left:
            seen.asked.append(await ask(client, prompt, ANSWER_TOKENS))

    began = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(level)))
    seen.took_s += time.perf_counter() - began
