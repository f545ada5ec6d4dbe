"""Who is ahead of its weight's share while others are turned away.

A line shares by weight what waits in it (`queue`). With a service level of a few service times hardly anything may
wait: whoever meets an empty line gets in, and what is served follows what is asked, not the weights. So a ledger
follows the line that would be if nobody were refused: each time something is served, as many tokens are credited, by
weight, to those who asked lately, as far as they asked. A tenant's balance is what it was credited less what it was
served. Who is in debt is held back while somebody with a credit asks; nobody else is, and nobody is before a third
of what is asked finds no room: until then to serve whoever comes is worth more. Who is held back counts neither as
asking for room nor as refused it, or holding back would be its own reason.

This is weighted max-min fairness with what was really served as its capacity: to whom less was offered than is due
the rest goes. Balances sum to zero, fade, and are of the requests of one priority. Pure; `now` in seconds.
"""

import math
from dataclasses import dataclass

FADE_S = 20.0
ASKED_LATELY_S = 3.0
"""How fast what was asked, and not served, is forgotten."""
ASKING_S = 1.0
CONTENDED, WATCHED = 1.5, 1.2
"""Of scarcity: from the one on shares matter, from the other on accounts are kept."""
NUM_REQUESTS = 64  # that scarcity and the mean size are averaged over
NUM_ALLOWED = 0.5
"""Debt in requests of mean size: they come whole."""
MAX_TENANTS = 1024
MIN_TOKENS = 1e-3
MAX_ROUNDS = 4


@dataclass(slots=True)
class _Account:
    weight: float
    balance: float = 0.0
    asked: float = 0.0
    asked_at_s: float = -math.inf
    answered: float = 0.0  # since others were credited for it


class Scarcity:
    """What was asked of late to what was let in, of those whom nobody held back for their share."""

    def __init__(self) -> None:
        self._asked = self._let_in = 0.0  # means over requests, in tokens

    @property
    def ratio(self) -> float:
        """1 where there is room for all."""
        return self._asked / max(self._let_in, MIN_TOKENS) if self._asked else 1.0

    def judged(self, num_tokens: int, is_let_in: bool) -> None:
        """Whether there was room for a request."""
        if not self._asked:
            self._asked = self._let_in = num_tokens  # a first refusal is no scarcity yet
        self._asked += (num_tokens - self._asked) / NUM_REQUESTS
        self._let_in += ((num_tokens if is_let_in else 0) - self._let_in) / NUM_REQUESTS


class Shares:
    """One class of priority."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._scarcity = Scarcity()
        self._mean_tokens = 0.0  # of a prompt
        self._prompt_tokens = self._answer_tokens = 0.0  # served of late
        self._now = 0.0

    @property
    def is_watching(self) -> bool:
        """Whether so many are turned away that it may soon matter who."""
        return self._scarcity.ratio > WATCHED

    def debt_tokens(self, tenant: str, now: float) -> float:
        """How far a tenant is beyond what it may be ahead while others, who are behind, ask; 0 where it may go on."""
        account = self._accounts.get(tenant)
        if account is None or self._scarcity.ratio < CONTENDED:
            return 0.0
        debt = -account.balance - NUM_ALLOWED * self._mean_tokens * self._price
        if debt <= 0 or not any(
            other.balance > 0 and now - other.asked_at_s < ASKING_S for other in self._accounts.values()
        ):
            return 0.0
        return debt

    def asked(self, tenant: str, weight: float, num_tokens: int, now: float) -> None:
        """A request has come, whatever becomes of it."""
        change = num_tokens - self._mean_tokens
        self._mean_tokens = self._mean_tokens + change / NUM_REQUESTS if self._mean_tokens else num_tokens
        if not self.is_watching:
            return
        self._settle_answers()
        self._fade(now)
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= MAX_TENANTS:
                self._drop_quietest()
            account = self._accounts[tenant] = _Account(weight)
        account.weight, account.asked_at_s = weight, now
        account.asked += num_tokens * self._price

    def refused(self, num_tokens: int) -> None:
        """There was no room for it."""
        self._scarcity.judged(num_tokens, is_let_in=False)

    def admitted(self, tenant: str, num_tokens: int) -> None:
        """It was let in, and its prompt will be served."""
        self._scarcity.judged(num_tokens, is_let_in=True)
        if not self.is_watching:
            self._accounts.clear()
            self._prompt_tokens = self._answer_tokens = 0.0
            return
        self._prompt_tokens += num_tokens
        account = self._accounts.get(tenant)
        if account is not None:
            left = self._credit(num_tokens)  # its own account may be credited, so not in one expression
            account.balance += left - num_tokens

    def answered(self, tenant: str, num_tokens: float) -> None:
        """Tokens of an answer came, at their price. Credited with the next request that comes, for there are many."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.answered += num_tokens

    @property
    def _price(self) -> float:
        """What is served for each token of a prompt, answers counted."""
        return 1.0 + self._answer_tokens / self._prompt_tokens if self._prompt_tokens > MIN_TOKENS else 1.0

    def _settle_answers(self) -> None:
        served = [account for account in self._accounts.values() if account.answered]
        num_tokens = sum(account.answered for account in served)
        if not num_tokens:
            return
        self._answer_tokens += num_tokens
        unwanted_part = self._credit(num_tokens) / num_tokens
        for account in served:
            account.balance -= account.answered * (1.0 - unwanted_part)
            account.answered = 0.0

    def _credit(self, num_tokens: float) -> float:
        """Credits tokens by weight to those who asked; what is left over where they asked for less."""
        for _ in range(MAX_ROUNDS):
            asking = [account for account in self._accounts.values() if account.asked > MIN_TOKENS]
            weight = sum(account.weight for account in asking)
            if not asking or num_tokens < MIN_TOKENS:
                return num_tokens
            left = 0.0
            for account in asking:
                due = num_tokens * account.weight / weight
                taken = min(due, account.asked)
                account.asked -= taken
                account.balance += taken
                left += due - taken
            num_tokens = left
        return num_tokens

    def _fade(self, now: float) -> None:
        passed_s, self._now = max(0.0, now - self._now), max(now, self._now)
        kept, kept_asked = math.exp(-passed_s / FADE_S), math.exp(-passed_s / ASKED_LATELY_S)
        self._prompt_tokens *= kept
        self._answer_tokens *= kept
        for account in self._accounts.values():
            account.balance *= kept
            account.asked *= kept_asked

    def _drop_quietest(self) -> None:
        quietest = min(self._accounts, key=lambda tenant: self._accounts[tenant].asked_at_s)
        lost = self._accounts.pop(quietest).balance
        for account in self._accounts.values():
            account.balance += lost / len(self._accounts)
