"""Tenants by their keys, which the router knows by digest only."""

import hashlib

import pytest

from router.auth import ApiKeys, is_key_digest, key_digest
from router.core.failures import Code, Rejection

pytestmark = pytest.mark.unit


def bearer(key):
    return [("authorization", f"Bearer {key}")]


def test_a_key_is_known_by_itself_or_by_its_digest():
    keys = ApiKeys({key_digest("secret-a"): "a", "secret-b": "b"})
    assert keys.tenant(bearer("secret-a")) == "a"
    assert keys.tenant(bearer("secret-b")) == "b"
    assert "secret" not in repr(vars(keys))


@pytest.mark.parametrize("key", [key_digest("secret-a"), "secret-c", ""])
def test_a_digest_is_no_key(key):
    with pytest.raises(Rejection) as refused:
        ApiKeys({key_digest("secret-a"): "a"}).tenant(bearer(key))
    assert refused.value.failure.code is Code.UNAUTHENTICATED


def test_a_digest_is_what_everybody_computes():
    assert key_digest("abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert is_key_digest(key_digest("abc"))
    assert not is_key_digest("sha256:" + "A" * 64)
    assert not is_key_digest(key_digest("abc") + "\n")
