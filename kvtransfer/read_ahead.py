"""The next item of an iterator is made while the last one is worked on: two threads with a short queue between."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

_T = TypeVar("_T")


class ReadAhead(Generic[_T]):
    """Runs `items` on a thread of its own. At most `depth` items wait, and one more is in the thread's hand.

    An iterator itself: what `items` raises is raised behind the items before it. `close` from any thread ends it;
    the thread ends when `items` gives its next item, or its end.
    """

    def __init__(self, items: Iterator[_T], depth: int, thread_name: str) -> None:
        self._items = items
        self._depth = depth
        self._ready: deque[_T] = deque()
        self._is_over = False  # nothing more comes
        self._is_closed = False  # nobody takes anything more
        self._error: BaseException | None = None
        self._cond = threading.Condition()
        threading.Thread(target=self._run, name=thread_name, daemon=True).start()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        with self._cond:
            self._cond.wait_for(lambda: self._ready or self._is_over or self._is_closed)
            if self._ready and not self._is_closed:
                self._cond.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """No more items are taken; those that wait are dropped. Idempotent."""
        with self._cond:
            self._is_closed = True
            self._ready.clear()
            self._cond.notify_all()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._cond:
                    self._cond.wait_for(lambda: self._is_closed or len(self._ready) < self._depth)
                    if self._is_closed:
                        break
                    self._ready.append(item)
                    self._cond.notify_all()
                del item  # or it is held until the next one comes
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the items
            self._error = error
        finally:
            with self._cond:
                self._is_over = True
                self._cond.notify_all()
