"""dK and dV for Hopper (sm_90) in Gluon: TMA loads, asynchronous wgmma, a producer, two consumers.

A block of threads owns a tile of 128 keys of one key head, 64 for each consumer warpgroup, and walks over the rows that
see them, BM at a time, for each query head of the group in turn (Dao 2023, "FlashAttention-2", algorithm 2):

    S^T = K Q^T        P^T = exp(S^T - lse)        dV += P^T dO
    dP^T = V dO^T      dS^T = P^T * (dP^T - delta) dK += dS^T Q

Transposed, P^T and dS^T are left operands straight from registers, and the group is summed without atomics, in a fixed
order. One warp (the producer) copies K and V once, then Q and dO tiles into a ring of `STAGES` slots by TMA, and lse
and delta by ordinary loads, which need no alignment. They meet at mbarriers only:

    kv_full[i]      K and V have arrived                 1 arrival (the producer's expect) + their bytes
    full[s]         the tiles and rows of slot s are there   2 arrivals (expect, and the rows' stores) + its bytes
    full[STAGES]    packed: a sequence's last tiles have arrived, and the producer zeroes what is past the end
    empty[s]        every consumer is done with slot s   1 arrival per consumer

The n-th block lives in slot n % STAGES; parities are those of `forward_sm90`.

Two forms, for D = 64 and 128. PAIRED: a slot holds two blocks a and b of BM rows, K and V are in registers (from shared
memory they were half of what products of 64 rows read there), and an iteration issues S_a dP_a S_b dV_a dK_a dP_b dV_b
dK_b: the exponentials of a run under two of these products, those of b under the next two. Else, one block at a time,
what is left of dK from the block before: S_n dP_n dK_{n-1} dV_n. The other consumer's products run all the time.

PERSISTENT: a block of threads takes one tile after another, and there are two slots for K and V:

    kv_empty[i]     both consumers are done with tile i of K and V, through which they wrote its results

Rows past the end have lse = +inf, so that their P is 0. Rows that see no key (lse = -inf) are masked in every block
that they are in. Keys past the end are rows of every tile here: what comes out for them is not stored.

Layouts: descriptors over (B, heads, S, D), any strides that are multiples of 16 bytes; lse and delta fp32 (B, H, Sq);
dk and dv contiguous (B, Sk, Hkv, D) and (B, Sk, Hkv, Dv). Packed: one sequence of all rows, lse and delta (H, T).
Tiles: `VARIANTS` in `backward_sm90_launch`, by head size.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_accel.kernels.gluon.backward_sm90_parts import (
    in_groups,
    let_next_grid_start,
    operand,
    product,
    products,
    store_tile,
    turns_of_block,
)
from vllm_accel.kernels.gluon.forward_sm90 import (
    as_matrix,
    partition_barrier,
    write_zeros,
)
from vllm_accel.kernels.gluon.tiles_sm90 import ROWS, extent, sequence_at, tile_of_turn

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def keys_at(index, tiles, BM: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr):
    """Say which keys tile `index` is, and which blocks of rows see them: from `start`, and without a mask from `free`.

    Heads go in groups of `heads_together` (their Q and dO fit in L2), and within a group all heads' heaviest causal
    tiles come first (of each packed sequence). A tile that no row sees has one block, with P = 0. One past a packed
    sequence's end, or past the last sequence, has none; what is from `first` to `len_k` then belongs to no sequence.
    """
    BN: gl.constexpr = 2 * ROWS
    tile, batch, head = in_groups(index, tiles, VARLEN)
    slots, _, num_sequences, _, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k = tiles
    first_q = 0
    first_k = 0
    len_q = seqlen_q
    len_k = seqlen_k
    if VARLEN:
        sequence, tile, rows = sequence_at(tile, slots, num_sequences, seqlen_k, cu_seqlens_k, BN)
        first_q, len_q = extent(sequence, num_sequences, seqlen_q, cu_seqlens_q)
        first_k, len_k = extent(sequence, num_sequences, seqlen_k, cu_seqlens_k)
    first = tile * BN
    blocks = (gl.maximum(len_q, 1) + BM - 1) // BM
    if VARLEN:
        is_none = sequence == num_sequences
        blocks = gl.where(is_none | (first >= len_k), 0, blocks)
        len_k = gl.where(is_none, gl.minimum(first + rows, len_k), len_k)
    if CAUSAL:
        # Row i sees the keys up to i + len_k - len_q.
        row = first + len_q - len_k  # the first that sees key `first`
        start = gl.minimum(gl.maximum(row, 0) // BM, gl.maximum(blocks - 1, 0))
        free = gl.minimum((gl.maximum(row + BN - 1, 0) + BM - 1) // BM, blocks)
    else:
        start = 0
        free = 0
    return batch, head, first, first_q, first_k, len_q, len_k, start, free, blocks


@gluon.jit
def zero_past_end(tile, left, BM: gl.constexpr, D: gl.constexpr):
    """Zero a tile's rows from `left` on, by one warp: they are another sequence's and may hold NaN, and a sum over rows
    is 0 * NaN with them."""
    CHUNK: gl.constexpr = 8
    WIDTH: gl.constexpr = D if D < 64 else 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    for i in gl.static_range(BM // CHUNK):
        if left < (i + 1) * CHUNK:
            rows = i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
            for j in gl.static_range(D // WIDTH):
                part = tile.slice(i * CHUNK, CHUNK).slice(j * WIDTH, WIDTH, 1)
                values = part.load(LAYOUT)
                part.store(gl.where((rows < left)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, do_desc, lse, delta, shared, tiles, queries_per_key_head,
    BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr,
    PAIRED: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, kv_empty, full, empty = shared
    HALVES: gl.constexpr = 2 if PAIRED else 1
    ROWS_OF_BLOCK: gl.constexpr = BM * HALVES
    LINE: gl.constexpr = gl.BlockedLayout([ROWS_OF_BLOCK // 32], [32], [1], [0])
    rows = gl.arange(0, ROWS_OF_BLOCK, LINE)
    let_next_grid_start()
    num_heads = tiles[3] * queries_per_key_head
    seqlen_q = tiles[4]
    KV_SLOTS: gl.constexpr = 2 if PERSISTENT else 1
    n = 0
    used = 0
    ragged = 0  # sequences' ends so far
    for turn in range(turns_of_block(tiles, VARLEN, PERSISTENT)):
        batch, key_head, first, first_q, first_k, len_q, _, start, _, blocks = keys_at(
            tile_of_turn(turn, PERSISTENT), tiles, ROWS_OF_BLOCK, CAUSAL, VARLEN
        )
        if blocks > 0:
            kv = used % KV_SLOTS
            if PERSISTENT:
                mbarrier.wait(kv_empty.index(kv), ((used // KV_SLOTS) & 1) ^ 1)
            mbarrier.expect(kv_full.index(kv), 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
            for c in gl.static_range(2):
                at = first_k + first + c * ROWS
                i = kv * 2 + c
                tma.async_copy_global_to_shared(k_desc, [batch, key_head, at, 0], kv_full.index(kv), k_s.index(i))
                tma.async_copy_global_to_shared(v_desc, [batch, key_head, at, 0], kv_full.index(kv), v_s.index(i))
            used += 1
        for head in range(key_head * queries_per_key_head, (key_head + 1) * queries_per_key_head):
            line = (batch * num_heads + head).to(gl.int64) * seqlen_q + first_q
            for block in range(start, blocks):
                slot = n % STAGES
                at = block * ROWS_OF_BLOCK
                left = len_q - at
                here = rows < left
                row_lse = gl.load(lse + line + at + rows, mask=here, other=float("inf")) * LOG2E
                row_delta = gl.load(delta + line + at + rows, mask=here, other=0.0)
                mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
                arrival = slot
                if VARLEN:
                    arrival = gl.where(left < ROWS_OF_BLOCK, STAGES, slot)
                mbarrier.expect(full.index(arrival), HALVES * (q_desc.block_type.nbytes + do_desc.block_type.nbytes))
                at += first_q
                for h in gl.static_range(HALVES):
                    i = slot * HALVES + h
                    row = at + h * BM
                    tma.async_copy_global_to_shared(q_desc, [batch, head, row, 0], full.index(arrival), q_s.index(i))
                    tma.async_copy_global_to_shared(do_desc, [batch, head, row, 0], full.index(arrival), do_s.index(i))
                lse_s.index(slot).store(row_lse)
                delta_s.index(slot).store(row_delta)
                if VARLEN:  # noqa: SIM102 - the one is decided by the compiler, the other by the GPU
                    if left < ROWS_OF_BLOCK:  # one block of each head, or none
                        mbarrier.wait(full.index(STAGES), ragged & 1)
                        ragged += 1
                        for h in gl.static_range(HALVES):
                            zero_past_end(as_matrix(q_s.index(slot * HALVES + h)), left - h * BM, BM, D)
                            zero_past_end(as_matrix(do_s.index(slot * HALVES + h)), left - h * BM, BM, D)
                        fence_async_shared()  # what ordinary stores wrote is read by wgmma, through the other proxy
                        mbarrier.arrive(full.index(slot), count=1)
                mbarrier.arrive(full.index(slot), count=1)
                n += 1


@gluon.jit
def probabilities(s, row_lse, shift, scale, BM: gl.constexpr, MASKED: gl.constexpr, ROOM: gl.constexpr = False):
    """Return P^T; with a mask, key r of the tile sees row c of the block where c - r >= shift."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    p = gl.exp2(s * scale - row_lse[None, :])
    if MASKED:
        r = gl.arange(0, ROWS, gl.SliceLayout(1, S))
        c = gl.arange(0, BM, gl.SliceLayout(0, S))
        # Not c - r >= shift: c - r would be computed before the loop, and take a register for each number of the tile.
        if ROOM:
            p = gl.where(c[None, :] >= (r + shift)[:, None], p, 0.0)
        else:
            p = gl.where((c - shift)[None, :] >= r[:, None], p, 0.0)
    return p


@gluon.jit
def first_step(
    shift, k, v, q_s, do_s, lse_s, delta_s, full, scale,
    BM: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Return the operands of block 0's products for dV and dK."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    mbarrier.wait(full.index(0), 0)
    s, dp = products(k, v, as_matrix(q_s.index(0)), as_matrix(do_s.index(0)), BM)
    s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    p = probabilities(s, lse_s.index(0).load(gl.SliceLayout(0, S)), shift, scale, BM, MASKED)
    ds = p * (dp - delta_s.index(0).load(gl.SliceLayout(0, S))[None, :])
    return operand(p, D, k.dtype), operand(ds, D, k.dtype)


@gluon.jit
def step(
    n, shift, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, p, ds, scale,
    BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add block n's part to dV, and to dK that of block n - 1, whose operand is ds."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S)
    slot = n % STAGES
    parity = (n // STAGES) & 1
    q = as_matrix(q_s.index(slot))
    do = as_matrix(do_s.index(slot))
    mbarrier.wait(full.index(slot), parity)
    s, dp = products(k, v, q, do, BM)
    # The second and third wait for `full` have passed already. But a wait on an mbarrier is a loop of its own, and
    # without that boundary ptxas moves the next wait for products above the arithmetic.
    before = (n + STAGES - 1) % STAGES
    dk = warpgroup_mma(ds, as_matrix(q_s.index(before)), dk, is_async=True)
    s = warpgroup_mma_wait(2, deps=[s])
    probability = probabilities(s, lse_s.index(slot).load(COLUMNS), shift, scale, BM, MASKED)
    mbarrier.wait(full.index(slot), parity)
    p = operand(probability, D, k.dtype)
    dv = warpgroup_mma(p, do, dv, is_async=True)
    dp, dk, ds = warpgroup_mma_wait(1, deps=[dp, dk, ds])
    mbarrier.arrive(empty.index(before), count=1)
    ds = operand(probability * (dp - delta_s.index(slot).load(COLUMNS)[None, :]), D, k.dtype)
    mbarrier.wait(full.index(slot), parity)
    dv, p, ds = warpgroup_mma_wait(0, deps=[dv, p, ds])
    return dk, dv, p, ds


@gluon.jit
def paired_step(
    n, shift, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, scale,
    BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add both halves' parts of block n to dV and dK."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S)
    slot = n % STAGES
    parity = (n // STAGES) & 1
    q_a = as_matrix(q_s.index(2 * slot))
    q_b = as_matrix(q_s.index(2 * slot + 1))
    do_a = as_matrix(do_s.index(2 * slot))
    do_b = as_matrix(do_s.index(2 * slot + 1))
    mbarrier.wait(full.index(slot), parity)
    s_a, dp_a = products(k, v, q_a, do_a, BM)
    s_b = product(k, q_b, BM)
    s_a = warpgroup_mma_wait(2, deps=[s_a])
    p_a = probabilities(s_a, lse_s.index(slot).slice(0, BM).load(COLUMNS), shift, scale, BM, MASKED, True)
    mbarrier.wait(full.index(slot), parity)  # this one and the next have passed already: see `step`
    operand_a = operand(p_a, D, k.dtype)
    dv = warpgroup_mma(operand_a, do_a, dv, is_async=True)
    dp_a = warpgroup_mma_wait(2, deps=[dp_a])
    ds_a = operand(p_a * (dp_a - delta_s.index(slot).slice(0, BM).load(COLUMNS)[None, :]), D, k.dtype)
    dk = warpgroup_mma(ds_a, q_a, dk, is_async=True)
    dp_b = product(v, do_b, BM)
    s_b = warpgroup_mma_wait(3, deps=[s_b])
    p_b = probabilities(s_b, lse_s.index(slot).slice(BM, BM).load(COLUMNS), shift - BM, scale, BM, MASKED, True)
    mbarrier.wait(full.index(slot), parity)
    operand_b = operand(p_b, D, k.dtype)
    dv, operand_a = warpgroup_mma_wait(2, deps=[dv, operand_a])
    dv = warpgroup_mma(operand_b, do_b, dv, is_async=True)
    dp_b, dk, ds_a = warpgroup_mma_wait(1, deps=[dp_b, dk, ds_a])
    ds_b = operand(p_b * (dp_b - delta_s.index(slot).slice(BM, BM).load(COLUMNS)[None, :]), D, k.dtype)
    dk = warpgroup_mma(ds_b, q_b, dk, is_async=True)
    dk, dv, operand_b, ds_b = warpgroup_mma_wait(0, deps=[dk, dv, operand_b, ds_b])
    mbarrier.arrive(empty.index(slot), count=1)
    return dk, dv


@gluon.jit
def consumer(
    c, shared, results, tiles, queries_per_key_head, softmax_scale,
    BM: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, PAIRED: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    n = 0
    used = 0
    for turn in range(turns_of_block(tiles, VARLEN, PERSISTENT)):
        work = keys_at(tile_of_turn(turn, PERSISTENT), tiles, BM * 2 if PAIRED else BM, CAUSAL, VARLEN)
        if work[9] > 0:
            n = consume(
                c, n, used, shared, results, tiles, work, queries_per_key_head, softmax_scale,
                BM, D, HEAD_DIM, HEAD_DIM_V, STAGES, CAUSAL, PAIRED, PERSISTENT,
            )  # fmt: skip
            used += 1
        elif VARLEN:
            dk_out, dv_out = results
            num_heads = tiles[3]
            _, head, first, _, first_k, _, len_k, _, _, _ = work
            begin = first_k + first + c
            end = first_k + len_k
            write_zeros(dk_out + head * HEAD_DIM, begin, end, 2, num_heads * HEAD_DIM, D, HEAD_DIM)
            write_zeros(dv_out + head * HEAD_DIM_V, begin, end, 2, num_heads * HEAD_DIM_V, D, HEAD_DIM_V)


@gluon.jit
def consume(
    c, n, used, shared, results, tiles, work, queries_per_key_head, softmax_scale,
    BM: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, PAIRED: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Work on one tile of keys whose first block of rows is the n-th; return which is the next tile's."""
    k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, kv_empty, full, empty = shared
    dk_out, dv_out = results
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    KV_SLOTS: gl.constexpr = 2 if PERSISTENT else 1
    num_heads = tiles[3]
    seqlen_k = tiles[5]
    batch, head, first, _, first_k, len_q, len_k, start, free, blocks = work
    first += c * ROWS
    kv = used % KV_SLOTS
    k = as_matrix(k_s.index(2 * kv + c))
    v = as_matrix(v_s.index(2 * kv + c))
    scale = softmax_scale * LOG2E
    dk = gl.zeros([ROWS, D], gl.float32, O)
    dv = gl.zeros([ROWS, D], gl.float32, O)
    mbarrier.wait(kv_full.index(kv), (used // KV_SLOTS) & 1)
    row = first + len_q - len_k  # the first that sees the consumer's first key
    if PAIRED:
        dk, dv, n = in_pairs(
            n, row, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, scale, start, free, blocks,
            queries_per_key_head, BM, D, STAGES, CAUSAL,
        )  # fmt: skip
    else:
        dk, dv, n = one_by_one(
            row, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, scale, start, free, blocks,
            queries_per_key_head, BM, D, STAGES, CAUSAL,
        )  # fmt: skip
    row = (batch * seqlen_k + first_k).to(gl.int64)
    dk_out += row * (num_heads * HEAD_DIM) + head * HEAD_DIM
    dv_out += row * (num_heads * HEAD_DIM_V) + head * HEAD_DIM_V
    store_tile(dk * softmax_scale, k, dk_out, first, len_k, num_heads * HEAD_DIM, D, HEAD_DIM)
    store_tile(dv, v, dv_out, first, len_k, num_heads * HEAD_DIM_V, D, HEAD_DIM_V)
    if PERSISTENT:
        fence_async_shared()  # the next tile but one is written by TMA after what ordinary loads read
        mbarrier.arrive(kv_empty.index(kv), count=1)
    return n


@gluon.jit
def in_pairs(
    n, row, k_tile, v_tile, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, scale, start, free, blocks,
    queries_per_key_head, BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Walk over all rows that see a tile, two blocks of BM at a time, with K and V in registers."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    k = k_tile.load(gl.DotOperandLayout(0, S, 2))
    v = v_tile.load(gl.DotOperandLayout(0, S, 2))
    for _member in range(queries_per_key_head):
        if CAUSAL:
            for block in range(start, free):
                dk, dv = paired_step(
                    n, row - block * (2 * BM), k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, scale,
                    BM, D, STAGES, True,
                )  # fmt: skip
                n += 1
        for _block in range(gl.maximum(start, free), blocks):
            dk, dv = paired_step(
                n, 0, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, scale, BM, D, STAGES, False,
            )  # fmt: skip
            n += 1
    return dk, dv, n


@gluon.jit
def one_by_one(
    row, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, scale, start, free, blocks, queries_per_key_head,
    BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Walk over all rows that see the only tile, a block at a time; dK is one block behind."""
    p, ds = first_step(row - start * BM, k, v, q_s, do_s, lse_s, delta_s, full, scale, BM, D, CAUSAL)
    dv = warpgroup_mma(p, as_matrix(do_s.index(0)), dv, is_async=True)
    dv, p = warpgroup_mma_wait(0, deps=[dv, p])
    n = 1
    for member in range(queries_per_key_head):
        begin = start + gl.where(member == 0, 1, 0)
        if CAUSAL:
            for block in range(begin, free):
                dk, dv, p, ds = step(
                    n, row - block * BM, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, p, ds, scale,
                    BM, D, STAGES, True,
                )  # fmt: skip
                n += 1
        for _block in range(gl.maximum(begin, free), blocks):
            dk, dv, p, ds = step(
                n, 0, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, p, ds, scale, BM, D, STAGES, False,
            )  # fmt: skip
            n += 1
    dk = warpgroup_mma(ds, as_matrix(q_s.index((n + STAGES - 1) % STAGES)), dk, is_async=True)
    # dv and p are waited for already. Without them here ptxas spills in the loop without masks (Triton 3.7.1, causal).
    dk, dv, p, ds = warpgroup_mma_wait(0, deps=[dk, dv, p, ds])
    return dk, dv, n


@gluon.jit(
    # One compiled kernel for all sizes: the launcher keeps it by constexprs and dtype alone.
    do_not_specialize=[
        "softmax_scale", "seqlen_q", "seqlen_k", "num_sequences", "num_heads", "queries_per_key_head",
        "heads_together", "tiles_per_head",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q", "cu_seqlens_k"],
)  # fmt: skip
def attention_dkv(
    q_desc, k_desc, v_desc, do_desc, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, seqlen_q, seqlen_k,
    num_sequences, num_heads, queries_per_key_head, heads_together, tiles_per_head,
    BM: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, PAIRED: gl.constexpr, PERSISTENT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors are over (B, heads, S, D) with blocks (1, 1, BM, D) for Q and dO and (1, 1, 64, D) for K and V.

    `num_heads` counts key heads. `seqlen_q`, `seqlen_k` are the lengths of Q's and K's third dimension. One block for
    each tile of keys of each sequence, packed: for each slot of `sequence_at`. All rows of dk and dv are written.
    """
    gl.static_assert(PAIRED or not PERSISTENT)
    dtype: gl.constexpr = q_desc.dtype
    HALVES: gl.constexpr = 2 if PAIRED else 1
    KV_SLOTS: gl.constexpr = 2 if PERSISTENT else 1
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [2 * KV_SLOTS, 1, 1, ROWS, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2 * KV_SLOTS, 1, 1, ROWS, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES * HALVES, 1, 1, BM, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES * HALVES, 1, 1, BM, D], do_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, HALVES * BM], LINE)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, HALVES * BM], LINE)
    kv_full = gl.allocate_shared_memory(gl.int64, [KV_SLOTS, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [KV_SLOTS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(KV_SLOTS):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=2)
    mbarrier.init(full.index(STAGES), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    partition_barrier()
    shared = (k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, kv_empty, full, empty)
    results = (dk, dv)
    if not VARLEN:
        cu_seqlens_q = 0  # None cannot stand in a tuple
        cu_seqlens_k = 0
    tiles = (
        tiles_per_head, heads_together, num_sequences, num_heads, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consumer, (0, shared, results, tiles, queries_per_key_head, softmax_scale, BM, D, HEAD_DIM, HEAD_DIM_V,
                        STAGES, CAUSAL, VARLEN, PAIRED, PERSISTENT)),
            (consumer, (1, shared, results, tiles, queries_per_key_head, softmax_scale, BM, D, HEAD_DIM, HEAD_DIM_V,
                        STAGES, CAUSAL, VARLEN, PAIRED, PERSISTENT)),
            (producer, (q_desc, k_desc, v_desc, do_desc, lse, delta, shared, tiles, queries_per_key_head, BM, D, STAGES,
                        CAUSAL, VARLEN, PAIRED, PERSISTENT)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
