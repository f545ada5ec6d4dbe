"""One channel for each incarnation of a decode worker, closed when nobody needs it."""

from __future__ import annotations

import pytest

from prefill.channels import PeerChannels

pytestmark = pytest.mark.unit


class Channel:
    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = False

    def close(self) -> None:
        self.closed = True


def _channels(max_idle: int = 2) -> PeerChannels:
    return PeerChannels(max_idle, Channel)  # type: ignore[arg-type]


def test_a_channel_is_shared_by_the_prompts_that_go_to_one_peer() -> None:
    channels = _channels()
    assert channels.acquire("a:1", 1) is channels.acquire("a:1", 1)
    assert channels.acquire("a:1", 1) is not channels.acquire("b:1", 1)


def test_an_idle_channel_stays_for_the_next_prompt() -> None:
    channels = _channels()
    channel = channels.acquire("a:1", 1)
    channels.release("a:1", 1)
    assert channels.acquire("a:1", 1) is channel


def test_the_channel_to_an_older_incarnation_is_closed_once_it_is_not_used() -> None:
    channels = _channels()
    old = channels.acquire("a:1", 1)
    new = channels.acquire("a:1", 2)
    assert (old.closed, new.closed) == (False, False)
    channels.release("a:1", 1)
    assert (old.closed, new.closed) == (True, False)


def test_a_channel_that_failed_is_not_used_again() -> None:
    channels = _channels()
    broken = channels.acquire("a:1", 1)
    channels.release("a:1", 1, failed=True)
    assert broken.closed
    assert channels.acquire("a:1", 1) is not broken


def test_a_channel_that_failed_under_one_prompt_stays_for_the_other_that_uses_it() -> None:
    channels = _channels()
    shared = channels.acquire("a:1", 1)
    channels.acquire("a:1", 1)
    channels.release("a:1", 1, failed=True)
    assert not shared.closed
    channels.release("a:1", 1)
    assert shared.closed


def test_the_longest_idle_channels_are_closed_first() -> None:
    channels = _channels(max_idle=2)
    opened = {}
    for name in "abc":
        opened[name] = channels.acquire(f"{name}:1", 1)
        channels.release(f"{name}:1", 1)
    assert [opened[name].closed for name in "abc"] == [True, False, False]


def test_closing_closes_every_channel() -> None:
    channels = _channels()
    opened = [channels.acquire("a:1", 1), channels.acquire("b:1", 1)]
    channels.close()
    assert all(channel.closed for channel in opened)
