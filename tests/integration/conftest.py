"""Two more processes, started when the first test needs them and shared by all that do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.peer_process import PeerProcess


@pytest.fixture(scope="session")
def peers() -> Iterator[tuple[PeerProcess, PeerProcess]]:
    """Receiver and sender, say."""
    both = PeerProcess(), PeerProcess()
    yield both
    for process in both:
        process.kill()
