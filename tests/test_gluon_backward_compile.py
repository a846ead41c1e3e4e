"""What the compiler makes of the Gluon backward kernels for sm_90: registers, shared memory, order of instructions.

Two things make them slow and nothing else would notice: ptxas may wait for each product at once (it does so without a
word when registers run short, or when a product is under way at the end of an iteration), and it likes to move waits
above the arithmetic that should run under the products.
"""

import functools
import re
from collections import Counter

import pytest
import torch

from crosscompile import assert_fits, compile_launch
from sass_loops import main_loops
from vllm_accel.kernels.gluon import backward_sm90_launch as launches


@functools.cache
def compiled(
    kind, head_dim, causal, head_dim_v=None, dtype=torch.bfloat16, tokens=300, heads=8, packed=False, variant=None
):
    """Compile a kernel over meta tensors."""
    head_dim_v = head_dim_v or head_dim
    lead = (tokens,) if packed else (2, tokens)
    variant = variant or launches.variant_of(head_dim, head_dim_v, packed=packed)

    def meta(heads, size):
        return torch.empty(*lead, heads, size, dtype=dtype, device="meta")

    q, k, v, dout = meta(heads, head_dim), meta(heads, head_dim), meta(heads, head_dim_v), meta(heads, head_dim_v)
    lse = torch.empty(*lead[:-1], heads, tokens, device="meta")
    cu = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
    given = {
        "softmax_scale": 0.1, "causal": causal, "variant": variant, "cu_seqlens_q": cu, "cu_seqlens_k": cu,
        "max_seqlen_q": tokens, "max_seqlen_k": tokens, "sm_count": 132,
    }  # fmt: skip
    if kind == "dkv":
        return compile_launch(launches.dkv_launch(q, k, v, dout, lse, lse, k, v, **given), "sm_90")
    return compile_launch(launches.dq_launch(q, k, v, dout, lse, lse, q, **given, after_dkv=True), "sm_90")


#: Spill instructions that are accepted: in all, and in a loop without masks. An H200 took the dK and dV kernel of D =
#: 128 with them in 388 us against 442 without them and without overlap (causal, 2 x 4096 tokens, 16 heads).
SPILLS = {("dkv", 128): (60, 10)}


def unmasked(loops):
    """Return the loops without masks: the shorter one of each consumer's two, or the only one."""
    return sorted(loops, key=len)[:2]


@pytest.mark.parametrize(
    ("kind", "head_dim", "causal"),
    [
        ("dkv", 64, True), ("dkv", 128, True), ("dq", 64, True), ("dq", 128, True),
        pytest.param("dkv", 64, False, marks=pytest.mark.slow), pytest.param("dkv", 128, False, marks=pytest.mark.slow),
        pytest.param("dq", 64, False, marks=pytest.mark.slow), pytest.param("dq", 128, False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_it_fits_and_the_arithmetic_runs_under_products(kind, head_dim, causal):
    kernel = compiled(kind, head_dim, causal)
    total, inner = SPILLS.get((kind, head_dim), (40, 0))  # the others are at a tile's beginning and end
    assert_fits(kernel, "sm_90", max_spills=total)
    assert kernel.registers * kernel.threads <= 65536
    # The dQ kernel may start when the last blocks of the other have, and ends after it.
    for opcode in ("UTMALDG", "USETMAXREG", "SYNCS", "PREEXIT" if kind == "dkv" else "ACQBULK"):
        assert kernel.instructions[opcode], opcode

    loops = main_loops(kernel.sass)
    masked = causal or kind == "dq"
    assert len(loops) == (4 if masked else 2), "one loop for each consumer, and one with a mask"
    variant = launches.VARIANTS[head_dim]
    paired, width = (variant.dkv_paired, variant.bm) if kind == "dkv" else (variant.dq_paired, variant.bn)
    #: Groups of products that may still run at each wait of an iteration, in order.
    waits = {
        ("dkv", False): [2, 1, 0], ("dkv", True): [2, 2, 3, 2, 1, 0], ("dq", False): [2, 1, 0],
        ("dq", True): [3, 2, 2, 1, 0],
    }[kind, paired]  # fmt: skip
    assert paired or kind == "dkv" or variant.dq_overlap
    if paired:
        width *= 2
    for loop in loops:
        names = [name.split(".")[0] for name, _ in loop]
        found = [int(operands.split()[-1], 16) for name, operands in loop if "DEPBAR" in name]
        assert found == waits, "each product is waited for at once, or waits have moved"
        assert names.count("MUFU") == width // 2  # 64 x width probabilities in 128 threads
        from_registers = [re.match(r"\s*R\d+, R\d+, gdesc", operands) for name, operands in loop if "HGMMA" in name]
        if paired:
            assert all(from_registers), "K and V, or Q and dO, are read from shared memory in every iteration"
        else:
            assert not all(from_registers)
        if loop in unmasked(loops):
            assert names.count("STL") + names.count("LDL") <= inner, "spills in the main loop"
            at = [i for i, (name, _) in enumerate(loop) if "DEPBAR" in name]

            def exponentials(first, second, at=at, names=names):
                return names[at[first] : at[second]].count("MUFU")

            if paired:  # those of a under the products of b, those of b under what is added for a
                assert exponentials(0, 2) == width // 4
                assert exponentials(2, 3) >= width // 8
            else:
                assert exponentials(0, 1) >= width // 4, "most exponentials come before the next wait"


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [("dkv", 128), ("dq", 64), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("dkv", 64), ("dq", 128)))],
)
def test_packed_calls_run_the_loop_of_dense_ones(kind, head_dim):
    """What zeroes rows past a sequence's end is the producer's, or stands before the loop."""
    total, inner = SPILLS.get((kind, head_dim), (40, 0))
    kernel = compiled(kind, head_dim, True, packed=True)
    assert_fits(kernel, "sm_90", max_spills=total + 40)
    dense = compiled(kind, head_dim, True, variant=launches.variant_of(head_dim, head_dim, packed=True))
    packed, dense = (unmasked(main_loops(k.sass)) for k in (kernel, dense))
    for loop, other in zip(packed, dense, strict=True):
        count, wanted = (Counter(name.split(".")[0] for name, _ in code) for code in (loop, other))
        assert count["STL"] + count["LDL"] <= inner
        assert all(count[name] == wanted[name] for name in ("HGMMA", "MUFU", "BAR", "SYNCS"))
        assert len(loop) <= 1.03 * len(other)


def test_other_head_sizes_ride_on_the_next_tile():
    for kind in ("dkv", "dq"):
        kernel = compiled(kind, 40, False, 48, torch.float16)
        assert_fits(kernel, "sm_90", max_spills=40)
        assert kernel.shared == compiled(kind, 64, False).shared


@pytest.mark.parametrize("kind", ["dkv", "dq"])
def test_every_variant_compiles_to_one_kernel_for_all_sizes(kind):
    """What the launcher relies on when it looks a kernel up without the sizes."""
    found = {compiled(kind, 64, False, tokens=n, heads=h).ttgir for n, h in ((300, 8), (256, 16), (1, 1))}
    assert len(found) == 1
