"""When a sender renews its lease and when it gives its receiver up."""

import pytest

from kvtransfer.contact import Contact

pytestmark = pytest.mark.unit


def test_a_lease_is_renewed_in_time_and_lost_after_a_ttl_of_silence() -> None:
    now = [100.0]
    contact = Contact(6.0, lambda: now[0])
    assert (contact.renew_at, contact.lost_at) == (102.0, 106.0)
    now[0] = 101.0
    contact.touch()
    assert (contact.renew_at, contact.lost_at) == (103.0, 107.0)
    now[0] = 103.0
    contact.retry_renewal()
    assert (contact.renew_at, contact.lost_at) == (103.6, 107.0)
    now[0] = 106.9
    assert not contact.is_lost
    now[0] = 107.0
    assert contact.is_lost
