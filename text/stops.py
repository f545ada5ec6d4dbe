"""Stop strings in streamed text: nothing of one is ever shown, and nothing else is held back."""

from collections import deque
from collections.abc import Sequence

from text.errors import TextInputError


class StopScanner:
    """Finds the first stop string to be completed in text that arrives in chunks of any size.

    Of stop strings that are completed by the same character the longest counts: the answer ends before it.
    The result does not depend on where the chunks are cut. Only text that may still become a stop string is
    held back, fewer characters than the longest one has.

    An Aho–Corasick automaton (Aho and Corasick, 1975): each character costs amortized constant time,
    whatever the number of stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises TextInputError for an empty stop string, which would end every answer at once."""
        if any(not stop for stop in stops):
            raise TextInputError("a stop string must not be empty")
        self._automaton = _Automaton(stops)
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string once one is complete.

        After a match nothing more comes: later calls return ("", the same stop string).
        """
        if self._matched is not None:
            return "", self._matched
        self._held += text
        for position, char in enumerate(text, len(self._held) - len(text)):
            self._state = self._automaton.step(self._state, char)
            self._matched = self._automaton.match[self._state]
            if self._matched is not None:
                return self._cut(position + 1 - len(self._matched)), self._matched
        return self._cut(len(self._held) - self._automaton.depth[self._state]), None

    def flush(self) -> str:
        """What was held back, when the answer has ended without a stop string; empty after a match."""
        return "" if self._matched is not None else self._cut(len(self._held))

    def _cut(self, end: int) -> str:
        shown, self._held = self._held[:end], self._held[end:]
        return shown


class _Automaton:
    """States are prefixes of stops: `depth` is a prefix's length, `match` the longest stop that ends it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            self.match[self._insert(stop)] = stop
        self._link()

    def step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)

    def _insert(self, stop: str) -> int:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = self._next[state][char]
        return state

    def _link(self) -> None:
        """Set each state's fallback, the longest proper suffix that is a state, in order of depth."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if self.match[state] is None:
                self.match[state] = self.match[self._fallback[state]]
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                queue.append(child)
