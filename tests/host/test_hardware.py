"""Swizzled rows of shared memory, against the widths and bits of PTX ISA, "Swizzling modes"."""

import pytest

from fa4_backend.kernels.common.hardware import SWIZZLED_ROWS, swizzle_bits, widest_row


def test_the_bits_that_a_swizzle_changes() -> None:
    assert [swizzle_bits(row_bytes) for row_bytes in SWIZZLED_ROWS] == [3, 2, 1]


@pytest.mark.parametrize(
    ("num_bytes", "row_bytes"), [((256,), 128), ((192,), 64), ((96,), 32), ((384, 256), 128), ((192, 128), 64), ((192, 96), 32)]
)
def test_the_widest_row_divides_all_heads(num_bytes: tuple[int, ...], row_bytes: int) -> None:
    assert widest_row(*num_bytes) == row_bytes


def test_heads_of_no_whole_row_are_none_of_ours() -> None:
    with pytest.raises(AssertionError, match=r"expected multiples of 32, got \(128, 80\)"):
        widest_row(128, 80)
