"""dQ for Hopper (sm_90) in Gluon: TMA loads, asynchronous wgmma, a producer, two consumers.

A block of threads owns a tile of 128 query rows of one head, 64 for each consumer warpgroup, and walks over the keys
that they see, BN at a time, from the last block to the first (so that masks come first):

    S = Q K^T    P = exp(S - lse)    dP = dO V^T    dS = P * (dP - delta)    dQ += dS K

One warp (the producer) copies Q and dO once, then K and V tiles into a ring of `STAGES` slots by TMA. They meet at
mbarriers only:

    q_full[i]       Q and dO have arrived                1 arrival (the producer's expect) + their bytes
    q_empty[i]      persistent: both consumers are done with Q and dO, through which they wrote dQ   1 arrival each
    full[s]         the tiles of slot s have arrived     1 arrival + their bytes
    empty[s]        every consumer is done with slot s   1 arrival per consumer

With OVERLAP a consumer issues S_n dP_n dQ_{n-1} and does the arithmetic of block n under them; then slot n - 1 is given
back. Without, dQ_n is issued when dS_n is there, and waited for. PAIRED: a slot holds two blocks a and b of BN keys, Q
and dO are in registers, and an iteration issues S_a dP_a S_b dP_b, dQ_a under the exponentials of b, dQ_b.

PERSISTENT: a block of threads takes one tile after another, with two slots for Q and dO.

Layouts: descriptors over (B, heads, S, D), any strides that are multiples of 16 bytes; lse and delta fp32 (B, H, Sq);
dq contiguous (B, Sq, H, D). Packed: one sequence of all rows, lse and delta (H, T). Tiles: `VARIANTS` in
`backward_sm90_launch`, by head size.
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
    operand,
    products,
    store_tile,
    turns_of_block,
    wait_for_grid_before,
)
from vllm_accel.kernels.gluon.forward_sm90 import (
    as_matrix,
    masked,
    partition_barrier,
    write_zeros,
    zero_rows_from,
)
from vllm_accel.kernels.gluon.tiles_sm90 import ROWS, extent, sequence_at, tile_of_turn

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def rows_at(index, tiles, BN: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr):
    """Say which rows tile `index` is, and how many blocks of keys they see; order: that of `keys_at`.

    A tile that sees no key has one block, all masked. One past a packed sequence's end, or past the last, has none.
    """
    BM: gl.constexpr = 2 * ROWS
    tile, batch, head = in_groups(index, tiles, VARLEN)
    tiles_per_head, _, num_sequences, _, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k = tiles
    if CAUSAL:
        tile = tiles_per_head - 1 - tile
    first_q = 0
    first_k = 0
    len_q = seqlen_q
    len_k = seqlen_k
    if VARLEN:
        sequence, tile, rows = sequence_at(tile, tiles_per_head, num_sequences, seqlen_q, cu_seqlens_q, BM)
        first_q, len_q = extent(sequence, num_sequences, seqlen_q, cu_seqlens_q)
        first_k, len_k = extent(sequence, num_sequences, seqlen_k, cu_seqlens_k)
    first = tile * BM
    visible = len_k
    if CAUSAL:
        visible = gl.minimum(visible, gl.minimum(first + BM, len_q) + len_k - len_q)
    blocks = (gl.maximum(visible, 1) + BN - 1) // BN
    if VARLEN:
        is_none = sequence == num_sequences
        blocks = gl.where(is_none | (first >= len_q), 0, blocks)
        len_q = gl.where(is_none, gl.minimum(first + rows, len_q), len_q)
    return batch, head, first, first_q, first_k, len_q, len_k, blocks


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, do_desc, shared, tiles, queries_per_key_head,
    BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr, HALVES: gl.constexpr,
    PERSISTENT: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, q_full, q_empty, full, empty = shared
    Q_SLOTS: gl.constexpr = 2 if PERSISTENT else 1
    begin = 0
    used = 0
    for turn in range(turns_of_block(tiles, VARLEN, PERSISTENT)):
        batch, head, first, first_q, first_k, _, _, blocks = rows_at(
            tile_of_turn(turn, PERSISTENT), tiles, BN * HALVES, CAUSAL, VARLEN
        )
        key_head = head // queries_per_key_head
        if blocks > 0:
            mine = used % Q_SLOTS
            if PERSISTENT:
                mbarrier.wait(q_empty.index(mine), ((used // Q_SLOTS) & 1) ^ 1)
            mbarrier.expect(q_full.index(mine), 2 * (q_desc.block_type.nbytes + do_desc.block_type.nbytes))
            for c in gl.static_range(2):
                at = first_q + first + c * ROWS
                i = mine * 2 + c
                tma.async_copy_global_to_shared(q_desc, [batch, head, at, 0], q_full.index(mine), q_s.index(i))
                tma.async_copy_global_to_shared(do_desc, [batch, head, at, 0], q_full.index(mine), do_s.index(i))
            used += 1
        for n in range(begin, begin + blocks):
            at = first_k + (blocks - 1 - (n - begin)) * (BN * HALVES)
            slot = n % STAGES
            mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), HALVES * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
            for h in gl.static_range(HALVES):
                i = slot * HALVES + h
                where = at + h * BN
                tma.async_copy_global_to_shared(k_desc, [batch, key_head, where, 0], full.index(slot), k_s.index(i))
                tma.async_copy_global_to_shared(v_desc, [batch, key_head, where, 0], full.index(slot), v_s.index(i))
        begin += blocks
    if gl.program_id(0) == gl.num_programs(0) - 1:
        wait_for_grid_before()  # of dK and dV: who waits for this grid may read theirs


@gluon.jit
def probabilities(s, limit, block, highest, scale, BN: gl.constexpr, MASKED: gl.constexpr):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    if MASKED:
        s = masked(s, limit, block, BN, S)
    return gl.exp2(s * scale - highest[:, None])


@gluon.jit
def step(
    n, last, limit, q, do, k_s, v_s, full, empty, dq, ds, scale, highest, row_delta,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Add a block's part to dQ: block n's, or with OVERLAP that of block n - 1, whose operand is ds."""
    slot = n % STAGES
    parity = (n // STAGES) & 1
    k = as_matrix(k_s.index(slot))
    mbarrier.wait(full.index(slot), parity)
    s, dp = products(q, do, k, as_matrix(v_s.index(slot)), BN)
    # The second and third wait for `full` have passed already: see `backward_sm90_dkv.step`.
    if OVERLAP:
        before = (n + STAGES - 1) % STAGES
        dq = warpgroup_mma(ds, as_matrix(k_s.index(before)), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        p = probabilities(s, limit, last - n, highest, scale, BN, MASKED)
        mbarrier.wait(full.index(slot), parity)
        dp = warpgroup_mma_wait(1, deps=[dp])
        next_ds = operand(p * (dp - row_delta[:, None]), D, q.dtype)
        mbarrier.wait(full.index(slot), parity)
        dq, ds, next_ds = warpgroup_mma_wait(0, deps=[dq, ds, next_ds])
        mbarrier.arrive(empty.index(before), count=1)
        return dq, next_ds
    else:
        s = warpgroup_mma_wait(1, deps=[s])
        p = probabilities(s, limit, last - n, highest, scale, BN, MASKED)
        mbarrier.wait(full.index(slot), parity)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = operand(p * (dp - row_delta[:, None]), D, q.dtype)
        dq = warpgroup_mma(ds, k, dq, is_async=True)
        dq, ds = warpgroup_mma_wait(0, deps=[dq, ds])
        mbarrier.arrive(empty.index(slot), count=1)
        return dq, ds


@gluon.jit
def paired_step(
    n, last, limit, q, do, k_s, v_s, full, empty, dq, scale, highest, row_delta,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add both halves' parts of block n to dQ."""
    slot = n % STAGES
    parity = (n // STAGES) & 1
    k_a = as_matrix(k_s.index(2 * slot))
    k_b = as_matrix(k_s.index(2 * slot + 1))
    mbarrier.wait(full.index(slot), parity)
    s_a, dp_a = products(q, do, k_a, as_matrix(v_s.index(2 * slot)), BN)
    s_b, dp_b = products(q, do, k_b, as_matrix(v_s.index(2 * slot + 1)), BN)
    s_a = warpgroup_mma_wait(3, deps=[s_a])
    p_a = probabilities(s_a, limit, 2 * (last - n), highest, scale, BN, MASKED)
    mbarrier.wait(full.index(slot), parity)  # this one and the next have passed already: see `step`
    dp_a = warpgroup_mma_wait(2, deps=[dp_a])
    ds_a = operand(p_a * (dp_a - row_delta[:, None]), D, q.dtype)
    dq = warpgroup_mma(ds_a, k_a, dq, is_async=True)
    s_b = warpgroup_mma_wait(2, deps=[s_b])
    p_b = probabilities(s_b, limit, 2 * (last - n) + 1, highest, scale, BN, MASKED)
    mbarrier.wait(full.index(slot), parity)
    dp_b = warpgroup_mma_wait(1, deps=[dp_b])
    ds_b = operand(p_b * (dp_b - row_delta[:, None]), D, q.dtype)
    dq = warpgroup_mma(ds_b, k_b, dq, is_async=True)
    dq, ds_a, ds_b = warpgroup_mma_wait(0, deps=[dq, ds_a, ds_b])
    mbarrier.arrive(empty.index(slot), count=1)
    return dq


@gluon.jit
def consumer(
    c, shared, lse, delta, dq_out, tiles, softmax_scale,
    BN: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr, OVERLAP: gl.constexpr, PAIRED: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    n = 0
    used = 0
    for turn in range(turns_of_block(tiles, VARLEN, PERSISTENT)):
        work = rows_at(tile_of_turn(turn, PERSISTENT), tiles, BN * 2 if PAIRED else BN, CAUSAL, VARLEN)
        if work[7] > 0:
            consume(
                c, n, used, shared, lse, delta, dq_out, tiles, work, softmax_scale,
                BN, D, HEAD_DIM, STAGES, CAUSAL, VARLEN, OVERLAP, PAIRED, PERSISTENT,
            )  # fmt: skip
            n += work[7]
            used += 1
        elif VARLEN:
            num_heads = tiles[3]
            _, head, first, first_q, _, len_q, _, _ = work
            dq_row = num_heads * HEAD_DIM
            write_zeros(dq_out + head * HEAD_DIM, first_q + first + c, first_q + len_q, 2, dq_row, D, HEAD_DIM)


@gluon.jit
def consume(
    c, n, used, shared, lse, delta, dq_out, tiles, work, softmax_scale,
    BN: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr, OVERLAP: gl.constexpr, PAIRED: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Work on one tile of rows whose first block of keys is the n-th."""
    q_s, do_s, k_s, v_s, q_full, q_empty, full, empty = shared
    HALVES: gl.constexpr = 2 if PAIRED else 1
    BLOCK: gl.constexpr = BN * HALVES
    Q_SLOTS: gl.constexpr = 2 if PERSISTENT else 1
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    num_heads = tiles[3]
    seqlen_q = tiles[4]
    batch, head, first, first_q, _, len_q, len_k, blocks = work
    first += c * ROWS
    rows = gl.arange(0, ROWS, S_ROWS)
    here = rows < len_q - first
    line = (batch * num_heads + head).to(gl.int64) * seqlen_q + first_q + first
    # Rows past the end and rows without keys have P = 0.
    highest = gl.load(lse + line + rows, mask=here, other=float("inf")) * LOG2E
    highest = gl.where(highest == float("-inf"), float("inf"), highest)
    row_delta = gl.load(delta + line + rows, mask=here, other=0.0)
    # A row sees the keys before its limit; blocks before `free` are seen in full by all rows of this consumer.
    limit = gl.full([ROWS], 0, gl.int32, S_ROWS) + len_k
    free = len_k
    if CAUSAL:
        free = gl.maximum(gl.minimum(free, first + 1 + len_k - len_q), 0)
        limit = gl.minimum(limit, rows + (first + 1 + len_k - len_q))
    first_free = gl.maximum(blocks - free // BLOCK, 1)
    mine = used % Q_SLOTS
    q = as_matrix(q_s.index(2 * mine + c))
    do = as_matrix(do_s.index(2 * mine + c))
    scale = softmax_scale * LOG2E
    dq = gl.zeros([ROWS, D], gl.float32, O)
    mbarrier.wait(q_full.index(mine), (used // Q_SLOTS) & 1)

    if VARLEN:  # noqa: SIM102 - the one is decided by the compiler, the other by the GPU
        # Keys past the end are others' and may hold NaN: 0 * NaN is NaN.
        if blocks * BLOCK > len_k:
            slot = n % STAGES
            mbarrier.wait(full.index(slot), (n // STAGES) & 1)
            for h in gl.static_range(HALVES):
                left = len_k - (blocks - 1) * BLOCK - h * BN
                zero_rows_from(as_matrix(k_s.index(slot * HALVES + h)), left, c, BN, D, 2)
                zero_rows_from(as_matrix(v_s.index(slot * HALVES + h)), left, c, BN, D, 2)
    last = n + blocks - 1
    first_free += n
    if PAIRED:
        A: gl.constexpr = gl.DotOperandLayout(0, S, 2)
        q_held = q.load(A)
        do_held = do.load(A)
        for m in range(n, first_free):
            dq = paired_step(
                m, last, limit, q_held, do_held, k_s, v_s, full, empty, dq, scale, highest, row_delta,
                BN, D, STAGES, True,
            )  # fmt: skip
        for m in range(first_free, n + blocks):
            dq = paired_step(
                m, last, limit, q_held, do_held, k_s, v_s, full, empty, dq, scale, highest, row_delta,
                BN, D, STAGES, False,
            )  # fmt: skip
    else:
        ds = gl.zeros([ROWS, BN], q.dtype, gl.DotOperandLayout(0, O, 2))
        # The first block is always masked; with OVERLAP there is nothing before it to multiply.
        second = n
        if OVERLAP:
            slot = n % STAGES
            mbarrier.wait(full.index(slot), (n // STAGES) & 1)
            s, dp = products(q, do, as_matrix(k_s.index(slot)), as_matrix(v_s.index(slot)), BN)
            s, dp = warpgroup_mma_wait(0, deps=[s, dp])
            p = probabilities(s, limit, blocks - 1, highest, scale, BN, True)
            ds = operand(p * (dp - row_delta[:, None]), D, q.dtype)
            second += 1
        for m in range(second, first_free):
            dq, ds = step(
                m, last, limit, q, do, k_s, v_s, full, empty, dq, ds, scale, highest, row_delta,
                BN, D, STAGES, True, OVERLAP,
            )  # fmt: skip
        for m in range(first_free, n + blocks):
            dq, ds = step(
                m, last, limit, q, do, k_s, v_s, full, empty, dq, ds, scale, highest, row_delta,
                BN, D, STAGES, False, OVERLAP,
            )  # fmt: skip
        if OVERLAP:
            dq = warpgroup_mma(ds, as_matrix(k_s.index(last % STAGES)), dq, is_async=True)
            dq, ds = warpgroup_mma_wait(0, deps=[dq, ds])
    dq_out += (batch * seqlen_q + first_q).to(gl.int64) * (num_heads * HEAD_DIM) + head * HEAD_DIM
    store_tile(dq * softmax_scale, q, dq_out, first, len_q, num_heads * HEAD_DIM, D, HEAD_DIM)
    if PERSISTENT:
        fence_async_shared()  # the next tile but one is written by TMA after what ordinary loads read
        mbarrier.arrive(q_empty.index(mine), count=1)


@gluon.jit(
    # One compiled kernel for all sizes: the launcher keeps it by constexprs and dtype alone.
    do_not_specialize=[
        "softmax_scale", "seqlen_q", "seqlen_k", "num_sequences", "num_heads", "queries_per_key_head",
        "heads_together", "tiles_per_head",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q", "cu_seqlens_k"],
)  # fmt: skip
def attention_dq(
    q_desc, k_desc, v_desc, do_desc, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, softmax_scale, seqlen_q, seqlen_k,
    num_sequences, num_heads, queries_per_key_head, heads_together, tiles_per_head,
    BN: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VARLEN: gl.constexpr, OVERLAP: gl.constexpr, PAIRED: gl.constexpr, PERSISTENT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors are over (B, heads, S, D) with blocks (1, 1, 64, D) for Q and dO and (1, 1, BN, D) for K and V.

    `num_heads` counts query heads. `seqlen_q`, `seqlen_k` are the lengths of Q's and K's third dimension. One block for
    each tile of rows of each sequence, packed: for each slot of `sequence_at`. All rows of dq are written.
    """
    # With Q and dO of two slots in shared memory products' descriptors are not sound by `benchmarks.sass_flow`.
    gl.static_assert(PAIRED or not PERSISTENT)
    HALVES: gl.constexpr = 2 if PAIRED else 1
    Q_SLOTS: gl.constexpr = 2 if PERSISTENT else 1
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2 * Q_SLOTS, 1, 1, ROWS, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [2 * Q_SLOTS, 1, 1, ROWS, D], do_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES * HALVES, 1, 1, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * HALVES, 1, 1, BN, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(Q_SLOTS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    partition_barrier()
    shared = (q_s, do_s, k_s, v_s, q_full, q_empty, full, empty)
    if not VARLEN:
        cu_seqlens_q = 0  # None cannot stand in a tuple
        cu_seqlens_k = 0
    tiles = (
        tiles_per_head, heads_together, num_sequences, num_heads, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consumer, (0, shared, lse, delta, dq, tiles, softmax_scale, BN, D, HEAD_DIM, STAGES, CAUSAL,
                        VARLEN, OVERLAP, PAIRED, PERSISTENT)),
            (consumer, (1, shared, lse, delta, dq, tiles, softmax_scale, BN, D, HEAD_DIM, STAGES, CAUSAL,
                        VARLEN, OVERLAP, PAIRED, PERSISTENT)),
            (producer, (q_desc, k_desc, v_desc, do_desc, shared, tiles, queries_per_key_head, BN, STAGES, CAUSAL,
                        VARLEN, HALVES, PERSISTENT)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
