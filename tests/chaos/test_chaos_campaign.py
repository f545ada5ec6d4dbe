"""`headrace bench chaos` in its short form: a tiny model on real processes, a few faults, answers token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bench.chaos import Campaign, conduct, report
from bench.chaos_cluster import ClusterSizes
from bench.chaos_load import LoadSizes
from bench.chaos_plan import Limits, Pace
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

SEED = 20
MAX_CONTEXT = 1024
MUST_BE_ZERO = (
    "lost_tokens", "duplicated_tokens", "different_tokens", "different_texts", "different_finishes",
    "different_logprobs", "failed_requests", "overdue_requests", "leaked_leases", "leaked_blocks",
    "idle_violations", "crashes",
)  # fmt: skip


def test_a_short_campaign_loses_repeats_and_changes_nothing(tmp_path: Path) -> None:
    campaign = Campaign(
        seed=SEED,
        num_faults=8,
        cluster=ClusterSizes(
            model_dir=make_tiny_model(tmp_path / "tiny", max_context=MAX_CONTEXT),
            model_name="tiny",
            max_context=MAX_CONTEXT,
            kv_bytes=16 << 20,
            host_bytes=16 << 20,
            disk_bytes=64 << 20,
        ),
        load=LoadSizes(longest_prompt=600, longest_answer=150, num_conversations=6),
        limits=Limits(
            link_grace_s=1.0, resume_grace_s=1.5, dead_after_s=2.5, lease_ttl_s=2.0, client_grace_s=3.0
        ),
        pace=Pace(shortest_gap_s=0.4, longest_gap_s=1.5, longest_fault_s=4.0),
        num_clients=4,
        keep=tmp_path / "cluster",
    )
    found = report(campaign, conduct(campaign, Console(stderr=True)))
    assert found.metrics["faults"] == 8
    assert found.metrics["requests"] > 8
    assert {name: found.metrics[name] for name in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0), found.notes
