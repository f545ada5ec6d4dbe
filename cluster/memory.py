"""How much memory KV blocks get, and whether it is enough and there. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.placement import Placed
from cluster.problems import KeyPath, Problem
from cluster.profile import Answering, LoadedProfile, Model, Workers
from cluster.units import format_size
from engine.cache_size import least_bytes
from engine.models.families import AnyConfig
from engine.models.layouts import cache_layout

DEFAULT_MAX_CONTEXT = 8192
_MAX_SEQUENCES, _MAX_DRAFTS = 64, 8  # as profiles have them where they say nothing
_KV_STEP_BYTES = 64 << 20
_KV_MOST_BYTES = 2 << 30
_SET_ASIDE_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of the prepared model; zeros where it is not at hand.

    Attributes:
        max_context: tokens that it was made for.
        config: what its cache is made of.
    """

    weights_bytes: int = 0
    max_context: int = 0
    config: AnyConfig | None = None

    def least_kv_bytes(self, kv_dtype: str, max_context: int) -> int:
        """What a worker's cache must have for one context."""
        if self.config is None:
            return 0
        return least_bytes(cache_layout(self.config, kv_dtype), max_context, _MAX_SEQUENCES, _MAX_DRAFTS)


@dataclass(frozen=True, slots=True)
class Numbers:
    """The model section with nothing left open.

    Attributes:
        least_kv_bytes: what one sequence of `max_context` tokens takes; 0 where the model is not at hand.
    """

    precision: str
    kv_dtype: str
    max_context: int
    least_kv_bytes: int


def settle_numbers(wanted: Model, model: ModelFacts, *, on_gpu: bool) -> Numbers:
    """Fill in what the profile leaves to the machine and to the model."""
    precision = wanted.precision
    if precision == "auto":
        precision = "bfloat16" if on_gpu else "float32"
    kv_dtype = wanted.kv_dtype
    if kv_dtype == "auto":
        kv_dtype = "float32" if precision == "float32" else "bfloat16"
    max_context = wanted.max_context or min(DEFAULT_MAX_CONTEXT, model.max_context or DEFAULT_MAX_CONTEXT)
    return Numbers(precision, kv_dtype, max_context, model.least_kv_bytes(kv_dtype, max_context))


def settle_kv_bytes(
    loaded: LoadedProfile, placed: Sequence[Placed], numbers: Numbers, model: ModelFacts
) -> dict[str, int]:
    """Of each group: what the profile says, else what fits on the smallest of its machines, and at least one
    context."""
    found = {}
    for name, group in loaded.profile.groups():
        room = min(_room(slot, placed, model) for slot in placed if slot.group == name)
        found[name] = group.kv_memory or max(room, _whole_steps(numbers.least_kv_bytes + _KV_STEP_BYTES - 1))
    return found


def settle_set_aside_bytes(workers: Workers, kv_bytes: int) -> int:
    """Of one worker, in host memory: what the profile says, else some of what its KV blocks take."""
    if not isinstance(workers, Answering):
        return 0
    return workers.set_aside_memory or min(kv_bytes // 4, _SET_ASIDE_MOST_BYTES)


def memory_problems(
    loaded: LoadedProfile,
    placed: Sequence[Placed],
    kv_bytes: Mapping[str, int],
    numbers: Numbers,
    model: ModelFacts,
) -> Iterator[Problem]:
    """What is too little for one context, or more than a machine has."""
    for name, _ in loaded.profile.groups():
        path: KeyPath = (name, "kv_memory")
        if kv_bytes[name] < numbers.least_kv_bytes:
            message = (
                f"{format_size(kv_bytes[name])} is less than one context of {numbers.max_context} tokens"
            )
            least = _whole_steps(numbers.least_kv_bytes + _KV_STEP_BYTES - 1)
            expected = f"at least {format_size(least)}, or a smaller model.max_context"
            yield loaded.problem(path, message, expected)
        gpus = [min(slot.node.gpu_memory_bytes) for slot in placed if slot.group == name and slot.gpus]
        if gpus and kv_bytes[name] + model.weights_bytes > min(gpus):
            have = format_gib(min(gpus))
            yield loaded.problem(
                path, f"{format_size(kv_bytes[name])} and the weights do not fit into a GPU with {have}"
            )
    yield from _crowded_machines(loaded, placed, kv_bytes, model)


def format_gib(size_bytes: int) -> str:
    """`23.4GiB`."""
    return f"{size_bytes / 2**30:.1f}GiB"


def _crowded_machines(
    loaded: LoadedProfile, placed: Sequence[Placed], kv_bytes: Mapping[str, int], model: ModelFacts
) -> Iterator[Problem]:
    for node in dict.fromkeys(slot.node for slot in placed if not slot.gpus):
        here = [slot for slot in placed if slot.node == node and not slot.gpus]
        groups = [slot.group for slot in here]
        tiers = loaded.profile.kvtransfer.tiers
        wanted = sum(kv_bytes[group] + model.weights_bytes for group in groups) + (tiers.host if tiers else 0)
        wanted += sum(settle_set_aside_bytes(slot.workers, kv_bytes[slot.group]) for slot in here)
        if wanted > node.memory_bytes:
            what = "KV blocks, weights and the host tier" if tiers else "KV blocks and weights"
            message = (
                f"{len(groups)} workers on {node.name} want {format_gib(wanted)} of {what}, "
                f"it has {format_gib(node.memory_bytes)}"
            )
            yield loaded.problem((max(groups, key=kv_bytes.__getitem__), "kv_memory"), message)


def _room(slot: Placed, placed: Sequence[Placed], model: ModelFacts) -> int:
    """A GPU's memory beside the weights, less a fifth for activations; on a CPU a modest share, because
    the machine has other things to do."""
    if slot.gpus:
        return _whole_steps(min(slot.node.gpu_memory_bytes) * 4 // 5 - model.weights_bytes)
    neighbours = sum(other.node == slot.node for other in placed)
    return _whole_steps(min(slot.node.memory_bytes // (4 * neighbours), _KV_MOST_BYTES))


def _whole_steps(size_bytes: int) -> int:
    return max(size_bytes // _KV_STEP_BYTES, 1) * _KV_STEP_BYTES
