"""One priority class of the queue: its tenants' lines, and whose turn it is.

Tenants share by virtual token counters, as in "Fairness in Serving Large Language Models" (Sheng et al.,
OSDI'24, arXiv:2401.00588, algorithm 2 and its weighted form): every line counts the tokens that were served to
it, divided by its weight, and the line with the lowest count is next. Prompt tokens are charged when the
request is taken, answer tokens as they come. A line in which nobody stood is lifted to the lowest count of
those that wait when somebody joins it, or to that of the line that emptied last: idleness earns nothing.

Within a line the earliest deadline is first, then the earliest arrival. A request that was taken and came back
keeps the count at which it was taken as its place, so it is not charged again and its tenant gains nothing.
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from router.core.rates import ArrivalRate

K = TypeVar("K", bound=Hashable)

PRICE_FADING = 1 - 1 / 64  # from one prompt to the next
MIN_STALE = 64  # places of requests that left are swept when they are more than these and than those in use


@dataclass(frozen=True, slots=True)
class Entry(Generic[K]):
    """One waiting request.

    `num_tokens` of prompt; `deadline` in monotonic seconds; `order` of arrival; `start`: its tenant's count when
    it was taken, None while it has not been.
    """

    key: K
    num_tokens: int
    deadline: float
    order: int
    tenant: str = "default"
    priority: int = 0
    weight: float = 1.0
    start: float | None = None


class PromptPrice:
    """What serving a prompt's token costs with the answer that comes of it, in tokens, of late."""

    __slots__ = ("_charged", "_prompt_tokens")

    def __init__(self) -> None:
        self._charged = self._prompt_tokens = 0.0

    @property
    def per_token(self) -> float:
        """1 where no answer was charged."""
        return self._charged / self._prompt_tokens if self._prompt_tokens else 1.0

    def prompt(self, num_tokens: int) -> None:
        """A prompt was charged: what was before counts a little less."""
        self._charged = self._charged * PRICE_FADING + num_tokens
        self._prompt_tokens = self._prompt_tokens * PRICE_FADING + num_tokens

    def answer(self, charge: float) -> None:
        """So many tokens were charged for answers."""
        if self._prompt_tokens:
            self._charged += charge


@dataclass(slots=True, eq=False)
class Line(Generic[K]):
    """One tenant's requests of one class. `service`: tokens served to it, divided by its weight."""

    tenant: str
    weight: float
    service: float
    queued_tokens: int = 0
    arrivals: ArrivalRate = field(default_factory=ArrivalRate)
    price: PromptPrice = field(default_factory=PromptPrice)
    turn: tuple[float, int] | None = None
    entries: dict[int, Entry[K]] = field(default_factory=dict)
    places: list[tuple[float, int]] = field(default_factory=list)

    def head(self) -> Entry[K] | None:
        """Its next request."""
        while self.places and self.places[0][1] not in self.entries:
            heapq.heappop(self.places)
        return self.entries[self.places[0][1]] if self.places else None

    def add(self, entry: Entry[K]) -> None:
        self.entries[entry.order] = entry
        self.queued_tokens += entry.num_tokens
        heapq.heappush(self.places, (entry.deadline, entry.order))

    def remove(self, entry: Entry[K]) -> None:
        del self.entries[entry.order]
        self.queued_tokens -= entry.num_tokens
        if len(self.places) > 2 * len(self.entries) + MIN_STALE:
            self.places = [(e.deadline, e.order) for e in self.entries.values()]
            heapq.heapify(self.places)


class FairClass(Generic[K]):
    """The lines of one class. Every operation takes time logarithmic in the number of requests."""

    def __init__(self) -> None:
        self.lines: dict[str, Line[K]] = {}
        self.queued_tokens = 0
        self._weight: float | None = 0.0
        self.arrivals = ArrivalRate()
        self._price = PromptPrice()
        self._turns: list[tuple[float, int, str]] = []
        self._virtual = 0.0
        self._left_last: Line[K] | None = None

    def line(self, tenant: str, weight: float) -> Line[K]:
        """The tenant's line, which has that weight from now on."""
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = Line(tenant, weight, self._floor())
            self._weight = None
        elif line.weight != weight:
            line.weight = weight
            self._weight = None
        return line

    @property
    def weight(self) -> float:
        """Of all lines together."""
        if self._weight is None:  # summed anew, since differences of floats would drift
            self._weight = sum(line.weight for line in self.lines.values())
        return self._weight

    def forget(self, tenant: str) -> None:
        """Drops a line in which nobody stands."""
        del self.lines[tenant]
        self._weight = None

    def put(self, line: Line[K], entry: Entry[K]) -> None:
        """Lets a request in, or back in."""
        if not line.entries:
            line.service = max(line.service, self._floor())
        line.add(entry)
        self.queued_tokens += entry.num_tokens
        self._place(line)

    def remove(self, line: Line[K], entry: Entry[K]) -> None:
        """Takes a request out wherever it stands."""
        line.remove(entry)
        self.queued_tokens -= entry.num_tokens
        if not line.entries:
            self._left_last = line
        self._place(line)

    def begin(self, line: Line[K], entry: Entry[K]) -> float:
        """Charges the prompt of a request that is about to be taken, unless it was before; the count at which
        it is taken."""
        start = line.service if entry.start is None else entry.start
        self._virtual = max(self._virtual, start)
        if entry.start is None:
            line.price.prompt(entry.num_tokens)
            self._price.prompt(entry.num_tokens)
            self._charge(line, entry.num_tokens)
        return start

    def answered(self, line: Line[K], charge: float) -> None:
        """Charges an answer's tokens."""
        line.price.answer(charge)
        self._price.answer(charge)
        self._charge(line, charge)

    def turn_tokens(self, tenant: str, weight: float) -> float:
        """Prompt tokens that the class takes until it is the turn of a request that comes now, by weight alone:
        if everybody who was active lately always had somebody waiting.

        That is what waits in its line and what the line was served ahead of others, both at the line's price,
        times what others take meanwhile.
        """
        line = self.lines.get(tenant)
        if line is None:
            return 0.0
        ahead_of_others = max(0.0, line.service - self._floor()) * line.weight
        charge = line.queued_tokens * line.price.per_token + ahead_of_others
        share = weight / (self.weight + weight - line.weight)
        return charge / share / self._price.per_token

    def _charge(self, line: Line[K], num_tokens: float) -> None:
        line.service += num_tokens / line.weight
        self._place(line)

    def head(self) -> Entry[K] | None:
        """The request whose turn it is."""
        while self._turns:
            count, order, tenant = self._turns[0]
            line = self.lines.get(tenant)
            if line is not None and line.turn == (count, order):
                return line.head()
            heapq.heappop(self._turns)
        return None

    def _floor(self) -> float:
        """What a line that was idle is lifted to."""
        if self.head() is not None:
            return max(self._virtual, self._turns[0][0])
        return max(self._virtual, self._left_last.service if self._left_last is not None else 0.0)

    def _place(self, line: Line[K]) -> None:
        head = line.head()
        turn = None
        if head is not None:
            # Among equal counts the request that came first is first.
            turn = (line.service if head.start is None else head.start, head.order)
        if turn == line.turn:
            return
        line.turn = turn
        if turn is not None:
            heapq.heappush(self._turns, (*turn, line.tenant))
        if len(self._turns) > 2 * len(self.lines) + MIN_STALE:
            self._turns = [(*each.turn, each.tenant) for each in self.lines.values() if each.turn is not None]
            heapq.heapify(self._turns)
