"""What a grouped product of others leaves unwritten is zero, and nothing else is touched; by the interpreter."""

from __future__ import annotations

import pytest
import torch

from vllm_accel.kernels.triton.clear import clear_launch
from vllm_accel.kernels.triton.launch import run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ends", [[0, 0, 0], [3, 3, 5], [1, 30, 40], [40, 40, 40]])
def test_rows_past_the_last_group(dtype: torch.dtype, ends: list[int]) -> None:
    guarded = torch.full((44, 300), 7.0).to(dtype)
    run(clear_launch(guarded[2:42], torch.tensor(ends, dtype=torch.int32)))
    written = ends[-1] + 2
    assert bool((guarded[:written] == 7).all()) and not guarded[written:42].any() and bool((guarded[42:] == 7).all())


@pytest.mark.parametrize("ends", [[0, 0, 0], [3, 3, 5], [0, 9, 9], [1, 2, 3]])
def test_groups_without_rows(ends: list[int]) -> None:
    guarded = torch.full((5, 70, 130), 7.0)
    run(clear_launch(guarded[1:4], torch.tensor(ends, dtype=torch.int32)))
    for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        assert bool((guarded[1 + group] == (0 if begin == end else 7)).all())
    assert bool((guarded[[0, 4]] == 7).all())
