"""Grouped matrix products: one persistent kernel for tokens by expert, weight gradients and batches.

A launch has about as many programs as the GPU can run at once; program p takes the tiles p, p + programs, ... of all
groups together, so one large expert is shared by the whole GPU and an empty one costs nothing. The ends of the groups
are read on the device: no host synchronisation. Within a group, tiles go down GROUP_M blocks of rows before they go one
block of columns to the right, so that programs which run together read the same weights (the order of Triton's matrix
multiplication tutorial). Scaled FP8 products follow the scheme of DeepSeek-V3's report (section 3.3): sums on tensor
cores are taken into fp32 registers every 128 products at most, because Hopper's keep about 14 bits of an FP8 sum.

Legend of shapes: T rows of all groups, E groups, M rows of a group, K depth, N columns. Layouts: FORM 0 (ROWS) is
a (T, K) x b (E, K, N) -> out (T, N); 1 (DEPTH) a (M, T) x b (T, N) -> out (E, M, N); 2 (BATCH) a (E, M, K) x
b (E, K, N) -> out (E, M, N). Strides are free; operands come through TMA descriptors where the launcher found them fit.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.pages import BITS_SCALE, widen

#: FORM of a launch.
ROWS, DEPTH, BATCH = 0, 1, 2
#: A_SCALE and B_SCALE of a launch: none; constant along K, applied to the finished sum; another factor every 128 steps
#: along K, applied to each partial sum.
NO_SCALE, LAST, BLOCKS = 0, 1, 2


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _boundaries(offs, groups, limit, BLOCK_E: tl.constexpr):
    """Return where each group starts and ends. Whatever offs holds, groups lie in order within 0 .. limit and do not
    overlap; past the last, both are the last end."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offs + e, mask=e < groups, other=0)
    starts = tl.load(offs + e - 1, mask=(e > 0) & (e <= groups), other=0)
    ends = tl.associative_scan(tl.minimum(tl.maximum(ends, 0), limit), 0, _larger)
    starts = tl.associative_scan(tl.minimum(tl.maximum(starts, 0), limit), 0, _larger)
    return starts, ends


@triton.jit
def _product(
    a, b, acc, a_scale, b_scale, a_scale_rows, b_scale_cols, k, a_scale_stride_k, b_scale_stride_k, rows_inside,
    UPCAST: tl.constexpr, A_BITS: tl.constexpr, B_BITS: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr,
    INTEGER: tl.constexpr, IMPRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc plus one step along K."""
    if UPCAST:
        a = widen(a, tl.float16, A_BITS)
        b = widen(b, tl.float16, B_BITS)
    if A_SCALE != 2 and B_SCALE != 2:
        if INTEGER:
            return tl.dot(a, b, acc, out_dtype=tl.int32)
        else:
            return tl.dot(a, b, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
    else:
        if INTEGER:
            partial = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        else:
            partial = tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
        block = k // 128
        if B_SCALE == 2:
            partial *= tl.load(b_scale + b_scale_cols + block * b_scale_stride_k)
        if A_SCALE == 2:
            partial *= tl.load(a_scale + a_scale_rows + block * a_scale_stride_k, mask=rows_inside, other=0.0)[:, None]
        return acc + partial


@triton.jit
def _pointers(
    a, b, group, m0, n0, k, source, gathered: tl.constexpr, a_stride_e, a_stride_m, a_stride_k, b_stride_e, b_stride_k,
    b_stride_n, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return pointers to the blocks at (m0, k) and (k, n0): 64 bits to their corner, 32 within."""
    group = group.to(tl.int64)
    wide_k = k.to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    if FORM == 2:
        a += group * a_stride_e
    if FORM != 1:
        b += group * b_stride_e
    if gathered:
        a_at = a + source.to(tl.int64)[:, None] * a_stride_m + (wide_k * a_stride_k + ks[None, :] * a_stride_k)
    else:
        a += m0.to(tl.int64) * a_stride_m + wide_k * a_stride_k
        a_at = a + (tl.arange(0, BLOCK_M)[:, None] * a_stride_m + ks[None, :] * a_stride_k)
    b += n0.to(tl.int64) * b_stride_n + wide_k * b_stride_k
    b_at = b + (ks[:, None] * b_stride_k + tl.arange(0, BLOCK_N)[None, :] * b_stride_n)
    return a_at, b_at


@triton.jit(do_not_specialize=["rows_total", "m", "groups", "a_rows"])
def grouped_gemm(
    a_desc, b_desc, a, b, out, offs, bias, gather, a_scale, b_scale,
    a_stride_e, a_stride_m, a_stride_k, b_stride_e, b_stride_k, b_stride_n, out_stride_e, out_stride_m, out_stride_n,
    bias_stride_e, bias_stride_n, a_scale_stride_e, a_scale_stride_m, a_scale_stride_k,
    b_scale_stride_e, b_scale_stride_k, b_scale_stride_n,
    rows_total, m, n, depth, groups, a_rows,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr, A_ALONG_M: tl.constexpr, B_ALONG_K: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr, A_BITS: tl.constexpr, B_BITS: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr,
    B_SCALE_N: tl.constexpr, INTEGER: tl.constexpr, IMPRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out; with FORM 0 also zeros in the rows past the last group.

    Args:
        a_desc, b_desc: TMA descriptors of a and b, or None; A_ALONG_M, B_ALONG_K: what is contiguous in them. Groups
            are stacked along the first dimension.
        offs: (E,) int32, ends of groups along T; None for FORM 2. bias: stride_e 0 for one that groups share.
        gather: (T,) int32 or int64: row t of the product is row gather[t] of a, which has `a_rows` rows; or None.
        a_scale, b_scale: fp32, at (group, row, k // 128) and (group, k // 128, column // B_SCALE_N); strides are 0
            where a factor is shared. A_SCALE, B_SCALE: see NO_SCALE, LAST and BLOCKS.
        rows_total: T. m: rows of a group for FORM 1 and 2. depth: K for FORM 0 and 2.
        UPCAST: FP8 for a chip without FP8 products: widened to fp16, which is exact. A_BITS, B_BITS: then, which of
            them are bytes of e4m3, a type that some chips lack. IMPRECISE: products between two roundings to fp32,
            None for the compiler's own rule. INTEGER: int8 products. EVEN_K: depth is a multiple of BLOCK_K.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    n_tiles = tl.cdiv(n, BLOCK_N)
    e_index = tl.arange(0, BLOCK_E)
    if FORM != 2:
        starts, ends = _boundaries(offs, groups, rows_total, BLOCK_E)
    if FORM == 0:
        upto = tl.cumsum(tl.cdiv(ends - starts, BLOCK_M) * n_tiles, 0)
        total = tl.max(upto, 0)
    else:
        total = groups * tl.cdiv(m, BLOCK_M) * n_tiles

    for tile in tl.range(pid, total, programs):
        if FORM == 0:
            passed = upto <= tile
            group = tl.sum(passed.to(tl.int32), 0)
            within = tile - tl.max(tl.where(passed, upto, 0), 0)
        else:
            per_group = tl.cdiv(m, BLOCK_M) * n_tiles
            group = tile // per_group
            within = tile - group * per_group
        first = group * 0
        last = m
        if FORM != 2:
            here = e_index == group
            begin = tl.sum(tl.where(here, starts, 0), 0)
            end = tl.sum(tl.where(here, ends, 0), 0)
        if FORM == 0:
            first = begin
            last = end
        k_begin = group * 0
        k_end = depth
        if FORM == 1:
            k_begin = begin
            k_end = end

        m_tiles = tl.cdiv(last - first, BLOCK_M)
        section = within // (GROUP_M * n_tiles)
        height = tl.minimum(m_tiles - section * GROUP_M, GROUP_M)
        inside_section = within - section * GROUP_M * n_tiles
        m0 = first + (section * GROUP_M + inside_section % height) * BLOCK_M
        n0 = (inside_section // height) * BLOCK_N

        wide_group = group.to(tl.int64)
        rows = m0 + tl.arange(0, BLOCK_M)
        cols = n0 + tl.arange(0, BLOCK_N)
        rows_inside = rows < last
        cols_inside = cols < n
        source = rows
        if gather is not None:
            source = tl.load(gather + rows, mask=rows_inside, other=0)
            source = tl.minimum(tl.maximum(source, 0), a_rows - 1)

        ks = tl.arange(0, BLOCK_K)
        if not TMA:
            a_at, b_at = _pointers(
                a, b, group, m0, n0, k_begin, source, gather is not None, a_stride_e, a_stride_m, a_stride_k,
                b_stride_e, b_stride_k, b_stride_n, FORM, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip

        a_scale_rows = 0
        b_scale_cols = 0
        if A_SCALE != 0:
            a_scale_rows = wide_group * a_scale_stride_e + source.to(tl.int64) * a_scale_stride_m
        if B_SCALE != 0:
            if B_SCALE_N % BLOCK_N == 0:  # one factor for the whole tile
                b_scale_cols = wide_group * b_scale_stride_e + (n0 // B_SCALE_N).to(tl.int64) * b_scale_stride_n
            else:
                columns = tl.minimum(cols, n - 1) // B_SCALE_N
                b_scale_cols = wide_group * b_scale_stride_e + columns.to(tl.int64)[None, :] * b_scale_stride_n

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER and A_SCALE != 2 and B_SCALE != 2 else tl.float32)
        whole = (k_end - k_begin) // BLOCK_K
        for step in tl.range(0, whole):
            k = k_begin + step * BLOCK_K
            if TMA:
                outer = group * m if FORM == 2 else 0
                if A_ALONG_M:
                    a_outer = group * depth if FORM == 2 else 0
                    a_tile = a_desc.load([a_outer + k, m0]).T
                else:
                    a_tile = a_desc.load([outer + m0, k])
                if B_ALONG_K:
                    b_outer = group * n if FORM != 1 else 0
                    b_tile = b_desc.load([b_outer + n0, k]).T
                else:
                    b_outer = group * depth if FORM != 1 else 0
                    b_tile = b_desc.load([b_outer + k, n0])
            else:
                a_tile = tl.load(a_at, mask=rows_inside[:, None], other=0.0)
                b_tile = tl.load(b_at, mask=cols_inside[None, :], other=0.0)
                a_at += BLOCK_K * a_stride_k
                b_at += BLOCK_K * b_stride_k
            acc = _product(
                a_tile, b_tile, acc, a_scale, b_scale, a_scale_rows, b_scale_cols, k, a_scale_stride_k,
                b_scale_stride_k, rows_inside, UPCAST, A_BITS, B_BITS, A_SCALE, B_SCALE, INTEGER, IMPRECISE, PRECISION,
            )  # fmt: skip
        if not EVEN_K:
            k = k_begin + whole * BLOCK_K
            left = k_end - k
            if left > 0:
                if TMA:  # only here: they would take registers from the loop above
                    a_at, b_at = _pointers(
                        a, b, group, m0, n0, k, source, gather is not None, a_stride_e, a_stride_m, a_stride_k,
                        b_stride_e, b_stride_k, b_stride_n, FORM, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                a_tile = tl.load(a_at, mask=rows_inside[:, None] & (ks[None, :] < left), other=0.0)
                b_tile = tl.load(b_at, mask=(ks[:, None] < left) & cols_inside[None, :], other=0.0)
                acc = _product(
                    a_tile, b_tile, acc, a_scale, b_scale, a_scale_rows, b_scale_cols, k, a_scale_stride_k,
                    b_scale_stride_k, rows_inside, UPCAST, A_BITS, B_BITS, A_SCALE, B_SCALE, INTEGER, IMPRECISE,
                    PRECISION,
                )  # fmt: skip

        if A_BITS:
            acc *= BITS_SCALE
        if B_BITS:
            acc *= BITS_SCALE
        if A_SCALE == 1:
            acc = acc * tl.load(a_scale + a_scale_rows, mask=rows_inside, other=0.0)[:, None]
        if B_SCALE == 1:
            acc = acc * tl.load(b_scale + b_scale_cols)
        if bias is not None:
            added = tl.load(bias + wide_group * bias_stride_e + cols * bias_stride_n, mask=cols_inside, other=0)
            acc = acc + added.to(tl.float32)[None, :]
        out_first = out + m0.to(tl.int64) * out_stride_m
        if FORM != 0:
            out_first += wide_group * out_stride_e
        out_at = out_first + tl.arange(0, BLOCK_M)[:, None] * out_stride_m + cols.to(tl.int64)[None, :] * out_stride_n
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=rows_inside[:, None] & cols_inside[None, :])

    if FORM == 0:
        cleared = tl.max(ends, 0)
        for tile in range(pid, tl.cdiv(rows_total - cleared, BLOCK_M) * n_tiles, programs):
            rows = cleared + (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            out_at = out + rows.to(tl.int64)[:, None] * out_stride_m + cols.to(tl.int64)[None, :] * out_stride_n
            zeros = tl.zeros([BLOCK_M, BLOCK_N], out.dtype.element_ty)
            tl.store(out_at, zeros, mask=(rows < rows_total)[:, None] & (cols < n)[None, :])
