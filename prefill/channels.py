"""Channels to decode workers, one per incarnation, shared by the prompts that go there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import grpc

from kvtransfer.transports.grpc_channel import open_bulk_channel

MAX_IDLE_CHANNELS = 16


class PeerChannels:
    """Opens a channel at first use and keeps it while that incarnation of the peer is in use or was lately.

    A channel is closed when it is not in use and its peer has started anew, has failed, or has not been
    used for the longest of more than `max_idle`. Used on the service loop only.
    """

    def __init__(
        self,
        max_idle: int = MAX_IDLE_CHANNELS,
        open_channel: Callable[[str], grpc.Channel] = open_bulk_channel,
    ) -> None:
        self._max_idle = max_idle
        self._open = open_channel
        self._channels: OrderedDict[tuple[str, int], grpc.Channel] = OrderedDict()
        self._uses: dict[tuple[str, int], int] = {}
        self._newest: dict[str, int] = {}

    def acquire(self, address: str, epoch: int) -> grpc.Channel:
        """The channel to that incarnation; `release` must follow."""
        peer = (address, epoch)
        self._newest[address] = epoch
        if peer not in self._channels:
            self._channels[peer] = self._open(address)
        self._channels.move_to_end(peer)
        self._uses[peer] = self._uses.get(peer, 0) + 1
        self._trim()
        return self._channels[peer]

    def release(self, address: str, epoch: int, *, failed: bool = False) -> None:
        """Give a channel back; `failed`: the transfer failed, so that the next one connects anew."""
        peer = (address, epoch)
        self._uses[peer] -= 1
        if failed and self._newest.get(address) == epoch:
            del self._newest[address]
        self._trim()

    def close(self) -> None:
        """Close every channel."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._uses.clear()
        self._newest.clear()

    def _trim(self) -> None:
        idle = [peer for peer in self._channels if not self._uses.get(peer)]
        outdated = [peer for peer in idle if self._newest.get(peer[0]) != peer[1]]
        current = [peer for peer in idle if peer not in outdated]
        for peer in (*outdated, *current[: max(0, len(current) - self._max_idle)]):
            self._channels.pop(peer).close()
            self._uses.pop(peer, None)
            if self._newest.get(peer[0]) == peer[1]:
                del self._newest[peer[0]]
