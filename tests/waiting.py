"""Waiting for what another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


def wait_until(
    condition: Callable[[], object],
    what: str = "the condition",
    *,
    patience_s: float = 10.0,
    poll_s: float = 0.01,
) -> None:
    """Returns once `condition` holds; fails the test, naming `what`, where it does not in time."""
    give_up_at = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > give_up_at:
            pytest.fail(f"waited {patience_s:g} s in vain: {what}")
        time.sleep(poll_s)
