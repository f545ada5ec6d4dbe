"""A worker announces itself until its routers have a session with it, also after they start anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from headrace.v1 import cluster_pb2, cluster_pb2_grpc
from kvtransfer.cluster_token import cluster_metadata
from tests.scripted_router import SessionClient
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import PATIENCE_S, SECRET, worker
from worker.config import WorkerRole

pytestmark = pytest.mark.integration


class Registry(cluster_pb2_grpc.ClusterServicer):
    """A router's Cluster service that dials whoever registers, or does not."""

    def __init__(self, epoch: int, dials: bool = True) -> None:
        self.epoch = epoch
        self.dials = dials
        self.registered: list[cluster_pb2.RegisterRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.client: SessionClient | None = None
        self._news = threading.Condition()

    def Register(
        self, request: cluster_pb2.RegisterRequest, context: grpc.ServicerContext
    ) -> cluster_pb2.RegisterResponse:
        with self._news:
            self.registered.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            if self.dials and self.client is None:
                self.client = SessionClient(request.address, SECRET, "router", self.epoch)
            self._news.notify_all()
        return cluster_pb2.RegisterResponse(
            router_id="router", router_epoch=self.epoch, connected=self.client is not None
        )

    def wait_for(self, num_registrations: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.registered) >= num_registrations, PATIENCE_S)


@contextmanager
def serving(registry: Registry, port: int = 0) -> Iterator[int]:
    server = grpc.server(futures.ThreadPoolExecutor(2), options=(("grpc.so_reuseport", 0),))
    cluster_pb2_grpc.add_ClusterServicer_to_server(registry, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield port
    finally:
        if registry.client is not None:
            registry.client.close()
        server.stop(0).wait()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_worker_says_who_and_where_it_is_and_proves_it(model_dir: Path) -> None:
    registry = Registry(epoch=1)
    with (
        serving(registry) as port,
        worker(model_dir, WorkerRole.DECODE, routers=(f"127.0.0.1:{port}",)) as node,
    ):
        registry.wait_for(1)
        assert registry.client is not None
        assert registry.client.hello().epoch == node.epoch
        [first, *_] = registry.registered
        assert (first.worker_id, first.epoch, first.address) == ("decode-worker", node.epoch, node.address)
        assert cluster_metadata(SECRET)[0] in registry.metadata[0].items()


def test_a_worker_registers_until_it_is_dialled(model_dir: Path) -> None:
    registry = Registry(epoch=1, dials=False)
    with (
        serving(registry) as port,
        worker(model_dir, WorkerRole.DECODE, routers=(f"127.0.0.1:{port}",)),
    ):
        registry.wait_for(3)


def test_a_worker_finds_a_router_that_started_after_it_and_one_that_started_anew(model_dir: Path) -> None:
    with serving(Registry(epoch=0)) as port:
        pass  # a port that nobody listens on now
    with worker(model_dir, WorkerRole.DECODE, routers=(f"127.0.0.1:{port}",)) as node:
        for epoch in (1, 2):
            registry = Registry(epoch)
            with serving(registry, port):
                registry.wait_for(1)
                assert registry.client is not None
                assert registry.client.hello().epoch == node.epoch
