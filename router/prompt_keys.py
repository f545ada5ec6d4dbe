"""The block keys of a prompt, as the workers that cache its blocks make them (kvtransfer/keys.py).

The router can make them because it knows the cluster's secret, and the tenant of every request.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvtransfer.keys import keys_for, root_key, tenant_secret
from router.core.index_feed import KeyScheme

MAX_ROOTS = 4096
NO_ADAPTER = ""


class KeyRoots:
    """What each tenant's keys begin with; the `MAX_ROOTS` used last are kept."""

    def __init__(self, cluster_secret: bytes) -> None:
        """Raises ValueError for a short cluster secret."""
        tenant_secret(cluster_secret, "")
        self._cluster_secret = cluster_secret
        self._roots: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def root(self, identity: str, tenant: str) -> bytes:
        """The parent of the first block of a tenant's prompts on workers of an identity."""
        name = (identity, tenant)
        root = self._roots.get(name)
        if root is None:
            root = root_key(identity, NO_ADAPTER, tenant_secret(self._cluster_secret, tenant))
            self._roots[name] = root
            if len(self._roots) > MAX_ROOTS:
                self._roots.popitem(last=False)
        else:
            self._roots.move_to_end(name)
        return root


class PromptKeys:
    """One prompt's keys, made when they are first asked for."""

    def __init__(self, roots: KeyRoots, tenant: str, token_ids: Sequence[int]) -> None:
        """`token_ids`: all that is to be in the cache before the next token can be drawn."""
        self._roots = roots
        self._tenant = tenant
        self._token_ids = token_ids
        self._made: dict[KeyScheme, list[bytes]] = {}

    def keys(self, scheme: KeyScheme) -> list[bytes]:
        """Of the full blocks that may be taken from a cache: at least one token stays to be computed."""
        made = self._made.get(scheme)
        if made is None:
            root = self._roots.root(scheme.identity, self._tenant)
            made = keys_for(root, self._token_ids[:-1], scheme.block_tokens)
            self._made[scheme] = made
        return made
