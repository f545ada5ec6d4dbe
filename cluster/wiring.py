"""From a plan to what each process is told. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.placement import Node
from cluster.plan import ClusterPlan, RouterPlan, StorePlan, WorkerPlan
from cluster.profile import Profile
from cluster.profile import Tenant as TenantSection
from cluster.stores import StoreSettings, store_address
from engine.record_policy import RecordPolicy
from router.config import RouterConfig
from router.core.tenants import Tenant
from worker.config import WorkerConfig


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
    def router_addresses(self) -> tuple[str, ...]:
        """Where workers and clients reach the routers."""
        return tuple(_reached_at(router) for router in self.plan.routers)

    def router_config(self, router: RouterPlan) -> RouterConfig:
        """What a router is told."""
        profile = self.profile
        return RouterConfig(
            router_id=router.name,
            model_name=self.model_name,
            model_dir=Path(self.model),
            cluster_secret=self.cluster_secret,
            listen=_join(router.host, router.port),
            profile_name=profile.name,
            max_context=self.plan.max_context,
            policy=profile.router.policy,
            streaming=profile.router.streaming,
            fidelity=profile.kvtransfer.fidelity,
            api_keys={digest: name for name, tenant in self._tenants for digest in tenant.keys},
            tenants={name: _tenant(name, tenant) for name, tenant in self._tenants},
            slo_ttft_s=profile.router.slo.ttft if profile.router.slo else None,
            slo_itl_s=profile.router.slo.itl if profile.router.slo else None,
            queue_tokens=profile.router.queue,
            default_timeout_s=profile.router.timeout,
            resume_grace_s=profile.router.resume_grace,
        )

    @property
    def _tenants(self) -> Iterable[tuple[str, TenantSection]]:
        return (self.profile.router.tenants or {}).items()

    def store_address(self, node: Node) -> str:
        """Where workers of `node` reach its store; empty without cache tiers."""
        has_store = any(store.node == node for store in self.plan.stores)
        return store_address(self.cluster_secret) if has_store else ""

    def store_settings(self, store: StorePlan) -> StoreSettings:
        """What a node's store is told."""
        return StoreSettings(
            store_id=store.store_id,
            address=self.store_address(store.node),
            cluster_secret=self.cluster_secret,
            cpus=store.cpus,
            host_bytes=store.host_bytes,
            disk_path=store.disk_path,
            disk_bytes=store.disk_bytes,
            tenant_share=store.tenant_share,
        )

    def worker_config(self, worker: WorkerPlan) -> WorkerConfig:
        """What one worker is told."""
        tiers = self.profile.kvtransfer.tiers
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
            max_drafts=worker.max_drafts,
            itl_s=self.profile.router.slo.itl if self.profile.router.slo else None,
            set_aside_bytes=worker.set_aside_bytes,
            window_records=RecordPolicy(
                self.profile.kvtransfer.windows, self.profile.kvtransfer.windows_period
            ),
            kv_bytes=worker.kv_bytes,
            cpus=worker.cpus,
            service_cpus=worker.service_cpus,
            device=worker.device,
            routers=self.router_addresses,
            host=worker.node.address,
            direct_port=0 if self.profile.router.streaming == "direct" else None,
            fidelity=self.profile.kvtransfer.fidelity,
            codec=self.profile.kvtransfer.codec,
            store_address=self.store_address(worker.node),
            tenant_share=tiers.tenant_share if tiers is not None else 1.0,
            lease_ttl_s=self.profile.kvtransfer.lease_ttl,
        )


def _tenant(name: str, said: TenantSection) -> Tenant:
    return Tenant(
        name=name,
        weight=said.weight,
        max_concurrent=said.max_concurrent,
        tokens_per_s=said.tokens_per_s,
        burst_tokens=said.burst,
        max_priority=said.max_priority,
    )


def _reached_at(router: RouterPlan) -> str:
    host = router.node.address if router.host in ("0.0.0.0", "::") else router.host
    return _join(host, router.port)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
