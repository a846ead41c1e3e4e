"""Offsets of grouped products on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def group_of_rows(offs: Tensor, rows: int) -> Tensor:
    """Return the group of each row, E for rows past the last one; on the device, int64."""
    positions = torch.arange(rows, device=offs.device, dtype=offs.dtype)
    return torch.searchsorted(offs, positions, right=True)
