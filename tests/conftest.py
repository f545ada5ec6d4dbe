"""Fixtures of every layer: the demo model, and a real cluster that e2e and chaos tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch import down, up
from cluster.model_store import ModelStoreError, resolve
from cluster.profile import parse_profile
from headrace import Client

MODEL = "smollm2-135m-instruct"
PROFILE = """
version: 1
name: test-laptop
model: {path: smollm2-135m-instruct, max_context: 4096}
prefill: {replicas: 1, kv_memory: 1GiB}
decode: {replicas: 1, kv_memory: 2GiB}
router: {grpc: "127.0.0.1:0", policy: least-loaded}  # every prompt is handed over, short ones too
"""
LAYERS = {"unit", "integration", "e2e", "chaos"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of no layer would be run by nobody."""
    homeless = [item.nodeid for item in items if not LAYERS & {mark.name for mark in item.iter_markers()}]
    if homeless:
        raise pytest.UsageError(f"no mark says to which layer it belongs: {homeless[0]}, of {len(homeless)}")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The prepared demo model."""
    try:
        return resolve(MODEL)
    except ModelStoreError as error:
        pytest.fail(f"{error}; `make model` prepares it")


@pytest.fixture(scope="session")
def laptop_address(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The router of a 1P1D cluster on a Ray of its own, for the whole session."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(smollm2_dir.parent)
    state = up(parse_profile(PROFILE, "tests/conftest.py"), home=home)
    try:
        yield state.router_address
    finally:
        down(home=home)


@pytest.fixture
def laptop_client(laptop_address: str) -> Iterator[Client]:
    """A client of that cluster."""
    with Client(laptop_address) as client:
        yield client
