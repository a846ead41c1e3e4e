"""What the compiler makes of the Gluon kernel for sm_90: registers, shared memory, and the order of instructions.

The order is what makes it fast and what nothing else would notice: ptxas likes to move the wait for the second product
above the exponentials, and then nothing overlaps.
"""

import functools
import re

import pytest
import torch

from crosscompile import assert_fits, compile_launch
from sass_loops import main_loops
from vllm_accel.kernels.gluon import forward_sm90_launch as launches

#: Head size, causal, packed, variant: each path through the kernel at least once.
KERNELS = [
    (64, False, False, {}),
    (64, True, False, {}),
    pytest.param(64, True, True, {}, marks=pytest.mark.slow),
    (128, False, False, {}),
    pytest.param(128, True, False, {}, marks=pytest.mark.slow),
    (128, True, True, {}),
    pytest.param(128, True, False, {"pingpong": True, "persistent": True, "q_slots": 2}, marks=pytest.mark.slow),
    pytest.param(256, False, False, {}, marks=pytest.mark.slow),
    (256, True, True, {}),
    (128, True, False, {"splits": 3}),
    pytest.param(64, True, False, {"splits": 3}, marks=pytest.mark.slow),
    pytest.param(256, True, False, {"splits": 3}, marks=pytest.mark.slow),
]


@functools.cache
def compiled(head_dim, causal, packed, options=(), head_dim_v=None, dtype=torch.bfloat16):
    """Compile one variant over meta tensors."""
    head_dim_v = head_dim_v or head_dim
    lead = (300,) if packed else (2, 300)
    q, k, v, out = (
        torch.empty(*lead, heads, size, dtype=dtype, device="meta")
        for heads, size in ((8, head_dim), (2, head_dim), (2, head_dim_v), (8, head_dim_v))
    )
    lse = torch.empty(*lead[:-1], 8, 300, device="meta")
    options = dict(options)
    splits = options.pop("splits", 1)
    if splits > 1:
        out, lse = (torch.empty(splits, *t.shape, device="meta") for t in (out, lse))
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
    tile = launches.tile_dim(head_dim, head_dim_v)
    launch = launches.forward_launch(
        q, k, v, out, lse, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=300, max_seqlen_k=300,
        softmax_scale=0.1, causal=causal, head_dim_v=head_dim_v,
        variant=launches.VARIANTS[tile]._replace(**options), sm_count=132, splits=splits,
    )  # fmt: skip
    return compile_launch(launch, "sm_90")


@pytest.mark.parametrize(("head_dim", "causal", "packed", "options"), KERNELS)
def test_it_fits_and_the_softmax_runs_under_the_second_product(head_dim, causal, packed, options):
    kernel = compiled(head_dim, causal, packed, tuple(options.items()))
    # Spills, if any, are at a tile's beginning and end (checked below): a few words once in ten microseconds.
    assert_fits(kernel, "sm_90", max_spills=96 if options.get("persistent") else 48)
    assert kernel.registers * kernel.threads <= 65536
    for opcode in ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"):
        assert kernel.instructions[opcode], opcode

    loops = main_loops(kernel.sass)
    assert len(loops) == (4 if causal else 2), "one loop for each consumer, and one with a mask"
    if launches.VARIANTS[head_dim].held:
        products = [operands for loop in loops for name, operands in loop if "HGMMA" in name]
        assert all(re.match(r"\s*R\d+, R\d+, gdesc", operands) for operands in products), "Q is not in registers"
    bn = launches.VARIANTS[head_dim].bn
    for loop in loops:
        names = [name for name, _ in loop]
        # With Triton 3.7.1 the loop over the diagonal has a few at D = 256, packed; it runs twice in a tile.
        allowed = 8 if head_dim == 256 and packed and loop in sorted(loops, key=len)[2:] else 0
        assert sum(name.split(".")[0] in ("STL", "LDL") for name in names) <= allowed, "spills in the main loop"
        waits = {operands.split()[-1]: i for i, (name, operands) in enumerate(loop) if "DEPBAR" in name}
        assert set(waits) == {"0x1", "0x0"}, "S is waited for alone, then O"
        exponentials = [i for i, name in enumerate(names) if name.startswith("MUFU.EX2")]
        overlapped = [i for i in exponentials if waits["0x1"] < i < waits["0x0"]]
        # 64 x BN scores in 128 threads; two more for the rescaling of two rows.
        assert len(exponentials) == bn // 2 + 2
        assert overlapped == exponentials, f"{len(exponentials) - len(overlapped)} exponentials outside the overlap"


def test_without_overlap_each_product_is_waited_for():
    loops = main_loops(compiled(128, False, False, (("overlap", False),)).sass)
    assert loops
    for loop in loops:
        assert [operands.split()[-1] for name, operands in loop if "DEPBAR" in name] == ["0x0", "0x0"]


@pytest.mark.slow
def test_pingpong_takes_turns_at_named_barriers():
    kernel = compiled(128, True, False, tuple({"pingpong": True, "persistent": True, "q_slots": 2}.items()))
    for loop in main_loops(kernel.sass):
        barriers = [
            (name.split(".")[1], operands.split(",")[0].strip()) for name, operands in loop if name[:4] == "BAR."
        ]
        turns = [(kind, number) for kind, number in barriers if int(number, 16) >= 8]
        assert sorted(kind for kind, _ in turns) == ["ARV", "SYNC"], barriers
        assert {number for _, number in turns} == {"0x8", "0x9"}


def test_other_head_sizes_ride_on_the_next_tile():
    kernel = compiled(40, False, False, (), 48, torch.float16)
    assert_fits(kernel, "sm_90", max_spills=0)
    assert kernel.shared == compiled(64, False, False).shared


def test_every_variant_compiles_to_one_kernel_for_all_sizes():
    """What the launcher relies on when it looks a kernel up without the sizes."""
    ttgir = {compile_at(tokens, heads).ttgir for tokens, heads in ((300, 8), (256, 16), (1, 1))}
    assert len(ttgir) == 1


def compile_at(tokens, heads):
    q = torch.empty(1, tokens, heads, 64, dtype=torch.bfloat16, device="meta")
    launch = launches.forward_launch(
        q, q, q, q, torch.empty(1, heads, tokens, device="meta"), cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=tokens, max_seqlen_k=tokens, softmax_scale=1.0, causal=False, head_dim_v=64,
        variant=launches.VARIANTS[64], sm_count=132,
    )  # fmt: skip
    return compile_launch(launch, "sm_90")
