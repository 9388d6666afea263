"""The tensor maps of a latent decode kernel: boxes of packed rows of Q, and of a page's latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.mla_decode.config import LATENT_PARTS, PART_DIM, PARTS, MlaDecodeConfig


class TensorMaps(NamedTuple):
    """TMA atoms: boxes of a part of Q's rows, of both its tensors, and boxes of a part of a page's rows."""

    q: cute.CopyAtom
    q_rope: cute.CopyAtom
    latent: cute.CopyAtom


@dataclass(frozen=True)
class MapMaker:
    """Makes them from a call's tensors."""

    config: MlaDecodeConfig

    def make(self, mQ: cute.Tensor, mQRope: cute.Tensor, mLatent: cute.Tensor) -> TensorMaps:
        """All of them.

        Args:
            mQ, mQRope: (total_q, num_heads, 512) and (total_q, num_heads, 64), any strides but the last.
            mLatent: (num_pages, page_size, 576), likewise.
        """
        return TensorMaps(self._query_tma(mQ, LATENT_PARTS), self._query_tma(mQRope, 1), self._latent_tma(mLatent))

    def _query_tma(self, q: cute.Tensor, parts: int) -> cute.CopyAtom:
        """TMA of a box of packed rows, one part of each: heads of a token, or all heads of several tokens. Rows past a sequence's end are
        another's or zeros; nothing of theirs is stored."""
        c = self.config
        modes = {
            "head": (c.box_heads, PART_DIM, q.shape[1], q.stride[1]),
            "token": (c.box_tokens, PART_DIM * c.box_heads, q.shape[0], q.stride[0]),
            "part": (1, PART_DIM * c.box_heads * c.box_tokens, parts, PART_DIM),
        }
        chosen = [modes[mode] for mode in query_modes(c, parts > 1)]
        boxes, box_strides, extents, strides = zip(*chosen, strict=True)
        return self._part_tma(q, boxes, box_strides, extents, strides, cute.make_swizzle(3, 4, 3))

    def _latent_tma(self, latent: cute.Tensor) -> cute.CopyAtom:
        """TMA of a box of a page's rows, one part of each; e4m3 numbers row by row as they are."""
        rows = self.config.box_rows
        swizzle = cute.make_swizzle(self.config.latent_swizzle_bits, 4, 3)
        return self._part_tma(
            latent, (rows, 1, 1), (PART_DIM, PART_DIM * rows, PART_DIM * rows), (latent.shape[1], PARTS, latent.shape[0]),
            (latent.stride[1], PART_DIM, latent.stride[0]), swizzle,
        )  # fmt: skip

    def _part_tma(
        self, tensor: cute.Tensor, boxes: tuple, box_strides: tuple, extents: tuple, strides: tuple, swizzle: cute.Swizzle
    ) -> cute.CopyAtom:
        """TMA whose boxes are rows of a part, one behind the other."""
        rows_first = cute.make_tensor(tensor.iterator, cute.make_layout((PART_DIM, *extents), stride=(1, *strides)))
        shape = (PART_DIM, *boxes)
        box = cute.make_composed_layout(swizzle, 0, cute.make_layout(shape, stride=(1, *box_strides)))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), rows_first, box, shape)[0]


def query_modes(config: MlaDecodeConfig, has_parts: bool) -> list[str]:
    """Dimensions 1, 2, ... of a tensor map of Q. The compiler moves those that a box has one of behind the others: so does this."""
    counts = {"head": config.box_heads, "token": config.box_tokens} | ({"part": 1} if has_parts else {})
    return sorted(counts, key=lambda mode: counts[mode] == 1)
