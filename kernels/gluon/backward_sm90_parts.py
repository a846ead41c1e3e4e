"""What the two kernels of the backward pass for Hopper share: tiles, their order, products, and one grid after another.

The dQ kernel starts as soon as the last blocks of the dK and dV kernel have: it reads nothing of theirs, and takes the
multiprocessors that they leave.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
)

from vllm_accel.kernels.gluon.forward_sm90 import partition_barrier
from vllm_accel.kernels.gluon.tiles_sm90 import ROWS, turns


@gluon.jit
def let_next_grid_start():
    """The next grid of the stream, if launched early, may start when all blocks of this one have come here."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, $1;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for_grid_before():
    """Wait until the grid before this one, if this one was launched early, has ended and written all its results."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, $1;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def in_groups(index, tiles, VARLEN: gl.constexpr):
    """Return the tile (packed: the slot), batch and head of a block of threads."""
    tiles_per_head, heads_together, num_sequences, num_heads, _, _, _, _ = tiles
    heads = num_heads
    if not VARLEN:
        heads = num_heads * num_sequences
    group = index // (tiles_per_head * heads_together)
    inside = index - group * (tiles_per_head * heads_together)
    width = gl.minimum(heads_together, heads - group * heads_together)
    tile = inside // width
    head = group * heads_together + inside - tile * width
    batch = 0
    if not VARLEN:
        batch = head // num_heads
        head -= batch * num_heads
    return tile, batch, head


@gluon.jit
def turns_of_block(tiles, VARLEN: gl.constexpr, PERSISTENT: gl.constexpr):
    """Return how many tiles this block of threads works on."""
    tiles_per_head, _, num_sequences, num_heads, _, _, _, _ = tiles
    total = tiles_per_head * num_heads
    if not VARLEN:
        total *= num_sequences
    return turns(total, PERSISTENT)


@gluon.jit
def product(a, b, BM: gl.constexpr):
    """Issue A B^T, without waiting for it."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    zero = gl.zeros([ROWS, BM], gl.float32, S)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def products(a, b, c, d, BM: gl.constexpr):
    """Issue A C^T and B D^T, without waiting for them."""
    first = product(a, c, BM)
    second = product(b, d, BM)
    return first, second


@gluon.jit
def operand(x, D: gl.constexpr, dtype: gl.constexpr):
    """Return what came out of a product as the left operand of one with D columns."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, O, 2), assert_trivial=True)


@gluon.jit
def store_tile(sum, tile, out, row, length, out_row, D: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Write 64 rows from registers, by way of shared memory that nobody else uses, so that lines are whole."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    partition_barrier()
    tile.store(sum.to(tile.dtype))
    partition_barrier()
    result = tile.load(COPY)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    dims = gl.arange(0, D, gl.SliceLayout(0, COPY))
    mask = (rows < length - row)[:, None]
    if HEAD_DIM != D:
        mask = mask & (dims < HEAD_DIM)[None, :]
    gl.store(out + row.to(gl.int64) * out_row + rows[:, None] * out_row + dims[None, :], result, mask=mask)
