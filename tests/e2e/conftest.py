"""Clusters of a tiny random model, driven through the `headrace` command as a person would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.state import ClusterState, read_state, run_directory
from tests import waiting
from tests.tiny_model import make_tiny_model

COMMAND_TIMEOUT_S = 180.0
PATIENCE_S = 90.0
HEAD = "version: 1\nname: tiny\nmodel: {path: tiny}\n"
# By cost, short prompts would not be handed over.
SPLIT = HEAD + (
    "router: {grpc: '127.0.0.1:0', policy: least-loaded}\n"
    "prefill: {kv_memory: 64MiB}\ndecode: {kv_memory: 64MiB}\n"
)
COLOCATED = HEAD + "router: {grpc: '127.0.0.1:0'}\ncolocated: {kv_memory: 64MiB}\n"


@dataclass(frozen=True, slots=True)
class Home:
    """A HEADRACE_HOME of its own, and the command in it."""

    path: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`headrace ARGUMENTS`, to its end."""
        command = Path(sys.executable).with_name("headrace")
        environment = {**os.environ, "HEADRACE_HOME": str(self.path), "COLUMNS": "200"}
        return subprocess.run(
            [str(command), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def up(self, profile: str) -> subprocess.CompletedProcess[str]:
        """`headrace up` of a profile's text."""
        file = self.path / "profile.yaml"
        file.write_text(profile, encoding="utf-8")
        return self.run("up", str(file))

    def state(self) -> ClusterState:
        """What `up` remembered."""
        state = read_state(run_directory(self.path))
        assert state is not None
        return state

    def workers(self) -> dict[str, dict[str, Any]]:
        """By id, what `headrace status --json` says of the workers that are connected."""
        answer = self.run("status", "--json")
        workers = json.loads(answer.stdout)["workers"] if answer.returncode == 0 else []
        return {worker["hello"]["worker_id"]: worker for worker in workers if worker["connected"]}

    def generate(self, prompt: str) -> subprocess.CompletedProcess[str]:
        """A greedy answer."""
        return self.run("generate", prompt, "--temperature", "0", "--max-tokens", "12")


@pytest.fixture
def smollm2_home(smollm2_dir: Path, tmp_path: Path) -> Iterator[Home]:
    """With the real model; what was brought up is taken down."""
    (tmp_path / "models").symlink_to(smollm2_dir.parent)
    home = Home(tmp_path)
    try:
        yield home
    finally:
        home.run("down")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home with the tiny model in it; what is up in it at the end is taken down."""
    yield from _home(tmp_path)


@pytest.fixture(scope="module")
def split_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """One prefill and one decode worker of the tiny model, up for the module's tests."""
    for home in _home(tmp_path_factory.mktemp("split")):
        started = home.up(SPLIT)
        assert started.returncode == 0, started.stderr
        yield home


def _home(path: Path) -> Iterator[Home]:
    make_tiny_model(path / "models" / "tiny")
    home = Home(path)
    try:
        yield home
    finally:
        home.run("down")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition` holds; fails the test where it does not in time."""
    waiting.wait_until(condition, what, patience_s=PATIENCE_S, poll_s=0.2)
