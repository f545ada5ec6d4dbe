"""Tickets for direct streams: made by one cluster, for one incarnation, taken once and in time."""

import pytest

from kvtransfer.direct_ticket import TICKET_TTL_S, BadTicket, DirectTicket, TicketDesk, seal, unseal

pytestmark = pytest.mark.unit

SECRET = b"s" * 32
NOW_S = 1_000_000.0


def ticket(number: int = 0, expires_s: float = NOW_S + TICKET_TTL_S) -> DirectTicket:
    return DirectTicket(
        tenant="t", request_id="Grüße", attempt=2, epoch=7, ticket_id=f"{number:032x}", expires_s=expires_s
    )


class Clock:
    def __init__(self) -> None:
        self.now = NOW_S

    def __call__(self) -> float:
        return self.now


def refusal(desk: TicketDesk, sealed: bytes, epoch: int = 7) -> str:
    with pytest.raises(BadTicket) as refused:
        desk.take(sealed, epoch)
    return refused.value.cause


def test_a_ticket_is_taken_once() -> None:
    desk = TicketDesk(SECRET, Clock())
    sealed = seal(ticket(), SECRET)
    assert desk.take(sealed, 7) == ticket()
    assert refusal(desk, sealed) == "TICKET_USED"
    assert desk.take(seal(ticket(1), SECRET), 7) == ticket(1)


@pytest.mark.parametrize("at", [0, 31, 32, 40, -1])
def test_a_ticket_with_a_changed_byte_is_refused(at: int) -> None:
    sealed = bytearray(seal(ticket(), SECRET))
    sealed[at] ^= 1
    assert refusal(TicketDesk(SECRET, Clock()), bytes(sealed)) == "BAD_TICKET"


@pytest.mark.parametrize("sealed", [b"", b"x", b"x" * 32, b"x" * 100_000])
def test_bytes_that_are_no_ticket_are_refused(sealed: bytes) -> None:
    with pytest.raises(BadTicket):
        unseal(sealed, SECRET)


def test_of_another_cluster_or_incarnation_none_is_taken() -> None:
    desk = TicketDesk(SECRET, Clock())
    assert refusal(desk, seal(ticket(), b"t" * 32)) == "BAD_TICKET"
    assert refusal(desk, seal(ticket(), SECRET), epoch=8) == "OTHER_EPOCH"
    assert desk.take(seal(ticket(), SECRET), 7)  # a refused ticket was not used


def test_a_late_ticket_and_one_that_would_last_too_long_are_refused() -> None:
    clock = Clock()
    desk = TicketDesk(SECRET, clock)
    assert refusal(desk, seal(ticket(expires_s=NOW_S + 1e6), SECRET)) == "TICKET_LATE"
    clock.now += TICKET_TTL_S
    assert refusal(desk, seal(ticket(), SECRET)) == "TICKET_LATE"


def test_a_ticket_cannot_be_used_again_by_setting_the_clock_on() -> None:
    clock = Clock()
    desk = TicketDesk(SECRET, clock)
    sealed = seal(ticket(), SECRET)
    desk.take(sealed, 7)
    for _ in range(100):
        clock.now += 1.0
        assert refusal(desk, sealed) in ("TICKET_USED", "TICKET_LATE")


def test_what_is_remembered_is_bounded_and_forgotten() -> None:
    clock = Clock()
    desk = TicketDesk(SECRET, clock, max_taken=2)
    for number in range(2):
        desk.take(seal(ticket(number), SECRET), 7)
    assert refusal(desk, seal(ticket(2), SECRET)) == "TOO_MANY_TICKETS"
    clock.now += 2 * TICKET_TTL_S
    late = NOW_S + 3 * TICKET_TTL_S
    assert desk.take(seal(ticket(2, late), SECRET), 7)
