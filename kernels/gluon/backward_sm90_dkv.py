"""dK and dV for Hopper (sm_90) in Gluon: TMA loads, asynchronous wgmma, a producer, two consumers.

A block of threads owns a tile of 128 keys of one key head, 64 for each consumer warpgroup, and walks over the rows that
see them, BM at a time, for each query head of the group in turn (Dao 2023, "FlashAttention-2", algorithm 2):

    S^T = K Q^T        P^T = exp(S^T - lse)        dV += P^T dO
    dP^T = V dO^T      dS^T = P^T * (dP^T - delta) dK += dS^T Q

Transposed, P^T and dS^T are left operands straight from registers, and the group is summed without atomics, in a fixed
order. One warp (the producer) copies K and V once, then Q and dO tiles into a ring of `STAGES` slots by TMA, and lse
and delta by ordinary loads, which need no alignment. They meet at mbarriers only:

    kv_full         K and V have arrived                 1 arrival (the producer's expect) + their bytes
    full[s]         the tiles and rows of slot s are there   2 arrivals (expect, and the rows' stores) + its bytes
    full[STAGES]    packed: a sequence's last tiles have arrived, and the producer zeroes what is past the end
    empty[s]        every consumer is done with slot s   1 arrival per consumer

The n-th block lives in slot n % STAGES; parities are those of `forward_sm90`.

A consumer issues S and dP together, and then what is left of the block before with OVERLAP: S_n dP_n dV_{n-1} dK_{n-1},
so that the exponentials of block n run under three products. Without, dV_n is issued when P_n is there and runs under
dS_n, which takes 32 registers less. The other consumer's products run all the time.

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

from vllm_accel.kernels.gluon.forward_sm90 import as_matrix, extent, partition_barrier, sequence_at, write_zeros

LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # keys of one consumer: the M of one wgmma


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
):  # fmt: skip
    k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, full, empty = shared
    LINE: gl.constexpr = gl.BlockedLayout([BM // 32], [32], [1], [0])
    rows = gl.arange(0, BM, LINE)
    num_heads = tiles[3] * queries_per_key_head
    seqlen_q = tiles[4]
    batch, key_head, first, first_q, first_k, len_q, _, start, _, blocks = keys_at(
        gl.program_id(0), tiles, BM, CAUSAL, VARLEN
    )
    if blocks > 0:
        mbarrier.expect(kv_full.index(0), 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for c in gl.static_range(2):
            at = first_k + first + c * ROWS
            tma.async_copy_global_to_shared(k_desc, [batch, key_head, at, 0], kv_full.index(0), k_s.index(c))
            tma.async_copy_global_to_shared(v_desc, [batch, key_head, at, 0], kv_full.index(0), v_s.index(c))
    n = 0
    for head in range(key_head * queries_per_key_head, (key_head + 1) * queries_per_key_head):
        line = (batch * num_heads + head).to(gl.int64) * seqlen_q + first_q
        for block in range(start, blocks):
            slot = n % STAGES
            at = block * BM
            left = len_q - at
            here = rows < left
            row_lse = gl.load(lse + line + at + rows, mask=here, other=float("inf")) * LOG2E
            row_delta = gl.load(delta + line + at + rows, mask=here, other=0.0)
            mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
            arrival = slot
            if VARLEN:
                arrival = gl.where(left < BM, STAGES, slot)
            mbarrier.expect(full.index(arrival), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            at += first_q
            tma.async_copy_global_to_shared(q_desc, [batch, head, at, 0], full.index(arrival), q_s.index(slot))
            tma.async_copy_global_to_shared(do_desc, [batch, head, at, 0], full.index(arrival), do_s.index(slot))
            lse_s.index(slot).store(row_lse)
            delta_s.index(slot).store(row_delta)
            if VARLEN:  # noqa: SIM102 - the one is decided by the compiler, the other by the GPU
                if left < BM:  # one block of each head, or none
                    mbarrier.wait(full.index(STAGES), (head - key_head * queries_per_key_head) & 1)
                    zero_past_end(as_matrix(q_s.index(slot)), left, BM, D)
                    zero_past_end(as_matrix(do_s.index(slot)), left, BM, D)
                    fence_async_shared()  # what ordinary stores wrote is read by wgmma, through the other proxy
                    mbarrier.arrive(full.index(slot), count=1)
            mbarrier.arrive(full.index(slot), count=1)
            n += 1


@gluon.jit
def products(a, b, c, d, BM: gl.constexpr):
    """Issue A C^T and B D^T, without waiting for them."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    zero = gl.zeros([ROWS, BM], gl.float32, S)
    first = warpgroup_mma(a, c.permute((1, 0)), zero, use_acc=False, is_async=True)
    second = warpgroup_mma(b, d.permute((1, 0)), zero, use_acc=False, is_async=True)
    return first, second


@gluon.jit
def probabilities(s, row_lse, shift, scale, BM: gl.constexpr, MASKED: gl.constexpr):
    """Return P^T; with a mask, key r of the tile sees row c of the block where c - r >= shift."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    p = gl.exp2(s * scale - row_lse[None, :])
    if MASKED:
        r = gl.arange(0, ROWS, gl.SliceLayout(1, S))
        c = gl.arange(0, BM, gl.SliceLayout(0, S))
        # Not c - r >= shift: c - r would be computed before the loop, and take a register for each number of the tile.
        p = gl.where((c - shift)[None, :] >= r[:, None], p, 0.0)
    return p


@gluon.jit
def operand(x, D: gl.constexpr, dtype: gl.constexpr):
    """Return what came out of a product as the left operand of one with D columns."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, O, 2), assert_trivial=True)


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
    BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Add a block's part to dV and dK: block n's, or with OVERLAP that of block n - 1, whose operands are p and ds."""
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
    if OVERLAP == 1:
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
    elif OVERLAP == 2:
        dv = warpgroup_mma(p, as_matrix(do_s.index(before)), dv, is_async=True)
        dk = warpgroup_mma(ds, as_matrix(q_s.index(before)), dk, is_async=True)
        s = warpgroup_mma_wait(3, deps=[s])
        probability = probabilities(s, lse_s.index(slot).load(COLUMNS), shift, scale, BM, MASKED)
        mbarrier.wait(full.index(slot), parity)
        dp = warpgroup_mma_wait(2, deps=[dp])
        next_p = operand(probability, D, k.dtype)
        next_ds = operand(probability * (dp - delta_s.index(slot).load(COLUMNS)[None, :]), D, k.dtype)
        mbarrier.wait(full.index(slot), parity)
        dk, dv, p, ds, next_p, next_ds = warpgroup_mma_wait(0, deps=[dk, dv, p, ds, next_p, next_ds])
        mbarrier.arrive(empty.index(before), count=1)
        return dk, dv, next_p, next_ds
    else:
        s = warpgroup_mma_wait(1, deps=[s])
        probability = probabilities(s, lse_s.index(slot).load(COLUMNS), shift, scale, BM, MASKED)
        mbarrier.wait(full.index(slot), parity)
        p = operand(probability, D, k.dtype)
        dv = warpgroup_mma(p, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = operand(probability * (dp - delta_s.index(slot).load(COLUMNS)[None, :]), D, k.dtype)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        dk, dv, p, ds = warpgroup_mma_wait(0, deps=[dk, dv, p, ds])
        mbarrier.arrive(empty.index(slot), count=1)
        return dk, dv, p, ds


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


@gluon.jit
def consumer(
    c, shared, results, tiles, queries_per_key_head, softmax_scale,
    BM: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    work = keys_at(gl.program_id(0), tiles, BM, CAUSAL, VARLEN)
    if work[9] > 0:
        consume(
            c, shared, results, tiles, work, queries_per_key_head, softmax_scale,
            BM, D, HEAD_DIM, HEAD_DIM_V, STAGES, CAUSAL, OVERLAP,
        )  # fmt: skip
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
    c, shared, results, tiles, work, queries_per_key_head, softmax_scale,
    BM: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, full, empty = shared
    dk_out, dv_out = results
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    num_heads = tiles[3]
    seqlen_k = tiles[5]
    batch, head, first, _, first_k, len_q, len_k, start, free, blocks = work
    first += c * ROWS
    k = as_matrix(k_s.index(c))
    v = as_matrix(v_s.index(c))
    scale = softmax_scale * LOG2E
    dk = gl.zeros([ROWS, D], gl.float32, O)
    dv = gl.zeros([ROWS, D], gl.float32, O)
    p = gl.zeros([ROWS, BM], k.dtype, P)
    ds = gl.zeros([ROWS, BM], k.dtype, P)
    mbarrier.wait(kv_full.index(0), 0)
    row = first + len_q - len_k  # the first that sees the consumer's first key
    n = 0
    if OVERLAP != 0:
        p, ds = first_step(row - start * BM, k, v, q_s, do_s, lse_s, delta_s, full, scale, BM, D, CAUSAL)
        if OVERLAP == 1:
            dv = warpgroup_mma(p, as_matrix(do_s.index(0)), dv, is_async=True)
            dv, p = warpgroup_mma_wait(0, deps=[dv, p])
        n = 1
    for member in range(queries_per_key_head):
        begin = start
        if OVERLAP != 0:
            begin = start + gl.where(member == 0, 1, 0)
        if CAUSAL:
            for block in range(begin, free):
                dk, dv, p, ds = step(
                    n, row - block * BM, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, p, ds, scale,
                    BM, D, STAGES, True, OVERLAP,
                )  # fmt: skip
                n += 1
        for _block in range(gl.maximum(begin, free), blocks):
            dk, dv, p, ds = step(
                n, 0, k, v, q_s, do_s, lse_s, delta_s, full, empty, dk, dv, p, ds, scale,
                BM, D, STAGES, False, OVERLAP,
            )  # fmt: skip
            n += 1
    if OVERLAP != 0:
        slot = (n + STAGES - 1) % STAGES
        if OVERLAP == 2:
            dv = warpgroup_mma(p, as_matrix(do_s.index(slot)), dv, is_async=True)
        dk = warpgroup_mma(ds, as_matrix(q_s.index(slot)), dk, is_async=True)
        dk, dv, p, ds = warpgroup_mma_wait(0, deps=[dk, dv, p, ds])
    row = (batch * seqlen_k + first_k).to(gl.int64)
    dk_out += row * (num_heads * HEAD_DIM) + head * HEAD_DIM
    dv_out += row * (num_heads * HEAD_DIM_V) + head * HEAD_DIM_V
    store_tile(dk * softmax_scale, k, dk_out, first, len_k, num_heads * HEAD_DIM, D, HEAD_DIM)
    store_tile(dv, v, dv_out, first, len_k, num_heads * HEAD_DIM_V, D, HEAD_DIM_V)


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
    CAUSAL: gl.constexpr, VARLEN: gl.constexpr, OVERLAP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors are over (B, heads, S, D) with blocks (1, 1, BM, D) for Q and dO and (1, 1, 64, D) for K and V.

    `num_heads` counts key heads. `seqlen_q`, `seqlen_k` are the lengths of Q's and K's third dimension. One block for
    each tile of keys of each sequence, packed: for each slot of `sequence_at`. All rows of dk and dv are written.
    """
    dtype: gl.constexpr = q_desc.dtype
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], do_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], LINE)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], LINE)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(full.index(STAGES), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    partition_barrier()
    shared = (k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, full, empty)
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
                        STAGES, CAUSAL, VARLEN, OVERLAP)),
            (consumer, (1, shared, results, tiles, queries_per_key_head, softmax_scale, BM, D, HEAD_DIM, HEAD_DIM_V,
                        STAGES, CAUSAL, VARLEN, OVERLAP)),
            (producer, (q_desc, k_desc, v_desc, do_desc, lse, delta, shared, tiles, queries_per_key_head, BM, D, STAGES,
                        CAUSAL, VARLEN)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
