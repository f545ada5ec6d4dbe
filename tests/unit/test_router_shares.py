"""The ledger of who is ahead of its share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.shares import ASKING_S, FADE_S, MAX_TENANTS, Shares

pytestmark = pytest.mark.unit


def overloaded() -> Shares:
    """With nobody's account, after long."""
    shares = Shares()
    for _ in range(1000):
        shares.refused(1000)
    return shares


def ask(shares, tenant, now, weight=1.0, tokens=100, admitted=True):
    shares.asked(tenant, weight, tokens, now)
    if admitted:
        shares.admitted(tenant, tokens)
    else:
        shares.refused(tokens)


def test_who_is_served_more_than_its_weight_is_in_debt_while_the_other_asks():
    shares = overloaded()
    for _ in range(10):
        ask(shares, "heavy", 0.0, weight=3.0, admitted=False)
        ask(shares, "light", 0.0, weight=1.0)
    # Of 1,000 tokens 250 were due to the one.
    assert shares.debt_tokens("light", 0.0) == pytest.approx(750 - 50, rel=0.05)
    assert shares.debt_tokens("heavy", 0.0) == 0


@pytest.mark.parametrize(("num_refused", "is_contended"), [(0, False), (1, False), (2, False), (5, True)])
def test_nobody_is_held_back_before_a_third_finds_no_room(num_refused, is_contended):
    """Of ten; those with the larger weight are refused."""
    shares, now = Shares(), 0.0
    for _ in range(100):
        for number in range(10):
            now += 0.01
            is_refused = number < num_refused
            ask(
                shares,
                "heavy" if is_refused else "light",
                now,
                4.0 if is_refused else 1.0,
                100,
                not is_refused,
            )
    assert shares.is_watching == (num_refused > 1)
    assert (shares.debt_tokens("light", now) > 0) == is_contended


def test_who_is_held_back_is_no_reason_to_hold_back():
    shares = overloaded()
    for _ in range(10):
        ask(shares, "heavy", 0.0, weight=3.0, admitted=False)
        ask(shares, "light", 0.0)
    assert shares.debt_tokens("light", 0.0) > 0
    for number in range(1000):  # now there is room for the one, and the other only asks
        shares.asked("light", 1.0, 100, 0.001 * number)
        if number % 3 == 0:
            ask(shares, "heavy", 0.001 * number, weight=3.0)
    assert not shares.is_watching
    assert shares.debt_tokens("light", 1.0) == 0


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
