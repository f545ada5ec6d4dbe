"""Who is calling: tenants by their API keys, workers and operators by the cluster's token."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvtransfer.cluster_token import CLUSTER_METADATA_KEY, ClusterTokenCheck
from router.core.failures import Code, Failure, Rejection, Stage
from router.core.tenants import DEFAULT_TENANT

DIGEST_PREFIX = "sha256:"
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
    """`authorization: Bearer KEY`. Keys are kept and looked up as digests: whoever reads them cannot call with
    them, and how long a look-up takes says nothing about a key."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """`tenants`: by key, or by a key's digest as `key_digest` gives it."""
        self._tenants = {
            key if is_key_digest(key) else key_digest(key): tenant for key, tenant in tenants.items()
        }

    def tenant(self, metadata: Metadata) -> str:
        scheme, _, key = _value(metadata, "authorization").partition(" ")
        tenant = self._tenants.get(key_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise unauthenticated("BAD_API_KEY", "the call needs metadata `authorization: Bearer KEY`")
        return tenant


class ClusterToken:
    """What every process of one cluster can prove: that it knows the cluster secret."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._check = ClusterTokenCheck(cluster_secret)

    def holds(self, metadata: Metadata) -> bool:
        """Whether the caller knows the secret."""
        return self._check.admits(metadata)

    def require(self, metadata: Metadata) -> None:
        """Raises a Rejection, UNAUTHENTICATED, where the caller does not know the secret."""
        if not self.holds(metadata):
            raise unauthenticated(
                "BAD_CLUSTER_TOKEN", f"the call needs the cluster's token in metadata `{CLUSTER_TOKEN_KEY}`"
            )


def unauthenticated(cause: str, message: str) -> Rejection:
    """A rejection of a caller who did not say who they are."""
    return Rejection(Failure(code=Code.UNAUTHENTICATED, stage=Stage.ADMISSION, cause=cause, message=message))


def key_digest(key: str) -> str:
    """What may be written down of an API key: `sha256:` and 64 hexadecimal digits."""
    return DIGEST_PREFIX + hashlib.sha256(key.encode()).hexdigest()


def is_key_digest(text: str) -> bool:
    """Whether it is what `key_digest` gives."""
    return re.fullmatch(DIGEST_PREFIX + r"[0-9a-f]{64}", text) is not None


def _value(metadata: Metadata, key: str) -> str:
    for name, value in metadata:
        if name == key:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""
