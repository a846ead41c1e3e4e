"""What every serving kernel does around its products: find its work, find its pages, read FP8, keep a softmax.

Rows of a tile are (token, head of the group) pairs, the head running fastest, so that one read of the keys serves all
heads that share them. Logits, and log-sum-exps between kernels, are in base 2. Flags in capitals are constexpr.
"""

import triton
import triton.language as tl

#: Fewer keys than this in a split cost more in launches and merging than the split saves (kernels that cut 256 tokens
#: into 29 parts were slower for it: sglang #35801).
MIN_SPLIT: tl.constexpr = tl.constexpr(256)
#: PAGE of keys that lie in no pages: as many of each sequence (B, S, H, D), or one sequence behind the other (T, H, D).
DENSE: tl.constexpr = tl.constexpr(0)
PACKED: tl.constexpr = tl.constexpr(-1)


# --- which part of the work ------------------------------------------------------------------------------------------


@triton.jit
def first_token(cu_seqlens, sequence, batch, tokens):
    """Return where a sequence begins, inside the tensor whatever cu_seqlens holds; without it all are equally long."""
    if cu_seqlens is None:
        return sequence * (tokens // batch)
    else:
        return tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), tokens)


@triton.jit
def find_sequence(region, cu_seqlens, batch, tokens, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (sequence, tile in it) of one of the ``tokens * GROUP // BLOCK_M + batch + 1`` regions of a launch.

    Sequence b owns the regions from ``cu[b] * GROUP // BLOCK_M + b`` on: at least as many as it has tiles, and nobody
    has to build a table. Sequence ``batch`` is made of the rows past the last one.
    """
    low = 0
    high = batch + 1
    while high - low > 1:
        middle = (low + high) // 2
        first = first_token(cu_seqlens, middle, batch, tokens)
        inside = first * GROUP // BLOCK_M + middle <= region
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle)
    first = first_token(cu_seqlens, low, batch, tokens)
    return low, tl.maximum(region - (first * GROUP // BLOCK_M + low), 0)


@triton.jit
def query_span(cu_seqlens, sequence, batch, tokens):
    """Return (first token, number of tokens), inside the tensor whatever cu_seqlens holds; see `find_sequence`.

    Without cu_seqlens all sequences are equally long: a dense call's are read from nowhere.
    """
    if cu_seqlens is None:
        count = tokens // batch
        return sequence * count, count
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence, mask=sequence <= batch, other=0), 0), tokens)
        after = tl.load(cu_seqlens + sequence + 1, mask=sequence < batch, other=tokens)
        return first, tl.minimum(tl.maximum(after, first), tokens) - first


@triton.jit
def keys_of(seqused_k, sequence, batch, limit, num_blocks, PAGE: tl.constexpr):
    """Return (block, count): where the keys of a sequence begin if they lie in no pages, and how many there are.

    Args:
        seqused_k: the counts, with PACKED cu_seqlens of the keys. limit: of each sequence at most; with DENSE exactly.
        num_blocks: of the cache; with PACKED tokens of it.
    """
    if PAGE == DENSE:
        return sequence, limit
    elif PAGE == PACKED:
        first, count = query_span(seqused_k, sequence, batch, num_blocks)
        return first, tl.where(sequence < batch, tl.minimum(count, limit), 0)
    else:
        used = tl.load(seqused_k + sequence, mask=sequence < batch, other=0)
        return sequence, tl.minimum(tl.maximum(used, 0), limit)


@triton.jit
def fair_share(seqused_k, batch, most, goal):
    """Return how many keys make a share: with as many of each, a mean sequence has `goal`.

    Lengths differ, and a launch ends with its longest program: so not sequences are cut into equally many parts, but
    all keys of the batch into equally long ones. No more than ``batch * (goal + 1)`` come of it (`shares`).

    Args:
        most: keys of a sequence that count, where a window hides the others.
    """
    total = 0.0
    for b in range(0, batch, 128):
        others = b + tl.arange(0, 128)
        used = tl.load(seqused_k + others, mask=others < batch, other=0)
        total += tl.sum(tl.minimum(tl.maximum(used, 0), most).to(tl.float32), 0)
    return tl.maximum(total / (batch * goal), 1.0)


@triton.jit
def shares(used, most, share):
    """Return into how many shares sequences of so many keys are cut: as many as they have, rounded, at least one."""
    keys = tl.minimum(tl.maximum(used, 0), most).to(tl.float32)
    return tl.maximum((keys / share + 0.5).to(tl.int32), 1)


@triton.jit
def find_share(index, seqused_k, batch, most, goal):
    """Return (sequence, which share of it, how many it has) of a share of a batch; sequence `batch` past the last."""
    share = fair_share(seqused_k, batch, most, goal)
    sequence = 0
    first = 0
    before = 0
    for b in range(0, batch, 128):
        others = b + tl.arange(0, 128)
        inside = others < batch
        used = tl.load(seqused_k + others, mask=inside, other=0)
        ends = before + tl.cumsum(tl.where(inside, shares(used, most, share), 0), 0)
        over = inside & (ends <= index)
        sequence += tl.sum(over.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(over, ends, 0), 0))
        before = tl.max(ends, 0)
    used = tl.load(seqused_k + sequence, mask=sequence < batch, other=0)
    return sequence, index - first, shares(used, most, share)


@triton.jit
def shares_of(sequence, seqused_k, batch, most, goal):
    """Return (the first of the shares of a sequence, how many it has)."""
    share = fair_share(seqused_k, batch, most, goal)
    first = 0
    for b in range(0, sequence, 128):
        others = b + tl.arange(0, 128)
        used = tl.load(seqused_k + others, mask=others < sequence, other=0)
        first += tl.sum(tl.where(others < sequence, shares(used, most, share), 0), 0)
    return first, shares(tl.load(seqused_k + sequence), most, share)


@triton.jit
def split_range(first, last, split, num_splits, count, FIXED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return [start, stop) of one split of the keys [first, last); start is a multiple of BLOCK_N, as first is.

    FIXED 0 shares out the keys that there really are, among `count` splits or as many as MIN_SPLIT allows. Otherwise
    split s holds keys ``s * FIXED`` to ``(s + 1) * FIXED``
    whatever the batch is made of, so that nothing but the sequence itself decides how a sum is formed; the last split
    takes what lies beyond.
    """
    if FIXED > 0:
        start = tl.maximum(split * FIXED, first)
        stop = tl.where(split == num_splits - 1, last, tl.minimum((split + 1) * FIXED, last))
    else:
        share = tl.maximum(tl.cdiv(last - first, count), MIN_SPLIT)
        share = tl.cdiv(share, BLOCK_N) * BLOCK_N
        start = first + split * share
        stop = tl.minimum(start + share, last)
    return start, stop


@triton.jit
def zero_rows(
    out, lse, index, count, first, tokens, num_heads, kv_head,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Give the tokens [first, tokens), which are of no sequence, 0 and -inf. `count` programs of a head share them."""
    columns = tl.arange(0, BLOCK_DV)
    for r in range(index * 16, (tokens - first) * GROUP, count * 16):
        rows = r + tl.arange(0, 16)
        token = first + rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        live = token < tokens
        at = (token.to(tl.int64) * num_heads + head)[:, None] * DV + columns[None, :]
        zeros = tl.zeros([16, BLOCK_DV], out.dtype.element_ty)
        tl.store(out + at, zeros, mask=live[:, None] & (columns < DV)[None, :])
        if lse is not None:
            tl.store(lse + head.to(tl.int64) * tokens + token, float("-inf"), mask=live)


# --- pages -----------------------------------------------------------------------------------------------------------


@triton.jit
def pages_of(start, end, table, num_blocks, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the pages of the tokens [start, start + BLOCK_N): one number where PAGE says that they share it.

    The table is read only before `end`, and its entries are kept inside the cache whatever they hold. Of a sequence
    without pages it is the number of its block.
    """
    if PAGE <= 0:
        return table
    elif PAGE % BLOCK_N == 0:  # start is a multiple of BLOCK_N
        page = tl.load(table + start // PAGE, mask=start < end, other=0)
        return tl.minimum(tl.maximum(page, 0), num_blocks - 1)
    else:
        n = start + tl.arange(0, BLOCK_N)
        page = tl.load(table + n // PAGE, mask=n < end, other=0)
        return tl.minimum(tl.maximum(page, 0), num_blocks - 1)


@triton.jit
def tokens_in(cache, page, start, stride_block, stride_slot, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return pointers (BLOCK_N,) to the tokens [start, start + BLOCK_N) in a cache, given their pages.

    Blocks are far apart (64 bits); within one, 32 bits do, which saves registers where the tile has one block.
    """
    if PAGE <= 0:
        slot = start + tl.arange(0, BLOCK_N)
    elif PAGE % BLOCK_N == 0:
        slot = start % PAGE + tl.arange(0, BLOCK_N)
    else:
        slot = (start + tl.arange(0, BLOCK_N)) % PAGE
    return cache + page.to(tl.int64) * stride_block + slot * stride_slot


@triton.jit
def within(live, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mask of a tile: live rows, and columns below WIDTH if the tile is wider (a mask costs registers)."""
    if WIDTH == BLOCK:
        return live[:, None]
    else:
        return live[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def widen(x, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Convert a tile to the dtype of the products, float16 for FP8.

    BITS: bytes of e4m3, on a chip that lacks the type; the result is then 1 / `BITS_SCALE` of the numbers. The seven
    bits below the sign land in a float16 with an exponent 8 too small (the biases are 15 and 7), which holds every e4m3
    number exactly, the subnormal ones too. All ones is NaN.
    """
    if BITS:
        bits = x.to(tl.uint16)
        low = bits & 0x7F
        half = (((bits & 0x80) << 8) | (low << 7)).to(tl.float16, bitcast=True)
        return tl.where(low == 0x7F, float("nan"), half).to(DTYPE)
    else:
        return x.to(DTYPE)


#: Of two integers of 16 bits, $2: the low bytes become $0, the high ones $1. An e5m2 is the upper half of a float16.
_E4M3_HALVES: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a; .reg .b16 b, c; prmt.b32 a, $2, 0, 0x3120; mov.b32 {b, c}, a; "
    "cvt.rn.f16x2.e4m3x2 $0, b; cvt.rn.f16x2.e4m3x2 $1, c; }"
)
_E5M2_HALVES: tl.constexpr = tl.constexpr("prmt.b32 $0, $2, 0, 0x2404; prmt.b32 $1, $2, 0, 0x3414;")


@triton.jit
def halves(x, E5M2: tl.constexpr, ASM: tl.constexpr):
    """Return the low and the high bytes of 16-bit integers, two neighbouring FP8 numbers each, as two float16 tiles.

    An operand of a product whose rows are not its columns can be read from shared memory 16 bits at a time in one
    instruction for many, but single bytes only one by one. ASM: the same in a fourth of the instructions.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            _E5M2_HALVES if E5M2 else _E4M3_HALVES, "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        kind: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
        low = (x & 0xFF).to(tl.uint8).to(kind, bitcast=True).to(tl.float16)
        high = (x >> 8).to(tl.uint8).to(kind, bitcast=True).to(tl.float16)
        return low, high


#: What `widen` leaves to be multiplied by, with BITS.
BITS_SCALE: tl.constexpr = tl.constexpr(256.0)


@triton.jit
def row_power(q):
    """Return for each row a power of two above its largest magnitude; ``q / row_power(q)`` fits float16.

    e4m3 and e5m2 become float16 in one instruction for two numbers, bfloat16 in four, so over an FP8 cache the products
    are of float16. A bfloat16 q has range to lose there: each row gives up its exponent first, which is exact but for
    elements below 2^-14 of the row's largest.
    """
    top = tl.max(tl.abs(q.to(tl.float32)), 1)
    # The exponent bits alone are the power of two below. Rows of zeros (and what is too tiny) keep their scale.
    bits = top.to(tl.int32, bitcast=True) & 0x7F800000
    below = tl.where(bits < 0x01000000, 0x3F000000, tl.minimum(bits, 0x7E000000))
    return below.to(tl.float32, bitcast=True) * 2.0


# --- the softmax -----------------------------------------------------------------------------------------------------


@triton.jit
def online(s, m, l, factor):
    """Fold a tile of logits ``s * factor`` into the maximum m and the denominator l: return p, rescaling, m, l.

    Where l has a column for each key of a tile, these are to be added up at the end: where threads of several warps
    have the keys of a row, they wait for each other once less in every step.
    """
    top = tl.maximum(m, tl.max(s, 1) * factor)
    # A row without a key yet subtracts 0 instead of -inf: 2^-inf is 0, and -inf - -inf would be NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * factor - shift[:, None])
    rescale = tl.exp2(m - shift)
    if len(l.shape) == 2:
        return p, rescale, top, l * rescale[:, None] + p
    else:
        return p, rescale, top, l * rescale + tl.sum(p, 1)


@triton.jit
def add_sink(m, l, sink):
    """Count one more logit (base 2) in the denominator: return the rescaling of the sums, m and l."""
    top = tl.maximum(m, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    rescale = tl.exp2(m - shift)
    return rescale, top, l * rescale + tl.exp2(sink - shift)


@triton.jit
def finish(acc, m, l):
    """Return the normalised sums and the base-2 log-sum-exp; 0 and -inf for a row without keys."""
    some = tl.where(l == 0.0, 1.0, l)
    return acc / some[:, None], tl.where(l == 0.0, float("-inf"), m + tl.log2(some))
