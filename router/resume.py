"""The handles that clients carry to go on with an answer, made of requests and read again."""

from router.core.failures import invalid
from router.core.fleet import WorkerRef
from router.core.handles import BadHandle, ResumeHandle, seal, unseal
from router.requests import Request, RequestKey


class ResumeHandles:
    """Makes and reads them with the cluster's secret."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._cluster_secret = cluster_secret

    def make(self, request: Request, attempt: int, written_on: WorkerRef | None = None) -> bytes:
        """For a request at an attempt, and the worker that writes the answer, where there is one."""
        handle = ResumeHandle(
            tenant=request.key.tenant,
            request_id=request.key.request_id,
            attempt=attempt,
            seed=request.seed,
            body=request.body.hex(),
            worker_id=written_on.worker_id if written_on is not None else "",
            epoch=written_on.epoch if written_on is not None else 0,
        )
        return seal(handle, self._cluster_secret)

    def read(self, sealed: bytes, key: RequestKey, body: bytes) -> ResumeHandle:
        """The handle that came with a call for that request.

        Raises:
            Rejection: it was not made by this cluster, or belongs to another request.
        """
        try:
            handle = unseal(sealed, self._cluster_secret)
        except BadHandle as error:
            raise invalid("BAD_RESUME_HANDLE", str(error)) from None
        if (handle.tenant, handle.request_id, handle.body) != (*key, body.hex()):
            raise invalid("BAD_RESUME_HANDLE", "the resume handle belongs to another request")
        return handle
