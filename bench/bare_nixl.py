"""NIXL by itself, writing a paged cache: one transfer of many small descriptors, nothing gathered, checked or leased.

Both ends have a region of the same size, cut into pages of PAGE_BYTES (what a block of 16 tokens has in a layer of a
small model); pages are taken and written in an order of their own each, as those of a cache in use lie.
"""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

PAGE_BYTES = 12 << 10
_POLL_S = 50e-6


class PagedRegion:
    """A registered region of `num_bytes`, rounded down to whole pages, and its pages in some order."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self.name = name
        self.agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        num_pages = num_bytes // PAGE_BYTES
        self.memory = np.random.default_rng(1).integers(0, 255, num_pages * PAGE_BYTES, np.uint8)
        address = self.memory.ctypes.data
        self.registration = self.agent.register_memory([(address, len(self.memory), 0, "")], "DRAM")
        self.pages = [address + i * PAGE_BYTES for i in range(num_pages)]
        random.Random(name).shuffle(self.pages)

    def metadata(self) -> bytes:
        """For the other end."""
        packed: bytes = self.agent.get_agent_metadata()
        return packed

    def poll(self) -> None:
        """What a receiver must do for anything to move; until a notification comes."""
        while not self.agent.get_new_notifs():
            time.sleep(_POLL_S)

    def write(self, name: str, pages: list[int], timeout_s: float) -> float:
        """Seconds from the first descriptor to the completion of the last."""
        began = time.monotonic()
        here = self.agent.get_xfer_descs([(page, PAGE_BYTES, 0) for page in self.pages], "DRAM")
        there = self.agent.get_xfer_descs([(page, PAGE_BYTES, 0) for page in pages], "DRAM")
        handle = self.agent.initialize_xfer("WRITE", here, there, name, b"done")
        state = self.agent.transfer(handle)
        while state == "PROC" and time.monotonic() - began < timeout_s:
            time.sleep(_POLL_S)
            state = self.agent.check_xfer_state(handle)
        took_s = time.monotonic() - began
        if state != "DONE":
            raise RuntimeError(f"NIXL's transfer is in state {state} after {took_s:.0f} s")
        self.agent.release_xfer_handle(handle)
        return took_s
