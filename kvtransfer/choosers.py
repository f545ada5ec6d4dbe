"""Makes the chooser of each transfer of a worker, and remembers what all of them learn.

One `CodecChoosers` per process. It holds the book of the codecs' speeds, one link estimate for each incarnation of
another worker (the ones used longest ago are forgotten first), and the rule what a profile's codec becomes under a
bound on fidelity.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from kvtransfer.auto import AutoCodec
from kvtransfer.choice import FixedCodec
from kvtransfer.codec_speed import dtype_label, probe_codecs
from kvtransfer.codecs import CODECS, Fidelity, UnknownCodec
from kvtransfer.link_estimate import LinkEstimate

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from kvtransfer.choice import CodecChooser
    from kvtransfer.codec_speed import SpeedBook
    from kvtransfer.codecs import Codec
    from kvtransfer.layouts import CacheLayout

AUTO = "auto"
MAX_LINKS = 256


class CodecChoosers:
    """Safe to call from several threads. `busy`: share of this side's cores that others than transfers use, 0 to 1
    (`BusyCores`, over the same `book`). `codecs`: those of this build unless given.
    """

    def __init__(
        self,
        book: SpeedBook,
        busy: Callable[[], float],
        clock: Callable[[], float],
        codecs: Sequence[Codec] = CODECS,
        max_links: int = MAX_LINKS,
    ) -> None:
        self._book = book
        self._busy = busy
        self._clock = clock
        self._codecs = tuple(codecs)
        self._max_links = max_links
        self._links: OrderedDict[tuple[str, int], LinkEstimate] = OrderedDict()
        self._lock = threading.Lock()

    def probe(self, layout: CacheLayout, bound: str = Fidelity.COMPACT, device: str = "cpu") -> None:
        """Measures the codecs within a fidelity class on made-up contents of such a cache; once, at start, some
        milliseconds per codec."""
        allowed = [codec for codec in self._codecs if Fidelity(bound).allows(codec.fidelity)]
        probe_codecs(self._book, allowed, layout, self._clock, device)

    def check(self, name: str, bounds: Iterable[str]) -> None:
        """A profile's codec and fidelity. Raises UnknownCodec, or ValueError for a bound that is no fidelity class."""
        strictest(bounds)
        if name != AUTO and all(codec.name != name for codec in self._codecs):
            raise UnknownCodec(name, None)

    def chooser_for(
        self,
        name: str,
        bounds: Iterable[str],
        *,
        peer: tuple[str, int],
        layout: CacheLayout,
        spoken: Collection[tuple[str, int]] | None = None,
        total_bytes: int | None = None,
        shares_memory: bool = False,
    ) -> CodecChooser:
        """For one transfer to `peer` (address and epoch) of a cache of `layout`, in the dtypes that travel.

        `name`: "auto" or a codec. `bounds`: fidelity classes of profile and request, the strictest counts; empty ones
        are no bound. `spoken`: (name, version) of the codecs that the peer decodes; None where it is of this build.
        `total_bytes`: raw bytes that the transfer will have, where the prompt is still being computed.
        `shares_memory`: the peer is on this machine. Then `auto` takes what costs least, since both ends' work comes
        out of the same cores and memory is faster than any codec.

        A codec that may not be taken gives way to the best exact one, and the reasons say so. Raises UnknownCodec, or
        ValueError for a bound that is no fidelity class, or where the two sides have no exact codec in common.
        """
        self.check(name, ())
        bound = strictest(bounds)
        common = self._newest_common(spoken)
        preface = ""
        if name != AUTO:
            wanted = next((codec for codec in common if codec.name == name), None)
            if wanted is not None and bound.allows(wanted.fidelity):
                return FixedCodec(wanted, f"{name}: named by the profile")
            why = "the receiver does not speak it"
            if wanted is not None:
                why = f"it is {wanted.fidelity}, the bound is {bound}"
            preface = f"{name} may not be taken, {why}; "
            bound = Fidelity.EXACT
        allowed = [codec for codec in common if bound.allows(codec.fidelity)]
        if not allowed:
            raise ValueError(f"no codec within fidelity {bound} is spoken by both this worker and {peer[0]}")
        if shares_memory:
            cheapest = allowed[0]
            return FixedCodec(
                cheapest, f"{preface}{cheapest.name}: through shared memory, faster than any codec"
            )
        return AutoCodec(
            allowed,
            dtype=dtype_label(layout),
            book=self._book,
            link=self.link(peer),
            busy=self._busy,
            clock=self._clock,
            total_bytes=total_bytes,
            preface=preface,
        )

    def link(self, peer: tuple[str, int]) -> LinkEstimate:
        """What is known of the way to an incarnation of a worker; shared by all transfers to it."""
        with self._lock:
            estimate = self._links.get(peer)
            if estimate is None:
                estimate = self._links[peer] = LinkEstimate(self._clock)
                if len(self._links) > self._max_links:
                    self._links.popitem(last=False)
            self._links.move_to_end(peer)
            return estimate

    def _newest_common(self, spoken: Collection[tuple[str, int]] | None) -> list[Codec]:
        """By name the newest version that both sides speak, in this build's order."""
        newest: dict[str, Codec] = {}
        for codec in self._codecs:
            if spoken is not None and (codec.name, codec.version) not in spoken:
                continue
            if codec.name not in newest or codec.version > newest[codec.name].version:
                newest[codec.name] = codec
        return list(newest.values())


def strictest(bounds: Iterable[str]) -> Fidelity:
    """The strictest of some bounds; empty ones do not count, none at all means exact.

    Raises ValueError for one that is no fidelity class.
    """
    return min(
        (Fidelity(bound) for bound in bounds if bound), key=list(Fidelity).index, default=Fidelity.EXACT
    )
