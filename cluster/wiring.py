"""From a plan to what each process is told. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.plan import ClusterPlan, WorkerPlan
from cluster.profile import Profile
from router.config import RouterConfig
from worker.config import WorkerConfig

BUILT_POLICY = "least-loaded"
"""What every policy of a profile stands for so far; `plan` notes it where the profile says another."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """A plan with what only a launch knows.

    Attributes:
        model: the model's name in the store of each node, or a directory that each node has.
        model_name: what clients call it.
    """

    profile: Profile
    plan: ClusterPlan
    model: str
    model_name: str
    cluster_secret: bytes

    @property
    def router_address(self) -> str:
        """Where workers and clients reach the router."""
        router = self.plan.router
        host = router.node.address if router.host in ("0.0.0.0", "::") else router.host
        return _join(host, router.port)

    def router_config(self) -> RouterConfig:
        """What the router is told."""
        profile, router = self.profile, self.plan.router
        return RouterConfig(
            router_id="router-0",
            model_name=self.model_name,
            model_dir=Path(self.model),
            cluster_secret=self.cluster_secret,
            listen=_join(router.host, router.port),
            profile_name=profile.name,
            max_context=self.plan.max_context,
            policy=BUILT_POLICY,
            fidelity="exact",
            queue_tokens=profile.router.queue,
            default_timeout_s=profile.router.timeout,
            resume_grace_s=profile.router.resume_grace,
        )

    def worker_config(self, worker: WorkerPlan) -> WorkerConfig:
        """What one worker is told."""
        return WorkerConfig(
            worker_id=worker.worker_id,
            role=worker.role,
            model_dir=Path(self.model),
            cluster_secret=self.cluster_secret,
            precision=self.plan.precision,
            kv_dtype=self.plan.kv_dtype,
            max_context=self.plan.max_context,
            chunk_tokens=worker.chunk_tokens,
            max_sequences=worker.max_sequences,
            kv_bytes=worker.kv_bytes,
            cpus=worker.cpus,
            service_cpus=worker.service_cpus,
            device=worker.device,
            routers=(self.router_address,),
            host=worker.node.address,
            fidelity="exact",
            codec="raw",
            lease_ttl_s=self.profile.kvtransfer.lease_ttl,
        )


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
