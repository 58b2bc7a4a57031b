"""What encoding a text gives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moebius.errors import ArgumentError

if TYPE_CHECKING:
    import torch


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask` (1 real, 0 padding), as lists or int64 tensors [B, T]; `**` it into generate."""

    @property
    def input_ids(self) -> Any:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        return self["attention_mask"]

    def to(self, device: "torch.device | str | int") -> "BatchEncoding":
        """The same with its tensors on `device`; lists cannot move, so return_tensors="pt" must have been asked for."""
        return BatchEncoding({name: tensor.to(device) for name, tensor in self.items()})


def pad_rows(
    rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], length: int, pad_id: int, side: str
) -> BatchEncoding:
    """Rows made `length` long, masked by 0 where padded; a row that is longer already stays as it is."""
    gaps = [max(0, length - len(row)) for row in rows]
    if side == "left":
        ids = [[pad_id] * gap + list(row) for gap, row in zip(gaps, rows, strict=True)]
        padded = [[0] * gap + list(mask) for gap, mask in zip(gaps, masks, strict=True)]
    else:
        ids = [list(row) + [pad_id] * gap for gap, row in zip(gaps, rows, strict=True)]
        padded = [list(mask) + [0] * gap for gap, mask in zip(gaps, masks, strict=True)]
    return BatchEncoding(input_ids=ids, attention_mask=padded)


def as_tensors(encoding: BatchEncoding) -> BatchEncoding:
    """Lists of rows as int64 tensors [B, T]. Raises ArgumentError when the rows differ in length."""
    import torch

    lengths = {len(row) for row in encoding.input_ids}
    if len(lengths) > 1:
        raise ArgumentError(
            f"rows of {min(lengths)} to {max(lengths)} tokens make no tensor", advice="pass padding=True, or one text"
        )
    return BatchEncoding({name: torch.tensor(rows, dtype=torch.int64) for name, rows in encoding.items()})
