"""Resume handles: made and read by one cluster only."""

import pytest

from router.core.handles import BadHandle, ResumeHandle, seal, unseal

pytestmark = pytest.mark.unit

SECRET = b"s" * 32
HANDLE = ResumeHandle(tenant="tenant", request_id="Grüße", attempt=2, seed=2**64 - 1, body="ab" * 16)


def test_a_sealed_handle_opens_to_what_was_sealed():
    assert unseal(seal(HANDLE, SECRET), SECRET) == HANDLE


@pytest.mark.parametrize("at", [0, 31, 32, 40, -1])
def test_a_handle_with_a_changed_byte_is_refused(at):
    sealed = bytearray(seal(HANDLE, SECRET))
    sealed[at] ^= 1
    with pytest.raises(BadHandle):
        unseal(bytes(sealed), SECRET)


@pytest.mark.parametrize("sealed", [b"", b"x", b"x" * 32, b"x" * 100_000])
def test_bytes_that_are_no_handle_are_refused(sealed):
    with pytest.raises(BadHandle):
        unseal(sealed, SECRET)


def test_another_cluster_cannot_open_it():
    with pytest.raises(BadHandle, match="not made by this cluster"):
        unseal(seal(HANDLE, b"t" * 32), SECRET)
