"""Attention over a paged cache: decode, speculative tokens, chunked prefill and batches of all of them.

One kernel. Its rows are query tokens times the heads of a group, its keys are gathered BLOCK_N at a time across pages
of any size, and a sequence's keys may be shared out among `num_splits` programs whose results `combine.py` joins
(FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; online softmax: Milakov and Gimelshein 2018).
Everything about a sequence is read on the device, so a captured CUDA graph can be replayed with other lengths.

Layouts: q (tokens, num_heads, D), caches (num_blocks, PAGE, num_kv_heads, D / DV), any strides with the innermost 1; a
row of the block table for each sequence. Tiles: `tiles/paged.json` and `tiles/mla.json`, by the rows that a sequence
has for a key head: `m16`, `m32`, `m64` and `prefill`.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.entries import first_entries, next_entries, pages_at, tokens_at
from vllm_accel.kernels.triton.mla import attend_latent
from vllm_accel.kernels.triton.pages import (
    BITS_SCALE,
    add_sink,
    find_sequence,
    find_share,
    finish,
    halves,
    keys_of,
    online,
    pages_of,
    query_span,
    row_power,
    split_range,
    tokens_in,
    widen,
    within,
    zero_rows,
)
from vllm_accel.kernels.triton.scores import LN2, LOG2E, factor, keys_of_rows, logits, per_head


@triton.jit
def _attend(
    begin, end, acc, odd, m, l, q, power, k_head, v_head, table, rows, len_q, len_k, scale, softcap, slope, left, right,
    num_blocks, stride_kb, stride_ks, stride_vb, stride_vs,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, MASKED: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr, BITS: tl.constexpr,
    NORM: tl.constexpr, PAIRS: tl.constexpr, E5M2: tl.constexpr, ASM: tl.constexpr, ENTRIES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Let the rows attend to the keys [begin, end), in steps of BLOCK_N from a multiple of it.

    Keys from `end` on are read as 0, not only masked: what lies there may be NaN, and 0 * NaN is NaN.
    With PAIRS acc has the even channels and odd the others; else odd is not used.
    """
    WIDTH: tl.constexpr = DV // 2 if PAIRS else DV
    BLOCK_W: tl.constexpr = BLOCK_DV // 2 if PAIRS else BLOCK_DV
    columns = tl.arange(0, BLOCK_D)
    columns_v = tl.arange(0, BLOCK_W)
    exponent = factor(scale, FOLD)
    if EACH:
        l = tl.where(tl.arange(0, BLOCK_N)[None, :] == 0, l[:, None], 0.0)
    if ENTRIES:
        entries, following = first_entries(begin, end, table, PAGE, ASM)
    else:
        page = pages_of(begin, end, table, num_blocks, PAGE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        if ENTRIES:
            pages = pages_at(entries, start, PAGE, BLOCK_N, ASM)
            at = tokens_at(k_head, pages, num_blocks, stride_kb, stride_ks, PAGE, BLOCK_N)
        else:
            at = tokens_in(k_head, page, start, stride_kb, stride_ks, PAGE, BLOCK_N)
        if MASKED or D != BLOCK_D:
            k = tl.load(at[:, None] + columns[None, :], mask=within(n < end, columns, D, BLOCK_D), other=0.0)
        else:
            k = tl.load(at[:, None] + columns[None, :])
        if ENTRIES:
            at = tokens_at(v_head, pages, num_blocks, stride_vb, stride_vs, PAGE, BLOCK_N)
        else:
            at = tokens_in(v_head, page, start, stride_vb, stride_vs, PAGE, BLOCK_N)
        if MASKED or DV != BLOCK_DV:
            v = tl.load(at[:, None] + columns_v[None, :], mask=within(n < end, columns_v, WIDTH, BLOCK_W), other=0.0)
        else:
            v = tl.load(at[:, None] + columns_v[None, :])
        if ENTRIES:
            entries, following = next_entries(entries, following, start + BLOCK_N, end, table, PAGE, ASM)
        else:
            page = pages_of(start + BLOCK_N, end, table, num_blocks, PAGE, BLOCK_N)
        s = tl.dot(q, tl.trans(widen(k, q.dtype, BITS)), input_precision=PRECISION)
        if NORM:
            s *= power[:, None]
        s = logits(
            s, rows[:, None], n[None, :], len_q, len_k, scale, softcap, slope[:, None], None, 0, 0, left, right,
            FOLD, SOFTCAP, ALIBI, 0, False, PRECISE, LEFT, RIGHT, MASKED,
        )  # fmt: skip
        p, rescale, m, l = online(s, m, l, exponent)
        p = p.to(q.dtype)
        if PAIRS:
            v, high = halves(v, E5M2, ASM)
            odd = tl.dot(p, high, odd * rescale[:, None], input_precision=PRECISION)
        acc = tl.dot(p, widen(v, q.dtype, BITS), acc * rescale[:, None], input_precision=PRECISION)
    return acc, odd, m, tl.sum(l, 1) if EACH else l


@triton.jit
def attend_rows(
    sequence, block, first, len_q, len_k, begin, inner, outer, end, rows, heads, kv_head, live,
    q_ptr, k_ptr, v_ptr, block_table, slopes, q_descale, k_descale, v_descale, scale, softcap,
    left, right, num_blocks, num_kv_heads,
    stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_tb,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PEEL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    Q_DESCALE: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr,
    ROPE: tl.constexpr, BLOCK_R: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BITS: tl.constexpr, Q_BITS: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr,
    E5M2: tl.constexpr, ASM: tl.constexpr, ENTRIES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Let BLOCK_M rows of one sequence and key head attend to its keys [begin, end): return sums, maxima, denominators.

    Args:
        block: where its keys begin without pages (`pages.keys_of`). first: the sequence's first token.
        rows, heads: of each row, token in the sequence and head; live: it is one.
        inner, outer: with PEEL the keys between them are seen by every row (`scores.keys_of_rows`).
        The others: see `paged_attention`.
    """
    num_heads = num_kv_heads * GROUP
    if Q_DESCALE >= 0:
        scale *= per_head(q_descale, sequence, kv_head, num_kv_heads, Q_DESCALE)
    if K_DESCALE >= 0:
        scale *= per_head(k_descale, sequence, kv_head, num_kv_heads, K_DESCALE)
    if BITS:
        scale *= BITS_SCALE
    if Q_BITS:
        scale *= BITS_SCALE
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI > 0:
        slope = tl.load(slopes + (sequence * num_heads if ALIBI == 2 else 0) + heads, mask=live, other=0.0)
    q_row = q_ptr + (first + rows).to(tl.int64)[:, None] * stride_qt + heads[:, None] * stride_qh
    columns = tl.arange(0, BLOCK_D)
    q = tl.load(q_row + columns[None, :], mask=within(live, columns, D, BLOCK_D), other=0.0)
    power = tl.full([BLOCK_M], 1.0, tl.float32)
    if NORM:
        power = row_power(q)
    if ROPE > 0:
        columns_r = tl.arange(0, BLOCK_R)
        q_rope = tl.load(q_row + D + columns_r[None, :], mask=within(live, columns_r, ROPE, BLOCK_R), other=0.0)
        if NORM:
            power = tl.maximum(power, row_power(q_rope))
    if NORM:
        q = q.to(tl.float32) / power[:, None]
        if ROPE > 0:
            q_rope = q_rope.to(tl.float32) / power[:, None]
    q = widen(q, DTYPE, Q_BITS)
    if ROPE > 0:
        q_rope = widen(q_rope, DTYPE, Q_BITS)
    k_head = k_ptr + kv_head.to(tl.int64) * stride_kh
    v_head = v_ptr + kv_head.to(tl.int64) * stride_vh
    if PAGE > 0:
        table = block_table + sequence.to(tl.int64) * stride_tb
    else:
        table = block

    WIDTH: tl.constexpr = BLOCK_DV // 2 if PAIRS else BLOCK_DV
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    odd = 0.0
    if PAIRS:
        v_head = v_head.to(tl.pointer_type(tl.uint16), bitcast=True)
        stride_vb //= 2
        stride_vs //= 2
        odd = acc
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if ROPE > 0:
        acc, m, l = attend_latent(
            begin, end, acc, m, l, q, q_rope, power, k_head, table, rows, len_q, len_k, scale, softcap,
            left, right, num_blocks, stride_kb, stride_ks,
            D, ROPE, BLOCK_D, BLOCK_R, BLOCK_N, PAGE, FOLD, SOFTCAP, LEFT, RIGHT, PRECISE, PRECISION, BITS, NORM,
        )  # fmt: skip
    else:
        # Keys that every row sees have a loop of their own, without masks; a short loop is better left in one piece.
        if PEEL and LEFT:
            acc, odd, m, l = _attend(
                begin, tl.minimum(end, inner), acc, odd, m, l, q, power, k_head, v_head, table, rows, len_q, len_k,
                scale, softcap, slope, left, right, num_blocks, stride_kb, stride_ks, stride_vb, stride_vs,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE, FOLD, SOFTCAP, ALIBI, LEFT, RIGHT, True, PRECISE, PRECISION,
                BITS, NORM, PAIRS, E5M2, ASM, ENTRIES, EACH,
            )  # fmt: skip
            begin = tl.maximum(begin, inner)
        if PEEL:
            acc, odd, m, l = _attend(
                begin, tl.minimum(end, outer), acc, odd, m, l, q, power, k_head, v_head, table, rows, len_q, len_k,
                scale, softcap, slope, left, right, num_blocks, stride_kb, stride_ks, stride_vb, stride_vs,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE, FOLD, SOFTCAP, ALIBI, LEFT, RIGHT, False, PRECISE, PRECISION,
                BITS, NORM, PAIRS, E5M2, ASM, ENTRIES, EACH,
            )  # fmt: skip
            begin = tl.maximum(begin, outer)
        acc, odd, m, l = _attend(
            begin, end, acc, odd, m, l, q, power, k_head, v_head, table, rows, len_q, len_k,
            scale, softcap, slope, left, right, num_blocks, stride_kb, stride_ks, stride_vb, stride_vs,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE, FOLD, SOFTCAP, ALIBI, LEFT, RIGHT, True, PRECISE, PRECISION,
            BITS, NORM, PAIRS, E5M2, ASM, ENTRIES, EACH,
        )  # fmt: skip
        if PAIRS:
            acc = tl.interleave(acc, odd)

    if BITS:
        acc *= BITS_SCALE
    if V_DESCALE >= 0:
        acc *= per_head(v_descale, sequence, kv_head, num_kv_heads, V_DESCALE)
    return acc, m, l


@triton.jit(
    do_not_specialize=[
        "left", "right", "tokens", "batch", "limit", "num_blocks", "num_splits", "goal", "most", "tiles",
        "low_q", "high_q", "part_rows", "stride_tb",
    ]
)  # fmt: skip
def paged_attention(
    q_ptr, k_ptr, v_ptr, cu_seqlens, block_table, seqused_k, out_ptr, lse_ptr, part_ptr,
    slopes, sinks, q_descale, k_descale, v_descale,
    scale, softcap,
    left, right, tokens, batch, num_blocks, limit, num_kv_heads, num_splits, goal, most, tiles, low_q,
    high_q, part_rows,
    stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_tb,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr, SPLIT: tl.constexpr, SPREAD: tl.constexpr, FIXED: tl.constexpr, PEEL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    Q_DESCALE: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr,
    ROPE: tl.constexpr, BLOCK_R: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BITS: tl.constexpr, Q_BITS: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr,
    E5M2: tl.constexpr, ASM: tl.constexpr, ENTRIES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Compute one tile of rows over one split of one sequence's keys, for one key head.

    Args:
        q_ptr: (tokens, num_heads, D). k_ptr, v_ptr: (num_blocks, PAGE, num_kv_heads, D / DV).
        cu_seqlens: (batch + 1,). block_table: (batch, max_blocks). seqused_k: (batch,).
        out_ptr: (tokens, num_heads, DV), lse_ptr: (num_heads, tokens), both contiguous; written where SPLIT is off, and
            for the rows past the last sequence. lse_ptr may be None.
        part_ptr: with SPLIT, fp32 (num_splits, part_rows, num_heads, DV) normalised sums, then as many rows of base-2
            log-sum-exps. A row is a token of the batch with SEARCH, of the sequence with SPREAD; else token t of
            sequence b is row b * high_q + t.
        slopes: (num_heads,) with ALIBI 1, (batch, num_heads) with ALIBI 2, fp32. sinks: (num_heads,).
        q_descale, k_descale, v_descale: fp32, with dimensions as Q_DESCALE and so on say (`per_head`), -1 for none.
        num_splits: splits of each sequence in the launch; with SPREAD shares of all (`pages.find_share`), of which a
            mean sequence has `goal`, and most keys of each count. What one share computes alone is no partial result.
        low_q, high_q: only sequences of so many query tokens are computed (the others are another launch's).
        tiles: with SEARCH the regions of the batch, in which a program finds its sequence; else tiles of rows of each
            sequence, of which none has more than high_q tokens.
        PEEL: keys that every row sees have a loop of their own.
        ROPE: for MLA, where keys have so many more channels than values and k_ptr holds both: D is then DV.
        BITS, Q_BITS: the caches, or q, are bytes of e4m3. NORM: q gives up its exponents (`row_power`).
        DTYPE: of the products. PAIRS, ASM: values of 8 bits, e4m3 or E5M2, are read in pairs (`pages.halves`).
        ENTRIES: pages are looked up 32 at a time (`entries.py`). The keys of a tile have 2 to 8 pages of their own.
        EACH: each key of a tile has its own denominators (`pages.online`).
    """
    index = tl.program_id(0)
    kv_head = index % num_kv_heads
    index = index // num_kv_heads
    tile = index % tiles
    index = index // tiles
    num_heads = num_kv_heads * GROUP
    count = num_splits
    if SEARCH:
        split = index
        # The last tiles of a causal sequence have most to do: they go first.
        sequence, tile = find_sequence(tiles - 1 - tile, cu_seqlens, batch, tokens, GROUP, BLOCK_M)
    elif SPREAD:
        sequence, split, count = find_share(index, seqused_k, batch, most, goal)
        if (sequence == batch) & (index < num_splits):
            return
    else:
        sequence = index % batch
        split = index // batch
        sequence = tl.where(split == num_splits, batch, sequence)
    first, len_q = query_span(cu_seqlens, sequence, batch, tokens)
    if sequence == batch:
        at, programs = tile, tiles  # of those that have these rows
        if SEARCH:
            programs = tiles - (first * GROUP // BLOCK_M + batch)
            at += split * programs
            programs *= num_splits
        zero_rows(out_ptr, lse_ptr, at, programs, first, tokens, num_heads, kv_head, GROUP, DV, BLOCK_DV)
        return
    if (tile * BLOCK_M >= len_q * GROUP) | (len_q < low_q) | (len_q > high_q):
        return
    block, len_k = keys_of(seqused_k, sequence, batch, limit, num_blocks, PAGE)

    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = r // GROUP
    heads = kv_head * GROUP + r % GROUP
    live = rows < len_q
    SPAN: tl.constexpr = BLOCK_M // GROUP if BLOCK_M % GROUP == 0 else (BLOCK_M - 1) // GROUP + 2
    low, inner, outer, high = keys_of_rows(
        tile * BLOCK_M // GROUP, len_q, len_k, left, right, SPAN, BLOCK_N, LEFT, RIGHT
    )
    # A decode is split or not without another kernel being compiled; what it has alone it writes at once.
    GROWS: tl.constexpr = SPLIT and not SEARCH and FIXED == 0
    alone = count == 1 if GROWS else not SPLIT
    if SPLIT:
        begin, end = split_range(low, high, split, num_splits, count, FIXED, BLOCK_N)
        row = rows
        if SPREAD:
            split = index
        else:
            row += first if SEARCH else sequence * high_q
        part = (split.to(tl.int64) * part_rows + row) * num_heads + heads
        part_lse = part_ptr + num_splits.to(tl.int64) * part_rows * num_heads * DV
        if (begin >= end) & (not alone):
            tl.store(part_lse + part, float("-inf"), mask=live)
            return
    else:
        begin, end = low, high
    acc, m, l = attend_rows(
        sequence, block, first, len_q, len_k, begin, inner, outer, end, rows, heads, kv_head, live,
        q_ptr, k_ptr, v_ptr, block_table, slopes, q_descale, k_descale, v_descale, scale, softcap,
        left, right, num_blocks, num_kv_heads,
        stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_tb,
        GROUP, D, DV, BLOCK_D, BLOCK_DV, PAGE, BLOCK_M, BLOCK_N, PEEL, LEFT, RIGHT, SOFTCAP, ALIBI,
        Q_DESCALE, K_DESCALE, V_DESCALE, ROPE, BLOCK_R, FOLD, PRECISE, PRECISION, BITS, Q_BITS, NORM, DTYPE, PAIRS,
        E5M2, ASM, ENTRIES, EACH,
    )  # fmt: skip
    if SINKS and (GROWS or not SPLIT):
        sink = tl.load(sinks + heads, mask=live & alone, other=float("-inf")).to(tl.float32) * LOG2E
        rescale, m, l = add_sink(m, l, sink)
        acc *= rescale[:, None]
    acc, total = finish(acc, m, l)
    columns_v = tl.arange(0, BLOCK_DV)
    inside = within(live, columns_v, DV, BLOCK_DV)
    if SPLIT:
        tl.store(part_ptr + part[:, None] * DV + columns_v[None, :], acc, mask=inside & (not alone))
        tl.store(part_lse + part, total, mask=live & (not alone))
    if GROWS or not SPLIT:
        at = (first + rows).to(tl.int64) * num_heads + heads
        value = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] * DV + columns_v[None, :], value, mask=inside & alone)
        if lse_ptr is not None:
            tl.store(lse_ptr + heads.to(tl.int64) * tokens + (first + rows), total * LN2, mask=live & alone)
