"""Places held as gaps are the places, in the space that is promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.tune.selector.places import Places


@given(st.sets(st.integers(0, 2**31 - 1), max_size=60), st.sampled_from([torch.int32, torch.int64]))
def test_they_come_back_as_they_were(numbers: set[int], dtype: torch.dtype) -> None:
    places = torch.tensor(sorted(numbers), dtype=dtype)
    held = Places(places)
    assert len(held) == len(numbers) and held.dtype == dtype
    assert torch.equal(held.tensor(), places) and held.tensor().dtype == dtype
    assert torch.equal(held.to("cpu").tensor(), places)


@pytest.mark.parametrize("far", [2**31 - 1, 2**40])
def test_beyond_32_bits_and_far_from_the_start(far: int) -> None:
    places = torch.tensor([far, far + 1, far + 2**15])
    held = Places(places)
    assert torch.equal(held.tensor(), places) and held.nbytes == 2 * len(places)


def test_two_bytes_each_unless_a_gap_is_too_wide() -> None:
    close = torch.arange(0, 10**6, 2**15 - 1, dtype=torch.int32)
    assert Places(close).nbytes == 2 * len(close)
    wide = torch.arange(0, 10**6, 2**15, dtype=torch.int32)
    assert Places(wide).nbytes == 4 * len(wide) and torch.equal(Places(wide).tensor(), wide)
    assert Places(close[:0]).nbytes == 0
