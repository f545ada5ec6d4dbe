"""Has the loops of placement compiled before a request needs them."""

from router.core.fleet import Demand, Identity, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.placement import PlacementState
from router.core.policies import POLICIES

_IDENTITY = Identity(weights_digest="", tokenizer_digest="", arithmetic="", layout="", handoff_major=0)


def warm_up() -> None:
    """Places a prompt on workers that nobody has: some seconds on a machine that never did, else a fraction of one."""
    state: PlacementState[int] = PlacementState(POLICIES["cost"], prefill_window_tokens=1)
    for role in (Role.PREFILL, Role.DECODE):
        facts = WorkerFacts(
            ref=WorkerRef(role.value, 1),
            role=role,
            identity=_IDENTITY,
            block_tokens=1,
            num_blocks=2,
            max_sequences=1,
            max_context=2,
            kv_address=role.value,
        )
        state.add(facts, WorkerState.SERVING)
    state.place(Demand(num_prompt_tokens=1, max_total_tokens=2), now=0.0, cached=[(1, 1)])
