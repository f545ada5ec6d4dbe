"""Another process of this test run: runs the functions that it is handed, and can be killed."""

from __future__ import annotations

import multiprocessing
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


class PeerProcess:
    """Starts at once. `call` runs a module-level function there and gives its result, or raises what it raised."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> Any:
        self._pipe.send((function, args))
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the other process did not answer within {timeout_s} s")
        result, error = self._pipe.recv()
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        self._process.kill()
        self._process.join(10.0)
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send((function(*args), None))
        except Exception as error:  # noqa: BLE001 - it goes to the caller
            error.add_note(traceback.format_exc())
            pipe.send((None, error))
