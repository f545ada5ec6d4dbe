"""Who is calling: tenants by their API keys, workers and operators by the cluster's token."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvtransfer.cluster_token import CLUSTER_METADATA_KEY, cluster_token
from router.core.failures import Code, Failure, Rejection, Stage

DEFAULT_TENANT = "default"
CLUSTER_TOKEN_KEY = CLUSTER_METADATA_KEY

Metadata = Sequence[tuple[str, str | bytes]]


class Authenticator(Protocol):
    """The seam for other ways to know a tenant."""

    def tenant(self, metadata: Metadata) -> str:
        """The caller's tenant.

        Raises:
            Rejection: UNAUTHENTICATED.
        """


class OpenDoor:
    """No keys are configured: everyone is the same tenant."""

    def tenant(self, metadata: Metadata) -> str:
        return DEFAULT_TENANT


class ApiKeys:
    """`authorization: Bearer KEY`. Keys are kept and looked up as digests, so that how long a look-up takes
    says nothing about a key."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        self._tenants = {_digest(key): tenant for key, tenant in tenants.items()}

    def tenant(self, metadata: Metadata) -> str:
        scheme, _, key = _value(metadata, "authorization").partition(" ")
        tenant = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise unauthenticated("BAD_API_KEY", "the call needs metadata `authorization: Bearer KEY`")
        return tenant


class ClusterToken:
    """What every process of one cluster can prove: that it knows the cluster secret."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._token = cluster_token(cluster_secret)

    def holds(self, metadata: Metadata) -> bool:
        """Whether the caller knows the secret."""
        given = _value(metadata, CLUSTER_TOKEN_KEY)
        return hmac.compare_digest(given.encode(), self._token.encode())

    def require(self, metadata: Metadata) -> None:
        """Raises a Rejection, UNAUTHENTICATED, where the caller does not know the secret."""
        if not self.holds(metadata):
            raise unauthenticated(
                "BAD_CLUSTER_TOKEN", f"the call needs the cluster's token in metadata `{CLUSTER_TOKEN_KEY}`"
            )


def unauthenticated(cause: str, message: str) -> Rejection:
    """A rejection of a caller who did not say who they are."""
    return Rejection(Failure(code=Code.UNAUTHENTICATED, stage=Stage.ADMISSION, cause=cause, message=message))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _value(metadata: Metadata, key: str) -> str:
    for name, value in metadata:
        if name == key:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""
