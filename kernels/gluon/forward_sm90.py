"""Attention forward for Hopper (sm_90) in Gluon: TMA loads, asynchronous wgmma, a producer, two consumers.

A block of threads owns tiles of 128 query rows of one head, 64 for each consumer warpgroup. One warp (the producer)
copies Q, K and V tiles into shared memory by TMA; the consumers multiply. They meet at mbarriers only:

    k_full[s], v_full[s]    the tile in slot s has arrived       1 arrival (the producer's expect) + its bytes
    k_empty[s], v_empty[s]  every consumer is done with slot s   1 arrival per consumer
    q_full[i], q_empty[i]   likewise for one consumer's Q        1 arrival each

K and V are rings of `STAGES` slots. The n-th tile of a ring (counted over all work of this block) lives in slot
n % STAGES and is "use" n // STAGES of it; a wait for use u of a full barrier passes parity u & 1, of an empty barrier
(u & 1) ^ 1, so that the first use of an empty slot does not wait. The producer issues copies in the order in which the
consumers need them: K0 Q K1 V0 K2 V1 ... `tests/gluon_protocol.py` runs this protocol as a simulation.

Blocks of keys are taken from the last to the first: masks (the ragged end, the diagonal) come first and the long loop
has none. With OVERLAP a consumer issues S_j = Q K_j^T, then O += P_{j-1} V_{j-1}, and does the softmax of S_j while the
second product runs (FlashAttention 3, arXiv 2407.08608, section 3.2). With PINGPONG the consumers take turns to issue
products, so that the softmax of one runs under the products of the other.

With SPLIT a tile's blocks of keys are cut into nearly equal parts, each of which is a tile of its own with fp32
results; `combine.join_parts` joins them.

V rows past a packed sequence's end belong to somebody else and may hold NaN; 0 * NaN is NaN, so they are zeroed in
shared memory. The consumers share the rows out, and meet before their first product with that tile.

Layouts: descriptors over (B, heads, S, D), any strides that are multiples of 16 bytes, or packed (T, heads, D) as one
sequence; out contiguous (B, S, H, Dv) or (T, H, Dv), lse fp32 (B, H, S) or (H, T); of parts, out fp32 and both with
the part as their first dimension. Tiles: `VARIANTS` in `forward_sm90_launch`, by head size.
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

from vllm_accel.kernels.gluon.tiles_sm90 import ROWS, tile_at, tile_of_turn, turns

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FIRST_NAMED_BARRIER = gl.constexpr(8)  # Triton takes 0 and one or two per partition, hardware has 16
CONSUMERS_BARRIER = gl.constexpr(10)  # after the two that take turns

#: Waits for all warps of the partition: Triton 3.7 renamed it.
partition_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def named_sync(barrier, threads=256):
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.u32 $0, $1;", "=r,r,r", [gl.to_tensor(barrier), gl.to_tensor(threads)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def named_arrive(barrier):
    gl.inline_asm_elementwise(
        "bar.arrive $1, 256; mov.u32 $0, $1;", "=r,r", [gl.to_tensor(barrier)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, shared, tiles, queries_per_key_head,
    CONSUMERS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, PERSISTENT: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = CONSUMERS * ROWS
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    used = 0  # K (and V) tiles copied so far
    work = 0  # tiles of queries so far
    for turn in range(turns(tiles[0], PERSISTENT)):
        index = tile_of_turn(turn, PERSISTENT)
        _, batch, head, start, first_q, first_k, _, _, blocks = tile_at(index, tiles, BM, BN, CAUSAL, VARLEN, SPLIT)
        key_head = head // queries_per_key_head
        if blocks > 0:
            slot = used % STAGES
            mbarrier.wait(k_empty.index(slot), ((used // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [batch, key_head, first_k + (blocks - 1) * BN, 0], k_full.index(slot), k_s.index(slot)
            )
            q_slot = work % Q_SLOTS
            for c in gl.static_range(CONSUMERS):
                i = q_slot * CONSUMERS + c
                mbarrier.wait(q_empty.index(i), ((work // Q_SLOTS) & 1) ^ 1)
                mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_desc, [batch, head, first_q + start + c * ROWS, 0], q_full.index(i), q_s.index(i)
                )
            for n in range(used, used + blocks):
                block = blocks - 1 - (n - used)
                if block > 0:
                    slot = (n + 1) % STAGES
                    mbarrier.wait(k_empty.index(slot), (((n + 1) // STAGES) & 1) ^ 1)
                    mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        k_desc, [batch, key_head, first_k + (block - 1) * BN, 0], k_full.index(slot), k_s.index(slot)
                    )
                slot = n % STAGES
                mbarrier.wait(v_empty.index(slot), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_desc, [batch, key_head, first_k + block * BN, 0], v_full.index(slot), v_s.index(slot)
                )
            used += blocks
            work += 1


@gluon.jit
def softmax(s, m, l, scale, O_ROWS: gl.constexpr, P: gl.constexpr, dtype: gl.constexpr):
    """One step of the online softmax, base 2. Returns the operand P, the new maximum and sum, and O's factor."""
    highest = gl.maximum(m, gl.max(s, 1) * scale)
    shift = gl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no key: -inf - -inf is NaN
    p = gl.exp2(s * scale - shift[:, None])
    factor = gl.exp2(m - shift)
    l = l * factor + gl.sum(p, 1)
    operand = gl.convert_layout(p.to(dtype), P, assert_trivial=True)
    return operand, highest, l, gl.convert_layout(factor, O_ROWS, assert_trivial=True)


@gluon.jit
def scores(q, k_s, slot, BN: gl.constexpr, S: gl.constexpr):
    """Issue S = Q K^T with the K tile in a slot, without waiting for it."""
    zero = gl.zeros([ROWS, BN], gl.float32, S)
    return warpgroup_mma(q, as_matrix(k_s.index(slot)).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def masked(s, limit, block, BN: gl.constexpr, S: gl.constexpr):
    """Take out the columns of a block of keys from each row's limit on."""
    columns = gl.arange(0, BN, gl.SliceLayout(0, S))
    return gl.where((limit - block * BN)[:, None] > columns[None, :], s, float("-inf"))


@gluon.jit
def as_matrix(tile):
    """(1, 1, rows, D) -> (rows, D)."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def zero_rows_from(tile, first, c, BN: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr):
    """Zero the rows of a tile in shared memory from `first` on, which may be any number: the consumers share it out."""
    CHUNK: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for i in gl.static_range(BN // CHUNK):
        if (first < (i + 1) * CHUNK) & (i % CONSUMERS == c):
            part = tile.slice(i * CHUNK, CHUNK)
            rows = i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
            values = part.load(LAYOUT)
            part.store(gl.where((rows < first)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()  # what ordinary stores wrote is read by wgmma, through the other proxy
    named_sync(CONSUMERS_BARRIER, CONSUMERS * 128)


@gluon.jit
def step(
    c, n, last, q, k_s, v_s, k_full, k_empty, v_full, v_empty, acc, p, m, l, scale, limit,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, OVERLAP: gl.constexpr,
    PINGPONG: gl.constexpr,
):  # fmt: skip
    """Do the second product of block n - 1 and the first product and the softmax of block n."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    k_slot = n % STAGES
    v_slot = (n - 1) % STAGES
    v_parity = ((n - 1) // STAGES) & 1
    if OVERLAP:
        if PINGPONG:
            named_sync(FIRST_NAMED_BARRIER + c)
        s_token = scores(q, k_s, k_slot, BN, S)
        mbarrier.wait(v_full.index(v_slot), v_parity)
        acc_token = warpgroup_mma(p, as_matrix(v_s.index(v_slot)), acc, is_async=True)
        if PINGPONG:
            named_arrive(FIRST_NAMED_BARRIER + 1 - c)
        s = warpgroup_mma_wait(1, deps=[s_token])
    else:
        mbarrier.wait(v_full.index(v_slot), v_parity)
        acc_token = warpgroup_mma(p, as_matrix(v_s.index(v_slot)), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        mbarrier.wait(k_full.index(k_slot), (n // STAGES) & 1)
        s_token = scores(q, k_s, k_slot, BN, S)
        s = warpgroup_mma_wait(0, deps=[s_token])
    mbarrier.arrive(k_empty.index(k_slot), count=1)
    if MASKED:
        s = masked(s, limit, last - n, BN, S)
    p_next, m, l, factor = softmax(s, m, l, scale, gl.SliceLayout(1, O), gl.DotOperandLayout(0, O, 2), q.dtype)
    if OVERLAP:
        # Here, and not at the top of the loop: a wait on an mbarrier is a loop of its own, and without that boundary
        # ptxas moves the wait for O above all the exponentials.
        mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=n < last)
        acc, p, p_next = warpgroup_mma_wait(0, deps=[acc_token, p, p_next])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
    return acc * factor[:, None], p_next, m, l


@gluon.jit
def write_zeros(out, first, end, step, out_row, D: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Write every `step`-th row of zeros: what belongs to no sequence. One by one, so that this shares no address with
    what stores a tile: the compiler would compute it before both, and keep it through the main loop."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dims = gl.arange(0, D, LINE)
    zero = gl.zeros([D], out.dtype.element_ty, LINE)
    wide = out_row.to(gl.int64)
    for row in range(first, end, step):
        gl.store(out + row * wide + dims, zero, mask=dims < HEAD_DIM)


@gluon.jit
def consumer(
    c, shared, results, tiles, scale,
    CONSUMERS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    Q_SLOTS: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr, OVERLAP: gl.constexpr,
    PINGPONG: gl.constexpr, PERSISTENT: gl.constexpr, HELD: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = CONSUMERS * ROWS
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    out, lse = results
    num_heads = tiles[4]
    total_q = tiles[5]
    dtype: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    COPY: gl.constexpr = O if SPLIT else gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    C_ROWS: gl.constexpr = gl.SliceLayout(1, COPY)
    if PINGPONG:  # noqa: SIM102 - known when compiling, the next one is not
        if c == 1:
            named_arrive(FIRST_NAMED_BARRIER)  # consumer 0 goes first
    local_rows = gl.arange(0, ROWS, S_ROWS)
    used = 0
    work = 0
    for turn in range(turns(tiles[0], PERSISTENT)):
        index = tile_of_turn(turn, PERSISTENT)
        part, batch, head, start, first_q, _, len_q, len_k, blocks = tile_at(
            index, tiles, BM, BN, CAUSAL, VARLEN, SPLIT
        )
        start += c * ROWS
        if SPLIT:
            batch += part * tiles[3]  # results have a place for each part
        if blocks > 0:
            # A row sees the keys before its limit; blocks before `free` are seen in full by all rows.
            limit = gl.full([ROWS], 0, gl.int32, S_ROWS) + len_k
            free = len_k
            if CAUSAL:
                free = gl.minimum(free, start + 1 + len_k - len_q)
                limit = gl.minimum(limit, local_rows + (start + 1 + len_k - len_q))
            free = gl.maximum(free, 0) // BN if CAUSAL else blocks
            q_index = (work % Q_SLOTS) * CONSUMERS + c
            q_tile = as_matrix(q_s.index(q_index))
            m = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
            l = gl.full([ROWS], 0.0, gl.float32, S_ROWS)
            acc = gl.zeros([ROWS, D], gl.float32, O)

            # The first block, masked.
            mbarrier.wait(q_full.index(q_index), (work // Q_SLOTS) & 1)
            if HELD:
                q = q_tile.load(gl.DotOperandLayout(0, S, 2))
            else:
                q = q_tile
            mbarrier.wait(k_full.index(used % STAGES), (used // STAGES) & 1)
            s_token = scores(q, k_s, used % STAGES, BN, S)
            s = warpgroup_mma_wait(0, deps=[s_token])
            mbarrier.arrive(k_empty.index(used % STAGES), count=1)
            s = masked(s, limit, blocks - 1, BN, S)
            p, m, l, _factor = softmax(s, m, l, scale, O_ROWS, P, dtype)
            if VARLEN:  # noqa: SIM102
                if blocks * BN > len_k:
                    mbarrier.wait(v_full.index(used % STAGES), (used // STAGES) & 1)
                    zero_rows_from(as_matrix(v_s.index(used % STAGES)), len_k - (blocks - 1) * BN, c, BN, D, CONSUMERS)
            last = used + blocks - 1
            if OVERLAP:
                mbarrier.wait(k_full.index((used + 1) % STAGES), ((used + 1) // STAGES) & 1, pred=used < last)

            # Blocks on the diagonal, then those without a mask.
            first_free = gl.maximum(used + blocks - free, used + 1)
            if CAUSAL:
                for n in range(used + 1, first_free):
                    acc, p, m, l = step(
                        c, n, last, q, k_s, v_s, k_full, k_empty, v_full, v_empty, acc, p, m, l, scale, limit,
                        BN, D, STAGES, True, OVERLAP, PINGPONG,
                    )  # fmt: skip
            for n in range(first_free, used + blocks):
                acc, p, m, l = step(
                    c, n, last, q, k_s, v_s, k_full, k_empty, v_full, v_empty, acc, p, m, l, scale, limit,
                    BN, D, STAGES, False, OVERLAP, PINGPONG,
                )  # fmt: skip

            v_slot = last % STAGES
            mbarrier.wait(v_full.index(v_slot), (last // STAGES) & 1)
            acc_token = warpgroup_mma(p, as_matrix(v_s.index(v_slot)), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
            mbarrier.arrive(v_empty.index(v_slot), count=1)

            # O goes through Q's shared memory, so that it is written in whole lines. In fp32, as a part's is, it would
            # not fit, and what a thread has next to each other is 8 bytes: whole sectors from where they are.
            none = l == 0.0
            inverse = gl.convert_layout(gl.where(none, 0.0, 1.0 / l), O_ROWS, assert_trivial=True)
            empty = gl.convert_layout(none, O_ROWS, assert_trivial=True)
            result = gl.where(empty[:, None], 0.0, acc * inverse[:, None])
            if not SPLIT:
                partition_barrier()
                q_tile.store(result.to(dtype))
                partition_barrier()
                result = q_tile.load(COPY)
            rows = gl.arange(0, ROWS, C_ROWS)
            dims = gl.arange(0, D, gl.SliceLayout(0, COPY))
            mask = (rows < len_q - start)[:, None]
            if HEAD_DIM != D:
                mask = mask & (dims < HEAD_DIM)[None, :]
            row = first_q + start
            out_row = num_heads * HEAD_DIM
            out_tile = out + (batch * total_q + row).to(gl.int64) * out_row + head * HEAD_DIM
            gl.store(out_tile + rows[:, None] * out_row + dims[None, :], result, mask=mask)
            natural = gl.where(none, float("-inf"), (m + gl.log2(l)) * LN2)
            lse_tile = lse + (batch * num_heads + head).to(gl.int64) * total_q + row
            gl.store(lse_tile + local_rows, natural, mask=local_rows < len_q - start)
            fence_async_shared()  # Q's next tile is written by TMA after what ordinary loads read
            mbarrier.arrive(q_empty.index(q_index), count=1)
            used += blocks
            work += 1
        elif VARLEN:
            begin = first_q + start - c * ROWS + c
            write_zeros(
                out + head * HEAD_DIM, begin, first_q + len_q, CONSUMERS, num_heads * HEAD_DIM, D, HEAD_DIM,
            )  # fmt: skip
            for row_of_none in range(begin, first_q + len_q, CONSUMERS):
                gl.store(lse + head.to(gl.int64) * total_q + row_of_none, float("-inf"))


@gluon.jit(
    # One compiled kernel for all sizes: the launcher keeps it by constexprs and dtype alone.
    do_not_specialize=[
        "softmax_scale", "seqlen_q", "seqlen_k", "num_sequences", "num_heads", "queries_per_key_head", "heads_together",
        "tiles_per_head", "num_tiles",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q", "cu_seqlens_k"],
)  # fmt: skip
def attention_forward(
    q_desc, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, seqlen_q, seqlen_k, num_sequences,
    num_heads, queries_per_key_head, heads_together, tiles_per_head, num_tiles,
    CONSUMERS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    Q_SLOTS: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr, OVERLAP: gl.constexpr,
    PINGPONG: gl.constexpr, PERSISTENT: gl.constexpr, HELD: gl.constexpr, SPLIT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors are over (B, heads, S, D) with blocks (1, 1, 64 or BN, D); packed tensors have B = 1.

    `seqlen_q` is the length of Q's third dimension. The grid is one-dimensional, any size up to `num_tiles`. With SPLIT
    (dense only) `num_tiles` counts every part of every tile, and out and lse have a place for each part before B.
    """
    gl.static_assert(not SPLIT or not VARLEN)
    gl.static_assert(CONSUMERS == 2 or (CONSUMERS == 3 and not PINGPONG))
    gl.static_assert(OVERLAP or not PINGPONG)
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(Q_SLOTS * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    partition_barrier()
    if not VARLEN:
        cu_seqlens_q = 0  # None cannot stand in a tuple
        cu_seqlens_k = 0
    scale = softmax_scale * LOG2E
    shared = (q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    results = (out, lse)
    tiles = (
        num_tiles, tiles_per_head, heads_together, num_sequences, num_heads, seqlen_q, seqlen_k, cu_seqlens_q,
        cu_seqlens_k,
    )  # fmt: skip
    # Constexprs are spelt out: in a tuple that is assigned to a name they would become run-time values.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (0, shared, results, tiles, scale, CONSUMERS, BN, D, HEAD_DIM, STAGES, Q_SLOTS, CAUSAL,
                            VARLEN, OVERLAP, PINGPONG, PERSISTENT, HELD, SPLIT)),
                (consumer, (1, shared, results, tiles, scale, CONSUMERS, BN, D, HEAD_DIM, STAGES, Q_SLOTS, CAUSAL,
                            VARLEN, OVERLAP, PINGPONG, PERSISTENT, HELD, SPLIT)),
                (producer, (q_desc, k_desc, v_desc, shared, tiles, queries_per_key_head, CONSUMERS, BN, D, STAGES,
                            Q_SLOTS, CAUSAL, VARLEN, PERSISTENT, SPLIT)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (0, shared, results, tiles, scale, CONSUMERS, BN, D, HEAD_DIM, STAGES, Q_SLOTS, CAUSAL,
                            VARLEN, OVERLAP, PINGPONG, PERSISTENT, HELD, SPLIT)),
                (consumer, (1, shared, results, tiles, scale, CONSUMERS, BN, D, HEAD_DIM, STAGES, Q_SLOTS, CAUSAL,
                            VARLEN, OVERLAP, PINGPONG, PERSISTENT, HELD, SPLIT)),
                (consumer, (2, shared, results, tiles, scale, CONSUMERS, BN, D, HEAD_DIM, STAGES, Q_SLOTS, CAUSAL,
                            VARLEN, OVERLAP, PINGPONG, PERSISTENT, HELD, SPLIT)),
                (producer, (q_desc, k_desc, v_desc, shared, tiles, queries_per_key_head, CONSUMERS, BN, D, STAGES,
                            Q_SLOTS, CAUSAL, VARLEN, PERSISTENT, SPLIT)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
