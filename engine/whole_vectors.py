"""Functions of single numbers, the same wherever in a tensor a number lies.

torch computes exponentials and their kin several at a time, and what is left over at the end of a thread's share one
by one, with another rounding. Here nothing is left over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LANES = 64  # a multiple of every processor's vector, unrolled
_SHARE_NUMBERS = 32768  # torch's own: fewer numbers are one thread's


def in_whole_vectors(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function`, which maps every number by itself, of a contiguous float32 tensor."""
    length = x.numel()
    padded = _padded(length)
    if x.device.type != "cpu" or padded == length:
        return function(x)
    room = x.new_zeros(padded)
    room[:length] = x.reshape(-1)
    return function(room)[:length].view(x.shape)


def sum_in_order(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum along `dim`, by halves: its order depends on the number of terms alone."""
    length = x.shape[dim]
    while length > 1:
        half = length // 2
        head = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat((head, x.narrow(dim, 2 * half, 1)), dim) if length % 2 else head
        length = x.shape[dim]
    return x.squeeze(dim)


def _padded(length: int) -> int:
    while True:
        shares = min(torch.get_num_threads(), -(-length // _SHARE_NUMBERS)) or 1
        padded = -(-length // (_LANES * shares)) * _LANES * shares
        if padded == length:
            return length
        length = padded
