"""How far a sequence is computed, and which pieces of it have not been cut yet.

Pure. Positions become ready chunk by chunk; the chunk that is being computed becomes ready layer by layer, so
that its first layers travel while its last ones are computed. Every piece is cut exactly once.
"""

from __future__ import annotations

from kvtransfer.layouts import CacheLayout, Piece, pieces_for


class PushProgress:
    """Positions from `start_token` on, as they become ready. Pieces hold at most about `frame_bytes`, and cross no
    multiple of `align_tokens` where that is given."""

    def __init__(
        self, layout: CacheLayout, start_token: int, frame_bytes: int, align_tokens: int | None = None
    ) -> None:
        self._layout = layout
        self._frame_bytes = frame_bytes
        self._align_tokens = align_tokens
        self._ready = start_token  # positions below are computed in every layer
        self._cut = start_token  # and positions below this are cut in every layer
        self._part = (start_token, 0)  # (end, n): positions up to `end` are computed in the first n layers
        self._part_cut = (start_token, 0)  # and cut in so many
        # Layers are counted as the model counts them, which only planes of every layer do.
        counts = {plane.layers for plane in layout.planes}
        self._num_layers = counts.pop() if len(counts) == 1 else None

    @property
    def num_ready(self) -> int:
        """Positions below are computed in every layer."""
        return self._ready

    @property
    def num_cut(self) -> int:
        """Positions below are cut in every layer."""
        return self._cut

    def advance(self, num_tokens: int, num_layers: int | None = None) -> bool:
        """Positions below `num_tokens` are ready, in the first `num_layers` layers or in all; whether that is news."""
        if num_layers is None:
            news = num_tokens > self._ready
            self._ready = max(self._ready, num_tokens)
            return news
        if self._num_layers is None or num_tokens <= self._ready or (num_tokens, num_layers) <= self._part:
            return False
        self._part = (num_tokens, num_layers)
        return True

    def take(self) -> list[Piece]:
        """Cut what became ready since the last call."""
        pieces: list[Piece] = []
        end, num_layers = self._part_cut
        if end > self._cut and self._ready >= end:
            pieces += self._pieces(range(self._cut, end), range(num_layers, self._num_layers or 0))
            self._cut = end
        if end <= self._cut < self._ready:
            pieces += self._pieces(range(self._cut, self._ready))
            self._cut = self._ready
        pieces += self._take_part()
        return pieces

    def _take_part(self) -> list[Piece]:
        end, num_layers = self._part
        if end <= self._cut:
            return []
        cut_end, num_cut = self._part_cut
        first = num_cut if cut_end == end else 0
        if cut_end > self._cut and cut_end != end:
            return []  # another chunk is cut in part: its rest goes first
        self._part_cut = self._part
        return self._pieces(range(self._cut, end), range(first, num_layers))

    def _pieces(self, tokens: range, layers: range | None = None) -> list[Piece]:
        return pieces_for(self._layout, tokens, self._frame_bytes, layers, self._align_tokens)
