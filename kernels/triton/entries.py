"""Look pages up 32 at a time: each lane of a warp keeps an entry of the block table, and tiles of keys ask the lanes.

A tile of 64 keys in blocks of 16 has four pages. Looked up key by key and tile by tile they took a third of the
instructions of a decode's loop, and the loads of keys waited for them: Triton's pipeline puts a look-up into the step
of the loads that need it, also where the loop looks a step ahead. So 32 entries are read at a time, 32 ahead, and a
tile has those of its pages by a shuffle, which needs no memory. On an H200 blocks of 16 cost 5 % more time than blocks
of 64 before, and 1 % with this (2026-11-30).

To Triton an entry is one number for all threads of a program. In truth every lane has its own, so nothing but
`pages_at` may use them. Where nothing is compiled (ASM off) a tensor of 32 stands for the lanes.
"""

import triton
import triton.language as tl


@triton.jit
def _lane(ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.arange(0, 32)


@triton.jit
def _entry(entries, lane, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [entries, lane], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        return tl.sum(tl.where(tl.arange(0, 32) == lane, entries, 0), 0)


@triton.jit
def first_entries(begin, end, table, PAGE: tl.constexpr, ASM: tl.constexpr):
    """Return the entries among which those of the token `begin` are, and the 32 after; read before `end` only."""
    entry = begin // PAGE // 32 * 32 + _lane(ASM)
    entries = tl.load(table + entry, mask=entry * PAGE < end, other=0)
    entry += 32
    return entries, tl.load(table + entry, mask=entry * PAGE < end, other=0)


@triton.jit
def next_entries(entries, following, start, end, table, PAGE: tl.constexpr, ASM: tl.constexpr):
    """Return the entries of the tile that begins at `start`, those of the tile before given, and the 32 after."""
    over = start % (32 * PAGE) == 0
    entry = start // PAGE + 32 + _lane(ASM)
    more = tl.load(table + entry, mask=over & (entry * PAGE < end), other=following)
    return tl.where(over, following, entries), more


@triton.jit
def pages_at(entries, start, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr):
    """Return what the table has of the pages of the tokens [start, start + BLOCK_N), which have no other page."""
    lane = start // PAGE % 32
    pages = (_entry(entries, lane, ASM),)
    for i in tl.static_range(1, BLOCK_N // PAGE):
        pages = pages + (_entry(entries, lane + i, ASM),)  # type: ignore[assignment]  # noqa: RUF005
    return pages


@triton.jit
def _block(page, num_blocks, stride_block):
    """Return where a block begins: one of the cache, whatever the table holds."""
    return tl.minimum(tl.maximum(page, 0), num_blocks - 1).to(tl.int64) * stride_block


@triton.jit
def tokens_at(cache, pages, num_blocks, stride_block, stride_slot, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return pointers (BLOCK_N,) to the tokens of these pages in a cache."""
    n = tl.arange(0, BLOCK_N)
    block = tl.zeros([BLOCK_N], tl.int64) + _block(pages[0], num_blocks, stride_block)
    # Which page a thread's key is in is known when this is compiled: nothing is left of the choice.
    for i in tl.static_range(1, BLOCK_N // PAGE):
        block = tl.where(n // PAGE == i, _block(pages[i], num_blocks, stride_block), block)
    return cache + block + n % PAGE * stride_slot
