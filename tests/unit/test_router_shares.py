"""The ledger of who is ahead of its share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.shares import ASKING_S, FADE_S, MAX_TENANTS, Shares

pytestmark = pytest.mark.unit


SLOW = 1.0
"""Tokens a second that can be served: far fewer than anybody here asks for."""


def overloaded() -> Shares:
    """With nobody's account, after long."""
    shares = Shares()
    for number in range(300):
        shares._load.asked(100, 0.001 * number - 1, SLOW)
    return shares


def ask(shares, tenant, now, weight=1.0, tokens=100, admitted=True, tokens_per_s=SLOW):
    shares.asked(tenant, weight, tokens, now, tokens_per_s)
    if admitted:
        shares.admitted(tenant, tokens)


def test_who_is_served_more_than_its_weight_is_in_debt_while_the_other_asks():
    shares = overloaded()
    for _ in range(10):
        ask(shares, "heavy", 0.0, weight=3.0, admitted=False)
        ask(shares, "light", 0.0, weight=1.0)
    # Of 1,000 tokens 250 were due to the one.
    assert shares.debt_tokens("light", 0.0) == pytest.approx(750 - 50, rel=0.05)
    assert shares.debt_tokens("heavy", 0.0) == 0


@pytest.mark.parametrize(("load", "is_contended"), [(0.9, False), (1.15, False), (2.0, True)])
def test_nobody_is_held_back_while_hardly_more_is_asked_than_can_be_served(load, is_contended):
    """Whoever is refused."""
    shares, now = Shares(), 0.0
    for number in range(400):
        now += 0.1 / load
        ask(
            shares,
            "light" if number % 2 else "heavy",
            now,
            1.0 + 2.0 * (number % 2 == 0),
            100,
            number % 2,
            1000,
        )
    assert shares.is_watching == is_contended
    assert (shares.debt_tokens("light", now) > 0) == is_contended


def test_how_much_is_asked_for_is_not_known_without_knowing_what_can_be_served():
    shares = Shares()
    for number in range(400):
        ask(shares, "light", 0.001 * number, tokens_per_s=None)
    assert not shares.is_watching


def test_nobody_is_held_back_for_one_who_has_left():
    shares = overloaded()
    for _ in range(10):
        ask(shares, "light", 0.0)
        ask(shares, "heavy", 0.0, weight=3.0, admitted=False)
    assert shares.debt_tokens("light", 0.5 * ASKING_S) > 0
    assert shares.debt_tokens("light", 1.5 * ASKING_S) == 0


def test_debts_fade():
    shares = overloaded()
    for _ in range(10):
        ask(shares, "light", 0.0)
        ask(shares, "heavy", 0.0, weight=3.0, admitted=False)
    ask(shares, "heavy", 10 * FADE_S, weight=3.0, admitted=False)
    assert shares.debt_tokens("light", 10 * FADE_S) == 0


def test_who_asks_for_less_than_is_due_leaves_the_rest_to_others():
    shares = overloaded()
    for _ in range(20):
        ask(shares, "many", 0.0, weight=1.0)
    ask(shares, "few", 0.0, weight=9.0)
    for _ in range(20):
        ask(shares, "many", 0.0, weight=1.0)
    assert shares.debt_tokens("many", 0.0) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.floats(0.1, 10), st.integers(1, 5000), st.booleans(), st.floats(0, 5)
        ),
        max_size=80,
    )
)
def test_what_one_is_ahead_others_are_behind(events):
    shares, now = overloaded(), 0.0
    for tenant, weight, tokens, admitted, passed_s in events:
        now += passed_s
        ask(shares, tenant, now, weight, tokens, admitted)
        balances = [account.balance for account in shares._accounts.values()]
        assert sum(balances) == pytest.approx(0, abs=1e-3 * (1 + max(map(abs, balances), default=0)))
        assert all(account.asked >= 0 for account in shares._accounts.values())


def test_tenants_are_bounded():
    shares = overloaded()
    for number in range(MAX_TENANTS + 10):
        ask(shares, f"tenant-{number}", float(number) / 1000, admitted=False)
    assert len(shares._accounts) == MAX_TENANTS
