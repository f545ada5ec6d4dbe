"""An answer that goes on where an earlier attempt stopped.

Its tokens are known, their keys and values are not. What all choices share is computed once, like a longer prompt,
the *head*; behind it each choice computes what is its own, and draws its next token. Since a token depends on the
tokens before it alone (design §3.7), the answer goes on as if it had never stopped. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True, slots=True)
class SoFar:
    """The tokens of each choice, which of the choices have ended, and how many tokens the others begin alike with.

    `SoFar()` is an answer from its beginning; make others with `of`.
    """

    choices: tuple[tuple[int, ...], ...] = ()
    ended: frozenset[int] = frozenset()
    num_shared: int = 0

    @classmethod
    def of(cls, choices: Sequence[Sequence[int]], ended: frozenset[int] = frozenset()) -> SoFar:
        """Raises ValueError where no choice goes on, or one ended that is not there."""
        going = [tokens for choice, tokens in enumerate(choices) if choice not in ended]
        if not going or len(going) + len(ended) != len(choices):
            raise ValueError(f"of {len(choices)} choices {sorted(ended)} ended: none of them goes on")
        num_shared = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*going, strict=False))))
        return cls(tuple(tuple(tokens) for tokens in choices), ended, num_shared)

    def head(self, prompt: Sequence[int]) -> list[int]:
        """The prompt and what the choices share."""
        return [*prompt, *self._going[: self.num_shared]]

    def rest(self, choice: int) -> tuple[int, ...]:
        """What a choice has beyond the head."""
        return self.choices[choice][self.num_shared :] if self.choices else ()

    def draws(self, choice: int) -> bool:
        """Whether a choice's next token is drawn at the head's end."""
        return choice not in self.ended and not self.rest(choice)

    @property
    def _going(self) -> tuple[int, ...]:
        """The tokens of a choice that goes on."""
        return next((tokens for choice, tokens in enumerate(self.choices) if choice not in self.ended), ())


NOTHING = SoFar()
