"""Ranges of elements as rectangles."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.checkpoint import Region, regions_of_range


@settings(max_examples=300)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_rectangles_are_the_range_in_row_major_order(sizes, data):
    offsets = tuple(data.draw(st.integers(0, 3)) for _ in sizes)
    whole = Region(offsets, tuple(sizes))
    numel = math.prod(sizes)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    tensor = torch.full([offset + size for offset, size in zip(offsets, sizes, strict=True)], -1)
    inner = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
    inner.copy_(torch.arange(numel).view(sizes))
    seen = []
    for region, low, high in regions_of_range(whole, start, stop):
        part = tensor[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))]
        assert part.reshape(-1).tolist() == list(range(low, high))
        assert region.numel == high - low
        seen += range(low, high)
    assert seen == list(range(start, stop))
