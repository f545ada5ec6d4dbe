"""A field's numbers in parts that fit into a core's cache: each pass over a part finds it there, and a piece of a
million numbers does not go through memory once per pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from kvtransfer.codecs.fieldwise import FieldBox

PART_NUMBERS = 1 << 19  # 2 MiB as float32: smaller ones cost more calls than they save memory traffic


class Part(NamedTuple):
    """Some layers whole, or some entries of one layer: a run of rows [layer · entry] either way."""

    layers: slice
    entries: slice
    rows: slice


def parts(box: FieldBox, device: torch.device, multiple: int = 1) -> Iterator[Part]:
    """Parts of `box` in order; entries are cut at multiples of `multiple` only. An accelerator takes all at once."""
    per_layer = box.entries * box.columns
    if device.type != "cpu":
        yield Part(slice(0, box.layers), slice(0, box.entries), slice(0, box.rows))
    elif per_layer <= PART_NUMBERS:
        at_once = max(1, PART_NUMBERS // per_layer)
        for first in range(0, box.layers, at_once):
            last = min(first + at_once, box.layers)
            rows = slice(first * box.entries, last * box.entries)
            yield Part(slice(first, last), slice(0, box.entries), rows)
    else:
        at_once = max(1, PART_NUMBERS // box.columns // multiple) * multiple
        for layer in range(box.layers):
            for first in range(0, box.entries, at_once):
                last = min(first + at_once, box.entries)
                rows = slice(layer * box.entries + first, layer * box.entries + last)
                yield Part(slice(layer, layer + 1), slice(first, last), rows)
