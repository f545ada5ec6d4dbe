"""What a worker says of itself: its identity, its hello and its reports, read from the engine's numbers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from engine.engine import Engine
from headrace.v1 import worker_pb2
from kvtransfer.layouts import CacheLayout
from kvtransfer.load_speeds import LoadSpeeds
from kvtransfer.transports.seam import HANDOFF_MAJOR
from worker.config import WorkerConfig, WorkerRole
from worker.engine_thread import EngineCounters
from worker.prefix_sources import pushes_to

PROTOCOL_VERSION = 1
MANIFEST_FILE = "headrace.json"
MAX_REPORTED_LINKS = 64

_ROLES = {
    WorkerRole.PREFILL: worker_pb2.ROLE_PREFILL,
    WorkerRole.DECODE: worker_pb2.ROLE_DECODE,
    WorkerRole.BOTH: worker_pb2.ROLE_BOTH,
}


class ModelDirectoryError(ValueError):
    """A directory that is not a prepared model; the message names it and says how to prepare one."""


def worker_identity(engine: Engine, model_dir: Path) -> worker_pb2.Identity:
    """What must be equal for two workers to hand a sequence over (design §3.6).

    Raises ModelDirectoryError where the directory's manifest cannot be read.
    """
    manifest = _manifest(model_dir)
    return worker_pb2.Identity(
        weights_digest=manifest["weights_digest"],
        tokenizer_digest=manifest["tokenizer_digest"],
        arithmetic=engine.arithmetic,
        layout=f"{engine.layout.identity()}-{engine.layout.block_tokens}",
        handoff_major=HANDOFF_MAJOR,
    )


def identity_digest(identity: worker_pb2.Identity) -> str:
    """One string that is equal where the identities are: block keys begin with it."""
    parts = (
        identity.weights_digest,
        identity.tokenizer_digest,
        identity.arithmetic,
        identity.layout,
        str(identity.handoff_major),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def worker_hello(
    config: WorkerConfig,
    engine: Engine,
    epoch: int,
    identity: worker_pb2.Identity,
    kv_address: str,
    state: worker_pb2.WorkerState,
    direct_address: str = "",
) -> worker_pb2.WorkerHello:
    """What a router hears first."""
    return worker_pb2.WorkerHello(
        worker_id=config.worker_id,
        epoch=epoch,
        role=_ROLES[config.role],
        state=state,
        identity=identity,
        kv_address=kv_address,
        block_tokens=engine.layout.block_tokens,
        num_blocks=engine.pool.num_blocks,
        max_sequences=engine.max_sequences,
        max_context=engine.max_context,
        invariant=engine.invariant,
        pid=os.getpid(),
        cpus=config.cpus,
        protocol_version=PROTOCOL_VERSION,
        vocab_size=engine.config.vocab_size,
        key_identity=identity_digest(identity),
        kv_bytes_per_token=bytes_per_token(engine.layout),
        direct_address=direct_address,
    )


def worker_report(
    engine: Engine,
    counters: EngineCounters,
    state: worker_pb2.WorkerState,
    num_leases: int,
    refused_stale: int,
    kv: worker_pb2.KvReport,
    speeds: LoadSpeeds,
) -> worker_pb2.WorkerReport:
    """Load and room of now."""
    with engine.lock:
        pool = engine.pool.stats()
        scheduler = engine.scheduler
        return worker_pb2.WorkerReport(
            state=state,
            running_sequences=scheduler.num_running,
            waiting_sequences=scheduler.num_waiting,
            queued_prefill_tokens=scheduler.queued_prefill_tokens,
            free_blocks=pool.available,
            private_blocks=pool.private,
            cached_blocks=pool.cached,
            pins=pool.pins,
            leases=num_leases,
            step_s=counters.decode_step_s,
            first_row_s=scheduler.pace.answers_s(1),
            row_s=scheduler.pace.row_s,
            refused_stale=refused_stale,
            preemptions=scheduler.num_preemptions,
            steps=counters.steps,
            kv=kv,
            drafts=counters.drafts,
            drafts_kept=counters.drafts_kept,
            prefill_s_per_token=speeds.prefill_s_per_token or 0.0,
            links=link_speeds(speeds),
        )


def bytes_per_token(layout: CacheLayout) -> int:
    """What a long sequence's cache grows by with each token; windows do not grow."""
    long = 1 << 16
    return -(-(layout.num_bytes(2 * long) - layout.num_bytes(long)) // long)


def link_speeds(speeds: LoadSpeeds) -> list[worker_pb2.LinkSpeed]:
    """What pushes to other workers have taken lately; those used last, where there are many."""
    prefix = pushes_to("")
    pushes = [each for each in speeds.measured() if each.source.startswith(prefix)]
    return [
        worker_pb2.LinkSpeed(
            kv_address=each.source.removeprefix(prefix), bytes_per_s=each.bytes_per_s, fixed_s=each.fixed_s
        )
        for each in pushes[:MAX_REPORTED_LINKS]
    ]


def _manifest(model_dir: Path) -> dict[str, Any]:
    path = model_dir / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
        return {key: str(manifest[key]) for key in ("weights_digest", "tokenizer_digest")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelDirectoryError(
            f"{path}: not the manifest of a prepared model ({type(error).__name__}: {error}); "
            "`headrace model prepare` makes one"
        ) from error
