"""When Ray's GCS is started again, and whose GCS is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ClusterError
from cluster.gcs_keeper import RETRY_S, GcsCommand, Restarts, main

pytestmark = pytest.mark.unit

LOOKS = st.lists(st.tuples(st.floats(0.0, 3.0), st.booleans()), max_size=60)
"""Seconds since the look before, and whether the GCS is gone then."""


@given(LOOKS)
def test_a_gcs_that_is_gone_is_started_at_once_and_one_that_does_not_stay_only_now_and_then(
    looks: list[tuple[float, bool]],
) -> None:
    restarts, now, last_start_s = Restarts(), 1000.0, None
    for since_s, is_gone in looks:
        now += since_s
        may_start = last_start_s is None or now >= last_start_s + RETRY_S
        assert restarts.is_due(is_gone=is_gone, now=now) == (is_gone and may_start)
        if is_gone and may_start:
            last_start_s = now


@pytest.mark.parametrize(
    ("arguments", "environment", "is_durable"),
    [
        (("gcs_server",), {}, False),
        (("gcs_server", "--redis_address=10.0.0.1"), {}, True),
        (("gcs_server",), {"RAY_gcs_storage": "rocksdb"}, True),
        (("gcs_server",), {"RAY_gcs_storage": "memory"}, False),
    ],
)
def test_tables_last_in_redis_and_in_files(
    arguments: tuple[str, ...], environment: dict[str, str], is_durable: bool
) -> None:
    assert GcsCommand(arguments, environment).is_durable is is_durable


def test_a_gcs_names_its_head() -> None:
    assert GcsCommand(("gcs_server", "--node-id=ab12"), {}).node_id == "ab12"
    with pytest.raises(ClusterError, match="--node-id"):
        GcsCommand(("gcs_server",), {}).node_id  # noqa: B018


@pytest.mark.parametrize("arguments", [(), ("x",), ("1", "2")])
def test_a_wrong_call_says_what_is_expected(
    arguments: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments) == 2
    assert "usage" in caplog.text


def test_no_ray_at_the_port_is_said(unused_tcp_port: int, caplog: pytest.LogCaptureFixture) -> None:
    assert main((str(unused_tcp_port),)) == 1
    assert f"port {unused_tcp_port}" in caplog.text
