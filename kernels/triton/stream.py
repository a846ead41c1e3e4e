"""Decode over a paged cache by teams of programs: as many as the GPU keeps busy, each with equally many keys.

Decode is bound by memory, so a launch should last as long as its bytes take: no wave of programs that is not full, no
long sequence that others wait for. So a team's keys are a range of those of the whole batch (`teams.py`), and a program
walks through the sequences in it. It writes the result of a sequence that it has alone; what it has of others are
partial results, at most two, which the last of a sequence's programs joins (`join.py`; FlashDecoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html; equal shares of all work regardless of its shape: Stream-K,
https://arxiv.org/abs/2301.03598). Nothing of the batch or its lengths is compiled in.

Layouts: as in `paged`. Tiles: `tiles/paged.json` and `tiles/mla.json`, `m16`, `m32` and `m64`.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.join import join_sequence
from vllm_accel.kernels.triton.paged import attend_rows
from vllm_accel.kernels.triton.pages import add_sink, finish, first_token, keys_of, query_span, within, zero_rows
from vllm_accel.kernels.triton.scores import LN2, LOG2E, keys_of_rows
from vllm_accel.kernels.triton.teams import count_blocks, range_of_team


@triton.jit(
    do_not_specialize=[
        "left", "right", "tokens", "batch", "limit", "num_blocks", "teams", "per", "most", "tiles", "high_q",
        "tail", "stride_tb",
    ]
)  # fmt: skip
def stream_attention(
    q_ptr, k_ptr, v_ptr, cu_seqlens, block_table, seqused_k, out_ptr, lse_ptr, part_ptr,
    slopes, sinks, q_descale, k_descale, v_descale,
    scale, softcap,
    left, right, tokens, batch, num_blocks, limit, num_kv_heads, teams, per, most, tiles, high_q, tail,
    stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_tb,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    Q_DESCALE: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr,
    ROPE: tl.constexpr, BLOCK_R: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BITS: tl.constexpr, Q_BITS: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr,
    E5M2: tl.constexpr, ASM: tl.constexpr, ENTRIES: tl.constexpr, EACH: tl.constexpr,
    JOIN_S: tl.constexpr, JOIN_R: tl.constexpr,
):  # fmt: skip
    """Compute one tile of rows over a team's keys, for one key head; the heads of a token lie side by side in memory.

    Args, beside those of `paged.paged_attention`:
        part_ptr: fp32 (2 * teams, high_q, num_heads, DV) normalised sums, then as many rows of base-2 log-sum-exps. Row
            2 * t is of team t's first sequence, if it has the end of it; 2 * t + 1 of its last, if that goes on. Then
            int64 (teams, high_q, num_heads) counters (`join.arrive`). What it holds before does not matter.
        teams, per, most: see `teams.py`; `most` at most what a row of the table can name.
        tiles: of rows of a sequence, of which none that is computed has more than high_q tokens.
        tail: the rows past the last sequence are written too.
        UNIT: keys of a block, a multiple of BLOCK_N.
        JOIN_S, JOIN_R: of how many teams how many rows are joined at a time.
    """
    index = tl.program_id(0)
    kv_head = index % num_kv_heads
    worker = index // num_kv_heads
    tile = worker % tiles
    team = worker // tiles
    num_heads = num_kv_heads * GROUP
    share, start, stop, sequence, before = range_of_team(
        team, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, teams, per, most, high_q, PAGE, UNIT
    )
    SPAN: tl.constexpr = BLOCK_M // GROUP if BLOCK_M % GROUP == 0 else (BLOCK_M - 1) // GROUP + 2
    slots = teams.to(tl.int64) * high_q * num_heads
    part_lse = part_ptr + 2 * slots * DV
    counters = (part_lse + 2 * slots).to(tl.pointer_type(tl.int64), bitcast=True) + tile * num_kv_heads + kv_head
    place = team - start // share  # of the team that has block 0
    token, len_q = query_span(cu_seqlens, tl.minimum(sequence, batch), batch, tokens)
    block, len_k = keys_of(seqused_k, sequence, batch, limit, num_blocks, PAGE)
    while (sequence < batch) & (before < stop):
        # Of the next sequence, so that nothing waits for it then.
        next_token, next_q = query_span(cu_seqlens, sequence + 1, batch, tokens)
        next_block, next_k = keys_of(seqused_k, sequence + 1, batch, limit, num_blocks, PAGE)
        n = count_blocks(len_k, len_q, most, high_q, UNIT)
        begin = tl.maximum(start - before, 0)
        end = tl.minimum(stop - before, n)
        if (begin < end) & (tile * BLOCK_M < len_q * GROUP):
            whole = (begin == 0) & (end == n)
            goes_on = end < n
            low, inner, outer, high = keys_of_rows(
                tile * BLOCK_M // GROUP, len_q, len_k, left, right, SPAN, BLOCK_N, LEFT, RIGHT
            )
            # A length is never negative, but the compiler does not know: it would work all of this out before the loop,
            # and keep it in 50 registers that leave no room for a third program on the multiprocessor.
            r = tile * BLOCK_M + tl.arange(0, BLOCK_M) + (len_q < 0).to(tl.int32)
            rows = r // GROUP
            heads = kv_head * GROUP + r % GROUP
            columns = tl.arange(0, BLOCK_DV)
            live = rows < len_q
            # The counter of a sequence that has to be joined is that of the first team with blocks of it.
            owner, other = place + before // share, place + (before + n - 1) // share
            counter = counters + owner * (tiles * num_kv_heads)
            held = tl.load(counter, mask=not whole, other=0, volatile=True)
            # Of a window, which begins at any key, the last block takes what is left.
            begin = low + begin * UNIT
            end = tl.where(goes_on, tl.minimum(low + end * UNIT, high), high)
            acc, m, l = attend_rows(
                sequence, block, token, len_q, len_k, begin, inner, outer, end, rows, heads, kv_head, live,
                q_ptr, k_ptr, v_ptr, block_table, slopes, q_descale, k_descale, v_descale, scale, softcap,
                left, right, num_blocks, num_kv_heads,
                stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_tb,
                GROUP, D, DV, BLOCK_D, BLOCK_DV, PAGE, BLOCK_M, BLOCK_N, False, LEFT, RIGHT, SOFTCAP, ALIBI,
                Q_DESCALE, K_DESCALE, V_DESCALE, ROPE, BLOCK_R, FOLD, PRECISE, PRECISION, BITS, Q_BITS, NORM, DTYPE,
                PAIRS, E5M2, ASM, ENTRIES, EACH,
            )  # fmt: skip
            if SINKS:
                sink = tl.load(sinks + heads, mask=live & whole, other=float("-inf")).to(tl.float32) * LOG2E
                rescale, m, l = add_sink(m, l, sink)
                acc *= rescale[:, None]
            acc, total = finish(acc, m, l)
            inside = within(live, columns, DV, BLOCK_DV)
            if whole:
                at = (token + rows).to(tl.int64) * num_heads + heads
                tl.store(out_ptr + at[:, None] * DV + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
                if lse_ptr is not None:
                    tl.store(lse_ptr + heads.to(tl.int64) * tokens + (token + rows), total * LN2, mask=live)
            else:
                slot = 2 * team + goes_on.to(tl.int32)
                at = (slot.to(tl.int64) * high_q + rows) * num_heads + heads
                tl.store(part_ptr + at[:, None] * DV + columns[None, :], acc, mask=inside)
                tl.store(part_lse + at, total, mask=live)
                join_sequence(
                    owner, other, counter, held, part_ptr, part_lse, sinks, out_ptr, lse_ptr, token, len_q, tokens,
                    high_q, kv_head, num_heads, tile, GROUP, DV, BLOCK_DV, BLOCK_M, SINKS, JOIN_S, JOIN_R,
                )  # fmt: skip
        before += n
        sequence += 1
        token, len_q, block, len_k = next_token, next_q, next_block, next_k
    if tail > 0:
        past = first_token(cu_seqlens, batch, batch, tokens)
        zero_rows(out_ptr, lse_ptr, worker, teams * tiles, past, tokens, num_heads, kv_head, GROUP, DV, BLOCK_DV)
