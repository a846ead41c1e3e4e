"""Put new keys and values into a paged cache, in the cache's dtype: one read and one write of each number.

Row t goes to slot ``slot_mapping[t]``, divided by the cache's factor and rounded to nearest even (the cache layout and
the slots of PagedAttention, arXiv 2309.06180); a slot that names no place is passed over. Memory is all that it costs.

Layouts: k, v (T, heads, D / Dv), caches (num_blocks, block_size, heads, D / Dv), any strides with the innermost 1.
Tiles: a program writes heads of one token, all their channels; no table.
"""

import triton
import triton.language as tl


@triton.jit
def fp8_bits(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Round fp32 to nearest even in e4m3 (3, 7, 448) or e5m2 (2, 15, 57344), saturate, and return the byte.

    By hand, because chips before sm_89 cannot, and those after go by way of float16 for e5m2. NaN is 0x7F.
    """
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    a = tl.minimum(tl.abs(x), LARGEST)
    bits = a.to(tl.int32, bitcast=True)
    DROPPED: tl.constexpr = 23 - MANTISSA
    rounded = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Added to 2^(24 - BIAS - MANTISSA), a number below the smallest normal one is rounded to the subnormal step.
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    subnormal = (a + MAGIC).to(tl.int32, bitcast=True) - (tl.zeros_like(a) + MAGIC).to(tl.int32, bitcast=True)
    byte = tl.where(a < 2.0 ** (1 - BIAS), subnormal, normal)
    return (tl.where(x != x, 0x7F, byte) | sign).to(tl.uint8)


@triton.jit
def _put(
    new, cache, scale, token, block, place, head, heads, stride_nt, stride_nh, stride_cb, stride_cs, stride_ch,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_H heads of one token; KIND: what `kv_write_launch` calls it."""
    columns = tl.arange(0, BLOCK)
    live = (head < heads)[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(new + token * stride_nt + head[:, None] * stride_nh + columns[None, :], mask=live, other=0.0)
    if KIND != "copy":
        x = x.to(tl.float32)
        if SCALE == 0:
            x = tl.div_rn(x, tl.zeros_like(x) + tl.load(scale))
        elif SCALE == 1:
            x = tl.div_rn(x, tl.zeros_like(x) + tl.load(scale + head, mask=head < heads, other=1.0)[:, None])
        if KIND == "e4m3":
            x = fp8_bits(x, 3, 7, 448.0)
        elif KIND == "e5m2":
            x = fp8_bits(x, 2, 15, 57344.0)
        elif KIND == "int8":
            x = tl.minimum(tl.maximum(x, -127.0), 127.0)
            # 1.5 * 2^23: its last place is 1, so the sum is rounded to nearest even, in two's complement.
            x = ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    at = block * stride_cb + place * stride_cs + head[:, None] * stride_ch + columns[None, :]
    tl.store(cache + at, x.to(cache.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_slots"])
def write_kv_rows(
    k_ptr, v_ptr, k_cache, v_cache, slot_mapping, k_scale, v_scale,
    num_slots, heads,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_kb, stride_ks, stride_kch, stride_vb, stride_vs, stride_vch,
    PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_H heads of one token to its slot, unless that is negative or past the cache."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if (slot < 0) | (slot >= num_slots):
        return
    block = slot // PAGE
    place = slot % PAGE
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    _put(
        k_ptr, k_cache, k_scale, token, block, place, head, heads, stride_kt, stride_kh, stride_kb, stride_ks,
        stride_kch, D, BLOCK_D, K_SCALE, KIND,
    )  # fmt: skip
    if v_ptr is not None:
        _put(
            v_ptr, v_cache, v_scale, token, block, place, head, heads, stride_vt, stride_vh, stride_vb, stride_vs,
            stride_vch, DV, BLOCK_DV, V_SCALE, KIND,
        )  # fmt: skip
