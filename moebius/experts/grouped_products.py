"""Matrix products over rows that are sorted by expert: one product an expert, written into one result.

E experts, S rows, `offsets` [E] int32: where each expert's rows end; rows past the last offset belong to no expert and
come out as zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupedProducts:
    """The three products of a linear layer, forward and backward, for one order of rows."""

    def __init__(self, offsets: Tensor):
        self.offsets = offsets
        # the CPU has no grouped kernel: F.grouped_mm is a loop there too, one that wants 16-byte strides
        self._lengths = _lengths(offsets.tolist()) if offsets.device.type == "cpu" else None

    def times_transposed(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows [S, in] times weight [E, out, in], transposed, plus bias [E, out]: [S, out]."""
        return self._times(rows, weight.transpose(1, 2), bias)

    def times(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [S, out] times weight [E, out, in]: [S, in]."""
        return self._times(rows, weight)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """left [S, out], transposed, times right [S, in], an expert's rows with each other: [E, out, in]."""
        if self._lengths is None:
            return F.grouped_mm(left.t(), right, offs=self.offsets)
        result = left.new_empty(len(self.offsets), left.shape[1], right.shape[1])
        # all views at once: taken one by one in the loop they cost a third of a small product
        views = zip(left.t().split(self._split(left), dim=1), right.split(self._split(right)), result, strict=False)
        for ours, theirs, out in views:
            torch.mm(ours, theirs, out=out)
        return result

    def own_rows(self, rows: Tensor) -> Tensor:
        """rows [S, ...] with zeros where no expert owns them."""
        places = torch.arange(len(rows), device=rows.device)
        return rows.where((places < self.offsets[-1]).unsqueeze(-1), 0)

    def of_rows(self, vectors: Tensor, rows: int) -> Tensor:
        """vectors [E, out] -> [S, out]: that of each row's own expert, zeros for rows that belong to none."""
        padded = torch.cat((vectors, vectors.new_zeros(1, vectors.shape[1])))
        return padded.index_select(0, self.experts_of_rows(rows))

    def experts_of_rows(self, rows: int) -> Tensor:
        """[S] int64: the expert of each row, E for rows that belong to none."""
        places = torch.arange(rows, device=self.offsets.device, dtype=self.offsets.dtype)
        return torch.searchsorted(self.offsets, places, right=True)

    def _times(self, rows: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows [S, a] times matrices [E, a, b], plus bias [E, b]: [S, b]."""
        if self._lengths is None:
            # grouped_mm neither skips foreign rows nor writes their results, and takes no bias
            result = self.own_rows(F.grouped_mm(self.own_rows(rows), matrices, offs=self.offsets))
            return result if bias is None else result + self.of_rows(bias, len(rows))
        result = rows.new_empty(len(rows), matrices.shape[2])
        lengths = self._split(rows)
        biases = [None] * len(matrices) if bias is None else bias.unbind()
        views = zip(rows.split(lengths), matrices.unbind(), biases, result.split(lengths), strict=False)
        for ours, matrix, own_bias, out in views:
            if len(ours):
                _multiply(ours, matrix, own_bias, out)
        result[len(rows) - lengths[-1] :] = 0
        return result

    def _split(self, rows: Tensor) -> list[int]:
        """How many rows each expert has, and last those that belong to none."""
        lengths = self._lengths or []
        return [*lengths, len(rows) - sum(lengths)]


def _multiply(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Into `out`; with a bias, rounded once, as a linear layer's."""
    if bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)


def _lengths(offsets: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *offsets], offsets, strict=False)]
