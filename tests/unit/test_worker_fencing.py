"""When a worker fences itself: cut off or frozen for too long, once each time, and never before it was in touch."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.config import WorkerConfig, WorkerRole
from worker.fencing import FenceWatch, running_s

pytestmark = pytest.mark.unit

DEAD_AFTER_S = 30.0


class Bench:
    """A watch that is asked ten times a second on a clock that a test turns."""

    def __init__(self, *, has_routers: bool = True) -> None:
        self.now = 1000.0
        self.watch = FenceWatch(DEAD_AFTER_S, lambda: self.now, has_routers=has_routers)

    def run(self, seconds: float, *, in_touch: bool) -> list[str]:
        """Reasons to fence in so many seconds."""
        reasons = []
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            reasons.append(self.watch.ask(in_touch=in_touch))
        return [reason for reason in reasons if reason is not None]

    def stand_still(self, seconds: float, *, in_touch: bool) -> str | None:
        self.now += seconds
        return self.watch.ask(in_touch=in_touch)


def test_a_worker_in_touch_goes_on_for_ever() -> None:
    assert Bench().run(1000, in_touch=True) == []


def test_a_short_absence_is_forgiven_however_often() -> None:
    bench = Bench()
    for _ in range(5):
        assert bench.run(1, in_touch=True) == []
        assert bench.run(29, in_touch=False) == []


def test_a_long_absence_fences_once_and_again_only_after_contact() -> None:
    bench = Bench()
    bench.run(1, in_touch=True)
    [reason] = bench.run(300, in_touch=False)
    assert "no router had a session open for 30." in reason
    assert bench.run(1, in_touch=True) == []
    assert len(bench.run(300, in_touch=False)) == 1


def test_a_worker_that_no_router_has_dialled_yet_has_nothing_to_fence() -> None:
    assert Bench().run(300, in_touch=False) == []


def test_a_worker_without_routers_is_never_out_of_touch() -> None:
    bench = Bench(has_routers=False)
    bench.run(1, in_touch=True)
    assert bench.run(300, in_touch=False) == []


@pytest.mark.parametrize("has_routers", [True, False])
@pytest.mark.parametrize("in_touch", [True, False])
def test_a_process_that_stood_still_for_too_long_fences_whatever_its_sessions_seem_to_be(
    has_routers: bool, in_touch: bool
) -> None:
    bench = Bench(has_routers=has_routers)
    bench.run(1, in_touch=in_touch)
    assert bench.stand_still(29.9, in_touch=in_touch) is None
    reason = bench.stand_still(30.1, in_touch=in_touch)
    assert reason is not None
    assert "stood still for 30.1 s" in reason
    assert bench.run(29, in_touch=False) == []


def test_what_was_fenced_by_a_standstill_is_not_fenced_again_for_the_absence_that_follows() -> None:
    bench = Bench()
    bench.run(1, in_touch=True)
    assert bench.stand_still(31, in_touch=False) is not None
    assert bench.run(300, in_touch=False) == []


def test_the_clock_of_the_watch_only_goes_forward() -> None:
    times = [running_s() for _ in range(100)]
    assert times == sorted(times)


def test_a_worker_must_not_give_itself_up_before_it_gives_its_routers_up() -> None:
    with pytest.raises(ValueError, match=r"dead_after_s \(5\) must be longer than resume_grace_s \(10\)"):
        WorkerConfig(
            worker_id="w",
            role=WorkerRole.DECODE,
            model_dir=Path("unused"),
            cluster_secret=b"s" * 16,
            dead_after_s=5.0,
            resume_grace_s=10.0,
        )
