"""The process's NIXL agent: memory that other agents may write into, and writes into theirs.

The library is an optional extra (`headrace-server[nixl]`) and is imported when the first agent is asked for.
Two of its habits decide how it is used here:

- Its own progress thread polls without a pause, one core for the life of the process. UCX over TCP moves nothing
  into memory that nobody polls, so this module polls by itself, with naps, and only while landing slots are open.
- Deregistering memory is no fence. Over TCP and within a host UCX writes by address, and a write that was begun
  before, or by a sender that does not know, still lands (seen, not feared). So the addresses of a region that was
  given up are never used for anything else: its pages go back to the system, the range stays reserved.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import os
import secrets
import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from kvtransfer.transports.carriers import CarrierFailed

_log = logging.getLogger(__name__)

_MAX_PEERS = 64
_BUSY_NAP_S = 50e-6
_IDLE_NAP_S = 2e-3
_FIRST_POLL_S = 20e-6
_LONGEST_POLL_S = 500e-6


class Region:
    """Memory that is registered with the agent. `array`: uint8 of its whole length."""

    def __init__(self, num_bytes: int) -> None:
        # Private and anonymous: only of such memory are the pages given back by MADV_DONTNEED.
        self._mapping = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._mapping, np.uint8)
        self.address: int = self.array.ctypes.data
        self.registration: Any = None

    def give_back_pages(self) -> None:
        """The range stays; what is written there takes new pages."""
        self._mapping.madvise(mmap.MADV_DONTNEED)


class NixlAgent:
    """One agent over UCX. Safe to call from several threads. Raises CarrierFailed where the library is missing."""

    def __init__(self) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # it prints to stdout otherwise
        self.name = f"headrace-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            api = importlib.import_module("nixl._api")
            config = api.nixl_agent_config(
                enable_prog_thread=False,
                backends=["UCX"],
                sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            )
            self._agent: Any = api.nixl_agent(self.name, config)
        except ImportError as error:
            text = f"NIXL is not installed (pip install 'headrace-server[nixl]'): {error}"
            raise CarrierFailed(text) from None
        except Exception as error:
            raise CarrierFailed(f"NIXL does not start: {type(error).__name__}: {error}") from error
        self._lock = threading.Lock()
        self._abandoned: list[Region] = []  # kept for their addresses
        self._peers: OrderedDict[str, int] = OrderedDict()  # by name: writers that are open
        self._progress = _Progress(self._agent)

    # ---- memory

    def register(self, num_bytes: int) -> Region:
        """Raises CarrierFailed."""
        region = Region(num_bytes)
        try:
            spans = [(region.address, num_bytes, 0, "")]
            region.registration = self._agent.register_memory(spans, "DRAM")
        except Exception as error:
            raise CarrierFailed(f"{num_bytes} bytes cannot be registered: {_text(error)}") from error
        return region

    def metadata(self, region: Region) -> bytes:
        """What another agent must know to write into `region`. Raises CarrierFailed."""
        try:
            packed: bytes = self._agent.get_partial_agent_metadata(region.registration, inc_conn_info=True)
        except Exception as error:
            raise CarrierFailed(f"NIXL gives no metadata: {_text(error)}") from error
        return packed

    def abandon(self, region: Region) -> None:
        """Nobody here uses it any more; others may still write into it, and reach nothing else."""
        with self._lock:
            self._abandoned.append(region)
        try:
            self._agent.deregister_memory(region.registration)
            region.give_back_pages()
        except Exception as error:  # noqa: BLE001 - it stays as it is then, which costs its pages
            _log.warning("a region of %d bytes stays registered: %s", len(region.array), _text(error))

    @property
    def num_abandoned(self) -> int:
        return len(self._abandoned)

    # ---- the receiver's part

    def start_polling(self) -> None:
        """From now on somebody may write into this process's regions; once for every stream."""
        self._progress.add(1)

    def note_landing(self) -> None:
        """More is to be expected at once."""
        self._progress.hurry()

    def stop_polling(self) -> None:
        self._progress.add(-1)

    # ---- the sender's part

    def connect(self, name: str, metadata: bytes) -> None:
        """Makes a region of agent `name` writable; `disconnect` when done. Raises CarrierFailed."""
        with self._lock:
            if name != self.name:
                self._load(name, metadata)
            self._peers[name] = self._peers.pop(name, 0) + 1

    def _load(self, name: str, metadata: bytes) -> None:
        try:
            found = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise CarrierFailed(f"the receiver's agent cannot be reached: {_text(error)}") from error
        if found != name.encode():
            raise CarrierFailed(f"the metadata is of agent {found!r}, the offer of {name!r}")

    def disconnect(self, name: str) -> None:
        """Connections stay for the next stream; the longest unused go when there are many."""
        with self._lock:
            self._peers[name] -= 1
            idle = [peer for peer, num_open in self._peers.items() if not num_open]
            for peer in idle[: max(0, len(idle) - _MAX_PEERS)]:
                del self._peers[peer]
                if peer != self.name:
                    self._unload(peer)

    def _unload(self, name: str) -> None:
        try:
            self._agent.remove_remote_agent(name)
        except Exception as error:  # noqa: BLE001 - its entry stays, which costs little
            _log.info("the connection to agent %s cannot be closed: %s", name, _text(error))

    def write(self, source: int, peer: str, target: int, num_bytes: int, deadline: float) -> None:
        """Returns when the bytes are in the peer's memory. Addresses are within regions of both.

        Raises CarrierFailed, and WriteStuck where the transport cannot let go of `source` either.
        """
        try:
            handle = self._agent.initialize_xfer(
                "WRITE",
                self._agent.get_xfer_descs([(source, num_bytes, 0)], "DRAM"),
                self._agent.get_xfer_descs([(target, num_bytes, 0)], "DRAM"),
                peer,
            )
        except Exception as error:
            raise CarrierFailed(f"NIXL takes no write: {_text(error)}") from error
        try:
            why = self._complete(handle, deadline)
        except Exception as error:  # noqa: BLE001 - the library tells a lost peer in several ways
            why = _text(error)
        try:
            handle.release()
        except Exception as error:
            raise WriteStuck(f"{why or 'done'}; the write cannot be ended: {_text(error)}") from error
        if why:
            raise CarrierFailed(f"the write of {num_bytes} bytes failed: {why}")

    def _complete(self, handle: Any, deadline: float) -> str:
        """What went wrong; empty where nothing did."""
        state = self._agent.transfer(handle)
        # Sleeping polls moved 1.5 to 3 times as much as busy ones on two cores: the other end needs one too.
        nap_s = _FIRST_POLL_S
        while state == "PROC":
            if time.monotonic() >= deadline:
                return "not complete at its deadline"
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_POLL_S)
            state = self._agent.check_xfer_state(handle)
        return "" if state == "DONE" else f"state {state}"


class WriteStuck(CarrierFailed):
    """The transport still reads the source: that memory is not to be used again."""


class _Progress:
    """A thread that polls the agent while anybody wants it: quickly while bytes land, seldom in between."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._cond = threading.Condition()
        self._num_wanted = 0
        self._thread: threading.Thread | None = None
        self._nap_s = _BUSY_NAP_S

    def add(self, change: int) -> None:
        with self._cond:
            self._num_wanted += change
            self._nap_s = _BUSY_NAP_S
            if self._num_wanted and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
                self._thread.start()

    def hurry(self) -> None:
        self._nap_s = _BUSY_NAP_S

    def _run(self) -> None:
        while True:
            with self._cond:
                if not self._num_wanted:
                    self._thread = None
                    return
            try:
                self._agent.get_new_notifs()  # nobody sends any; asking is what makes UCX move
            except Exception as error:  # noqa: BLE001 - the senders' deadlines tell the rest
                _log.warning("NIXL does not poll: %s", _text(error))
                self._nap_s = _IDLE_NAP_S
            time.sleep(self._nap_s)
            self._nap_s = min(1.1 * self._nap_s, _IDLE_NAP_S)


_process_lock = threading.Lock()
_process_agent: NixlAgent | None = None
_process_failure = ""


def process_agent() -> NixlAgent:
    """The one agent of this process, made at the first call. Raises CarrierFailed, then always."""
    global _process_agent, _process_failure
    with _process_lock:
        if _process_failure:
            raise CarrierFailed(_process_failure)
        if _process_agent is None:
            try:
                _process_agent = NixlAgent()
            except CarrierFailed as error:
                _process_failure = str(error)
                raise
        return _process_agent


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
