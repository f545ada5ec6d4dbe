"""Ends of transfers in this process, a place for shared memory, and two more processes for those that need them."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.kvtransfer_harness import Receiver, Sender
from tests.integration.peer_process import PeerProcess


@pytest.fixture(scope="session")
def peers() -> Iterator[tuple[PeerProcess, PeerProcess]]:
    """Receiver and sender, say."""
    both = PeerProcess(), PeerProcess()
    yield both
    for process in both:
        process.kill()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def sender(receiver: Receiver) -> Iterator[Sender]:
    sender = Sender(receiver, 200)
    yield sender
    sender.close()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    path = (shared if shared.is_dir() else tmp_path) / f"headrace-test-{secrets.token_hex(4)}"
    yield path
    shutil.rmtree(path, ignore_errors=True)
