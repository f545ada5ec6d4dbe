"""One worker's blocks: the product's pool, bytes in a dictionary, and a guard on every write."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from engine.pool import BlockPool
from kvtransfer.layouts import Piece
from tests.lease_world.content import (
    BLOCK_TOKENS,
    ENTRY_BYTES,
    LAYOUT,
    Place,
    entry_bytes,
    keys_of,
    places_of,
    whole,
)

NUM_BLOCKS = 9


@dataclass(frozen=True, slots=True)
class Writer:
    """Whose bytes an entry holds: the lease, and the incarnation that sent or computed them."""

    lease_id: bytes
    epoch: int


class Memory:
    """Stands where a LeaseKeeper expects an engine."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        self.layout = LAYOUT
        self.owners: set[bytes] = set()
        self.num_salvaged = 0
        self._prompts: dict[bytes, tuple[int, ...]] = {}
        self._entries: dict[tuple[int, str, int, int], tuple[bytes, Writer]] = {}

    # --- what a LeaseKeeper calls --------------------------------------------------------------

    def reserve(
        self,
        lease_id: bytes,
        prompt: Sequence[int],
        num_choices: int,
        root_key: bytes,
        *,
        bound: int,
        tenant: str,
        is_computed_here: bool,
    ) -> int | None:
        """Blocks for the prompt and one token more; the cached prefix leaves one token to compute."""
        keys = self.prefix_keys(root_key, prompt)
        num_hit = self.pool.open(lease_id, keys, self.pool.blocks_for(len(prompt) + 1))
        if num_hit is None:
            return None
        self.owners.add(lease_id)
        self._prompts[lease_id] = tuple(prompt)
        return num_hit * BLOCK_TOKENS

    def prefix_keys(self, root_key: bytes, prompt: Sequence[int]) -> list[bytes]:
        """Of the full blocks that leave one token to compute."""
        return keys_of(root_key, tuple(prompt))[: (len(prompt) - 1) // BLOCK_TOKENS]

    def seal_prefix(self, lease_id: bytes, keys: Sequence[bytes], num_blocks: int, fidelity: int) -> None:
        """Key what landed of a lease that was not committed; it must be right."""
        assert fidelity == 0
        for index in range(len(self.pool.keys(lease_id)), num_blocks):
            entries = range(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
            self.check_content(lease_id, self._prompts[lease_id], entries)
            self.pool.seal(lease_id, keys[index])
            self.num_salvaged += 1

    def stop(self, lease_id: bytes) -> None:
        """Nothing computes by itself here."""

    def sealed_keys(self, lease_id: bytes) -> Sequence[list[bytes]]:
        """Nobody is told here what stays cached."""
        return ()

    def release(self, lease_id: bytes) -> None:
        if lease_id in self.owners:
            self.owners.discard(lease_id)
            self._prompts.pop(lease_id, None)
            self.pool.close(lease_id)

    # --- bytes ---------------------------------------------------------------------------------

    def pin(self, owner: bytes, keys: Sequence[bytes]) -> None:
        """Hold cached blocks, for somebody who reads them."""
        assert self.pool.open(owner, keys, len(keys)) == len(keys)
        self.owners.add(owner)

    def locate(self, owner: bytes, piece: Piece) -> list[tuple[int, str, int, int]]:
        """Where the piece's entries lie now, as a store looks it up once before it writes."""
        blocks = self.pool.blocks(owner)
        return [
            (blocks[e // BLOCK_TOKENS], plane, layer, e % BLOCK_TOKENS)
            for plane, layer, e in places_of(piece)
        ]

    def write(self, places: Sequence[tuple[int, str, int, int]], data: bytes, writer: Writer) -> None:
        """Only into blocks that are private to the writer's lease at this moment."""
        assert writer.lease_id in self.owners, "written for a lease whose memory was given back"
        blocks = self.pool.blocks(writer.lease_id)
        private = blocks[len(self.pool.keys(writer.lease_id)) :]
        for index, place in enumerate(places):
            assert place[0] in private, f"block {place[0]} is not private to the lease that writes it"
            self._entries[place] = (data[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES], writer)

    def read(self, owner: bytes, piece: Piece) -> bytes:
        return b"".join(self._entries[place][0] for place in self.locate(owner, piece))

    def writers(self, owner: bytes, piece: Piece) -> set[Writer]:
        return {self._entries[place][1] for place in self.locate(owner, piece)}

    def check_content(self, owner: bytes, prompt: tuple[int, ...], entries: range) -> None:
        """Every byte of those entries is what the prompt's cache must be."""
        for piece in whole(entries) if entries else ():
            for place, (plane, layer, entry) in zip(self.locate(owner, piece), places_of(piece), strict=True):
                assert self._entries[place][0] == _expected(prompt, (plane, layer, entry)), (
                    f"position {entry} of {plane} is not the prompt's"
                )

    def seal(self, owner: bytes, prompt: tuple[int, ...], root: bytes, num_tokens: int) -> None:
        """Key the full blocks below `num_tokens`; what is keyed must be right."""
        keys = keys_of(root, prompt)
        for index in range(len(self.pool.keys(owner)), num_tokens // BLOCK_TOKENS):
            self.check_content(owner, prompt, range(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS))
            self.pool.seal(owner, keys[index])


def _expected(prompt: tuple[int, ...], place: Place) -> bytes:
    plane, layer, entry = place
    return entry_bytes(prompt[: entry + 1], plane, layer)
