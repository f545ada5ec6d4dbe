"""What a benchmark may be measured beside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from bench.llama_cpp import LlamaCpp
from bench.vllm_server import served
from cluster.errors import ClusterError


class Peer(Protocol):
    """Another system with the same model on the same cores, in the metrics of `headrace bench engine`."""

    def measure(
        self, prompts: tuple[int, ...], streams: tuple[int, ...], prompt_tokens: int
    ) -> dict[str, float]:
        """Prefill of prompts of each length, and steps of so many answers to prompts of `prompt_tokens`."""
        ...

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        """It gets no processor meanwhile."""
        ...


VLLM, LLAMA_CPP = "vllm", "llama-cpp"


def asked(compare: str, known: tuple[str, ...]) -> tuple[str, Path]:
    """The peer and the environment in `PEER=PATH`. Raises ClusterError for a peer that is not known."""
    name, _, where = compare.partition("=")
    if name not in known or not where:
        ways = " or ".join(f"{each}=PATH" for each in known)
        raise ClusterError(f"--compare {compare}: {ways}, a virtual environment with that peer in it")
    return name, Path(where)


@contextlib.contextmanager
def there(name: str, environment: Path, model_dir: Path) -> Iterator[Peer]:
    """A peer that can be measured. Raises ClusterError where it does not start."""
    if name == VLLM:
        with served(environment, model_dir) as server:
            yield server
    else:
        yield LlamaCpp(environment)
