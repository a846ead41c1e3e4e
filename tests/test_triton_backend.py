"""The `triton` backend without a GPU: what it declares, the launches it describes, and the bound launch over a stub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_accel import State, attention, attention_varlen, explain
from vllm_accel.backends import triton as adapter
from vllm_accel.backends.triton import BACKEND, TritonAttention
from vllm_accel.backends.triton_decode import shares_keys
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.ops import run as ops_run

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_triton_tasks import FAR_CASES
from vllm_accel.kernels.triton import forward_launch, launch, tiles
from vllm_accel.kernels.triton.launch import Bound, Launch
from vllm_accel.kernels.triton.tiles import Tile

ABLE = (State.CHOSEN, State.ABLE, State.HELD_BACK)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _args(seqlen_q: int, seqlen_k: int, **given: Any) -> AttentionArgs:
    plain = AttentionArgs(*(None,) * 8, seqlen_q, seqlen_k, 0.125, False, (-1, -1), 0.0, 0.0, False, False, False)
    return plain._replace(**given)


# --- what it declares ------------------------------------------------------------------------------------------------


def test_it_runs_from_ampere_on_and_on_two_amd_generations() -> None:
    q = _meta(2, 512, 8, 128, dtype=torch.float16)
    able = {gpu for gpu in PRESETS if explain(attention, q, q, q, device=gpu)["triton"].state in ABLE}
    assert able == {
        "a100", "rtx3080", "rtx3090", "rtx4080", "rtx4090", "h100", "h200", "b200", "mi300x",
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window_size": (100, -1), "softcap": 5.0},
        {"window_size": (100, 0), "softcap": 5.0, "alibi_slopes": _meta(8, dtype=torch.float32)},
        {"attn_bias": _meta(1, 8, 512, 512)},
        {"attn_bias": _meta(2, 1, 1, 512, dtype=torch.bool), "dropout_p": 0.1},
        {"alibi_slopes": _meta(8, dtype=torch.float32), "sinks": _meta(8, dtype=torch.float32)},
        {"q_descale": _meta(dtype=torch.float32), "deterministic": True, "batch_invariant": True},
    ],
)
def test_it_takes_every_option(options: dict[str, Any]) -> None:
    q = _meta(2, 512, 8, 72)
    for gpu in ("a100", "rtx4090", "h200", "b200", "mi300x"):
        assert explain(attention, q, q, q, device=gpu, **options)["triton"].state in ABLE


def test_what_it_refuses_has_a_reason() -> None:
    def reasons(q: torch.Tensor, **options: Any) -> list[str]:
        return [r.code for r in explain(attention, q, q, q, device="h200", **options)["triton"].reasons]

    assert reasons(_meta(1, 8, 2, 320)) == ["head_dim"]
    assert reasons(_meta(1, 8, 2, 64, dtype=torch.float64)) == ["dtype"]
    assert reasons(_meta(1, 8, 2, 64), dropout_p=0.1, batch_invariant=True) == ["dropout_position"]
    assert reasons(_meta(2**22, 64, 128, 64), backend="triton") == ["grid"]


def test_unavailability_is_what_the_toolchain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_accel.kernels.triton import toolchain

    problem = toolchain.Problem("c_compiler", "no C compiler", "install gcc")
    monkeypatch.setattr(toolchain, "problems", lambda arch: (problem,))
    reason = BACKEND.unavailable_reason()
    assert reason is not None and (reason.code, reason.text) == ("c_compiler", "no C compiler")
    monkeypatch.setattr(toolchain, "problems", lambda arch: ())
    assert BACKEND.unavailable_reason() is None
    import triton

    assert BACKEND.version() == triton.__version__


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["a100", "rtx4090", "h200", "b200", "mi300x"])
@pytest.mark.parametrize("head_dim", [1, 16, 24, 33, 64, 80, 96, 128, 192, 256])
def test_every_kind_of_call_has_a_tile(gpu: str, head_dim: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for causal in (False, True):
            for heavy in (False, True):
                arch = PRESETS[gpu].arch
                tile = forward_launch.choose_tile(arch, dtype, head_dim, 64, causal=causal, heavy=heavy)
                assert isinstance(tile, tiles.Tile)


def test_a_tile_does_not_depend_on_lengths_or_batch() -> None:
    """So that batch_invariant holds; the features that choose another tile are properties of the call."""
    specs = [
        AttentionSpec(torch.bfloat16, torch.bfloat16, 8, 8, 128, 128, b, q, k, Relation.SHORTER, Feature.CAUSAL)
        for b, q, k in ((1, 1, 1), (512, 1, 8192), (1, 65536, 65536))
    ]
    assert len({BACKEND.bind(spec, PRESETS["h200"])._tile for spec in specs}) == 1


def test_few_kinds_of_call_read_by_tma() -> None:
    plain = AttentionSpec(
        torch.bfloat16, torch.bfloat16, 8, 8, 128, 128, 1, 64, 64, Relation.EQUAL, Feature.CAUSAL | Feature.SINKS
    )  # fmt: skip

    def by_tma(gpu: str, **changes: Any) -> bool:
        return BACKEND.bind(dataclasses.replace(plain, **changes), PRESETS[gpu])._by_tma

    assert all(by_tma("h200", head_dim=size, head_dim_v=size) for size in (64, 128, 256))
    for changes in (
        {"dtype": torch.float32}, {"head_dim": 32, "head_dim_v": 32}, {"head_dim_v": 64},
        {"features": Feature.WINDOW_LEFT}, {"features": Feature.Q_DESCALE}, {"features": Feature.VARLEN},
        {"features": Feature.BATCH_INVARIANT},
    ):  # fmt: skip
        assert not by_tma("h200", **changes), changes
    assert not by_tma("a100") and not by_tma("b200")


def test_only_calls_that_take_longer_than_the_host_are_read_by_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    # An H200: descriptors cost the host 14 us, so that a call of 11 us took 34 us instead of 19.
    seen: list[tuple[bool, Tile]] = []

    def note(*args: Any, **kwargs: Any) -> None:
        seen.append((args[9], args[7]))
        raise InterruptedError

    monkeypatch.setattr(forward_launch, "forward_launch", note)
    kernel = BACKEND.bind(
        AttentionSpec(torch.bfloat16, torch.bfloat16, 16, 16, 64, 64, 4, 64, 64, Relation.EQUAL, Feature(0)),
        PRESETS["h200"],
    )
    for length in (256, 4096):
        q = torch.empty(4, length, 16, 64, dtype=torch.bfloat16)
        with pytest.raises(InterruptedError):
            kernel.prepare(q, q, q, _args(length, length))(q, q, q, _args(length, length))
    (short, short_tile), (long, long_tile) = seen
    assert not short and long and short_tile == kernel._tile != long_tile == kernel._tma_tile


def test_few_causal_tiles_come_by_pointers() -> None:
    """Alone on a multiprocessor, 64 rows by TMA take longer than 128 by pointers: 173 us instead of 136."""

    def worth(heads: int, causal: bool = True, head_dim: int = 128, sm_count: int = 132) -> bool:
        q, k = torch.empty(1, 500, heads, head_dim, device="meta"), torch.empty(1, 8192, 1, head_dim, device="meta")
        return forward_launch.worth_tma(q, k, causal, 128, sm_count)

    assert [worth(heads) for heads in (14, 16, 33, 34, 64)] == [False, False, False, True, True]
    assert worth(33, causal=False) and worth(33, head_dim=256) and worth(33, sm_count=0) and not worth(14, sm_count=0)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.zeros(1, 64, 3, 4, 128, dtype=torch.bfloat16)[:, :, 0], True),  # packed q, k, v
        (lambda: torch.zeros(1, 64, 4, 132, dtype=torch.bfloat16)[..., :128], False),  # heads 264 bytes apart
        (lambda: torch.zeros(1, 1, 4, 128, dtype=torch.bfloat16).expand(1, 64, 4, 128), False),
        (lambda: torch.zeros(1, 1, 4, 128, dtype=torch.bfloat16)[:, :, :1], True),
        (lambda: torch.zeros(1, 0, 4, 128, dtype=torch.bfloat16), False),
    ],
)
def test_what_descriptors_can_read(make: Callable[[], torch.Tensor], expected: bool) -> None:
    assert forward_launch.describable(make()) is expected


# --- launches --------------------------------------------------------------------------------------------------------

TILE = tiles.Tile(64, 32, 4, 2)


def test_the_launch_of_a_dense_call() -> None:
    q, k = _meta(3, 130, 8, 64), _meta(3, 500, 2, 64)
    lse = _meta(3, 8, 130, dtype=torch.float32)
    made = forward_launch.forward_launch(q, k, k, q, lse, None, _args(130, 500, causal=True, window_size=(7, 9)), TILE)
    assert made.grid == (3 * 3 * 8, 1, 1)
    names = made.fn.arg_names
    given = dict(zip(names, launch.arguments(made), strict=False)) | made.constexprs
    assert list(given) == names
    assert (given["left"], given["right"], given["LEFT"], given["RIGHT"]) == (7, 0, True, True)
    assert (given["q_stride_b"], given["k_stride_t"], given["v_stride_h"]) == (130 * 8 * 64, 2 * 64, 64)
    assert (given["seqlen_q"], given["seqlen_k"], given["num_heads"], given["num_kv_heads"]) == (130, 500, 8, 2)
    assert given["FOLD"] and not given["VARLEN"] and not given["WIDE"]


def test_a_packed_launch_has_one_sequence_more_for_the_rows_past_the_last() -> None:
    q, cu = _meta(1000, 8, 64), _meta(5, dtype=torch.int32)
    args = _args(300, 300, cu_seqlens_q=cu, cu_seqlens_k=cu)
    made = forward_launch.forward_launch(q, q, q, q, None, None, args, TILE)
    assert made.grid == (5 * 8 * (4 + 1), 1, 1)


def test_a_bias_is_never_expanded() -> None:
    q = _meta(2, 64, 4, 64)
    for shape, strides in {
        (1, 1, 1, 1): (0,) * 4,
        (2, 1, 1, 64): (64, 0, 0, 1),
        (1, 4, 64, 64): (0, 4096, 64, 1),
    }.items():
        made = forward_launch.forward_launch(q, q, q, q, None, None, _args(64, 64, attn_bias=_meta(*shape)), TILE)
        given = dict(zip(made.fn.arg_names, launch.arguments(made), strict=False))
        assert tuple(given[f"bias_stride_{d}"] for d in "bhqk") == strides


def test_offsets_are_wide_where_a_tile_could_pass_two_to_the_31() -> None:
    near, far = (
        torch.empty(2, 8, 1, 64, device="meta").as_strided((2, 8, 1, 64), (1, n, 1, 1)) for n in (2**24, 2**26)
    )
    for tensor, wide in ((near, False), (far, True)):
        for q, k, v in ((tensor, near, near), (near, tensor, near), (near, near, tensor)):
            made = forward_launch.forward_launch(q, k, v, q, None, None, _args(8, 8), TILE)
            assert made.constexprs["WIDE"] is wide
    q = _meta(1, 2**16, 1, 64)
    for keys, wide in ((2**14, False), (2**15, True)):
        args = _args(2**16, keys, attn_bias=_meta(1, 1, 2**16, keys))
        assert forward_launch.forward_launch(q, q, q, q, None, None, args, TILE).constexprs["WIDE"] is wide


def test_fp32_products_follow_torchs_switch_at_the_time_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Recorder:
        def __init__(self, made_of: tuple[Tile, Callable[[Tile], Launch]]) -> None:
            self.precision = made_of[1](made_of[0]).constexprs["PRECISION"]

        def __call__(self, tensors: Any, values: Any) -> None:
            ran.append(self.precision)

    def kernel(dtype: torch.dtype, gpu: str) -> TritonAttention:
        bound = BACKEND.bind(
            AttentionSpec(dtype, dtype, 1, 1, 64, 64, 1, 8, 8, Relation.EQUAL, Feature(0)), PRESETS[gpu]
        )  # fmt: skip
        bound._bound = Recorder
        return bound

    q = torch.randn(1, 8, 1, 64)
    forward = kernel(torch.float32, "h200").prepare(q, q, q, _args(8, 8))
    for allowed in (False, True, False):
        monkeypatch.setattr(adapter, "tf32_allowed", lambda allowed=allowed: allowed)
        forward(q, q, q, _args(8, 8))
    monkeypatch.setattr(adapter, "tf32_allowed", lambda: True)
    kernel(torch.float32, "mi300x").forward(q, q, q, _args(8, 8))
    half = q.half()
    kernel(torch.float16, "h200").forward(half, half, half, _args(8, 8))
    assert ran == ["ieee", "tf32", "ieee", "ieee", "ieee"]


# --- bound launches --------------------------------------------------------------------------------------------------


class Stub:
    """A compiled kernel whose launcher writes down what it gets, and the function under jit that returns it."""

    def __init__(self, names: list[str]) -> None:
        self.arg_names, self.direct, self.ordinary = names, [], []
        self.function, self.packed_metadata = 1234, (4, 1, 0)

    def __getitem__(self, grid: Any) -> Any:
        def launched(*args: Any, **kwargs: Any) -> Stub:
            self.ordinary.append((grid, args, kwargs))
            return self

        return launched

    def run(self, *args: Any) -> None:
        self.direct.append(args)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr(launch, "_goes_direct", lambda fn, device: True)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 77))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    return Stub(["x", "none", "y", "scale", "n", "m", "BLOCK", "FLAG"])


def _launch(fn: Any, x: torch.Tensor, y: torch.Tensor, n: int = 48, m: int = 3, block: int = 64) -> Launch:
    return Launch(fn, (5, 2, 1), (x, None, y, 0.5, n, m), {"FLAG": True, "BLOCK": block}, 4, 2, 0)


def test_a_bound_launch_goes_straight_to_the_compiled_kernel_from_the_second_call_on(stub: Stub) -> None:
    x, y, z = (torch.zeros(8) for _ in range(3))
    bound = Bound(_launch(stub, x, y))
    bound((x, None, y), (0.5,))
    assert len(stub.ordinary) == 1 and not stub.direct
    assert stub.ordinary[0] == (
        (5, 2, 1), (x, None, y, 0.5, 48, 3), {"FLAG": True, "BLOCK": 64, "num_warps": 4, "num_stages": 2}
    )  # fmt: skip
    bound((z, None, y), (0.25,))
    assert len(stub.ordinary) == 1
    assert stub.direct == [
        (5, 2, 1, 77, 1234, (4, 1, 0), None, None, None, z.data_ptr(), None, y.data_ptr(), 0.25, 48, 3, 64, True)
    ]


def test_descriptors_come_before_the_arguments(stub: Stub) -> None:
    """Made of the tensors of the call, and checked in the first one only; a launch without them passes None."""
    stub.arg_names = ["x_tiles", *stub.arg_names]
    x, y = torch.zeros(4, 16), torch.zeros(4, 16)
    how = ([4, 16], [16, 1], [2, 16])
    bound = Bound(_launch(stub, x, x)._replace(described=(how,)))
    for t in (x, y):
        bound((t, None, x), (0.5,))
    first = stub.ordinary[0][1]
    assert (first[0].base is x, first[0].shape, first[0].block_shape) == (True, [4, 16], [2, 16]) and first[1] is x
    lead, *rest = stub.direct[0][9:]
    assert lead.base is y and (lead.shape, lead.strides, lead.padding) == ([4, 16], [16, 1], "zero")
    assert rest == [y.data_ptr(), None, x.data_ptr(), 0.5, 48, 3, 64, True]
    bound = Bound(_launch(stub, x, x, block=32)._replace(described=(None,)))
    for _ in range(2):
        bound((x, None, x), (0.5,))
    assert stub.ordinary[1][1][:2] == (None, x) and stub.direct[1][9:11] == (None, x.data_ptr())


def test_plans_of_one_kind_share_what_was_compiled_and_others_do_not(stub: Stub) -> None:
    x = torch.zeros(8)
    Bound(_launch(stub, x, x))((x, None, x), (0.5,))
    Bound(_launch(stub, x, x, n=96, m=5))((x, None, x), (0.5,))  # other integers of the same kind
    assert (len(stub.ordinary), len(stub.direct)) == (1, 1)
    half = x.half()
    others = [
        _launch(stub, x, x, n=47), _launch(stub, x, x, m=1), _launch(stub, x, x, m=16), _launch(stub, x, x, n=2**33),
        _launch(stub, x, x, block=32), _launch(stub, half, x), _launch(stub, x, x)._replace(num_warps=8),
        _launch(stub, x, x)._replace(maxnreg=128),
        _launch(Stub(stub.arg_names), x, x),
    ]  # fmt: skip
    for made in others:
        Bound(made)((made.args[0], None, x), (0.5,))
    assert len(stub.ordinary) + len(others[-1].fn.ordinary) == 1 + len(others)


def test_a_misaligned_pointer_has_a_kernel_of_its_own(stub: Stub) -> None:
    x = torch.zeros(64)
    bound = Bound(_launch(stub, x, x))
    for tensors in ((x, None, x), (x[1:], None, x), (x, None, x[1:]), (x[4:], None, x), (x[3:], None, x)):
        bound(tensors, (0.5,))
    # Aligned; x off; y off. 16 bytes on is aligned again, another odd place is misaligned again.
    assert (len(stub.ordinary), len(stub.direct)) == (3, 2)


def test_a_tile_that_does_not_fit_the_device_makes_way_for_a_smaller_one(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.zeros(8)
    stub.__name__ = "toy"
    monkeypatch.setattr(launch, "_too_large", set())

    def make(tile: Tile) -> Launch:
        constexprs = {"FLAG": True, "BLOCK": tile.block_n}
        grid = (128 // tile.block_m, 1, 1)
        return Launch(stub, grid, (x, None, x, 0.5, 48, 3), constexprs, tile.num_warps, tile.num_stages)

    tried: list[tuple[int, int]] = []

    def run(made: Launch) -> Any:
        tried.append((made.constexprs["BLOCK"], made.num_stages))
        if made.constexprs["BLOCK"] > 32:
            raise OutOfResources(120000, 101376, "shared memory")
        return made.fn[made.grid](*made.args, **made.constexprs)

    monkeypatch.setattr(launch, "run", run)
    with caplog.at_level("INFO", "vllm_accel"):
        bound = Bound(made_of=(Tile(64, 64, 4, 3), make))
        bound((x, None, x), (0.5,))
    assert tried == [(64, 3), (64, 2), (64, 1), (32, 1)]
    assert stub.ordinary == [((2, 1, 1), (x, None, x, 0.5, 48, 3), {"FLAG": True, "BLOCK": 32})]
    assert "Required: 120000, Hardware limit: 101376" in caplog.text
    bound((x, None, x), (0.5,))
    again = Bound(made_of=(Tile(64, 64, 4, 3), make))  # another plan of the kind does not try what did not fit
    again((x, None, x), (0.25,))
    assert len(tried) == 4 and [args[-3:] for args in stub.direct] == [(3, 32, True)] * 2
    monkeypatch.setattr(launch, "run", lambda made: (_ for _ in ()).throw(OutOfResources(1, 0, "shared memory")))
    with pytest.raises(OutOfResources):
        Bound(made_of=(Tile(16, 16, 4, 1), make))((x, None, x), (0.5,))


def test_a_profiler_hears_of_every_launch(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8)
    bound = Bound(_launch(stub, x, x))
    bound((x, None, x), (0.5,))
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            chain = type(getattr(launch.knobs.runtime, name))()
            chain.add(lambda metadata: None)
            patch.setattr(launch.knobs.runtime, name, chain)
            bound((x, None, x), (0.5,))
    assert (len(stub.ordinary), len(stub.direct)) == (3, 0)
    bound((x, None, x), (0.5,))
    assert (len(stub.ordinary), len(stub.direct)) == (3, 1)


def test_the_launcher_is_known_for_the_installed_release() -> None:
    """Argument order of `CompiledKernel.run`: a release that changes it must not be launched directly."""
    import inspect

    from triton.compiler.compiler import CompiledKernel

    assert launch._DIRECT is launch.triton.__version__.startswith(("3.6.", "3.7."))
    if launch._DIRECT:
        source = inspect.getsource(CompiledKernel.__getitem__)
        assert (
            "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata" in source
        )


# --- plans -----------------------------------------------------------------------------------------------------------


class Prepared:
    """A kernel with `prepare`, which tells what it was prepared for."""

    def __init__(self) -> None:
        self.prepared: list[tuple[int, ...]] = []

    def forward(self, q, k, v, args):
        return torch.full_like(q, -1.0), None, None

    def prepare(self, q, k, v, args):
        self.prepared.append((q.shape[1], k.shape[1], args.max_seqlen_k))
        lengths = k.shape[1]
        return lambda q, k, v, args: (torch.full_like(q, float(lengths)), None, None)


def test_a_plan_prepares_for_its_sizes_and_again_for_stretched_ones() -> None:
    kernel = Prepared()
    q, k = torch.zeros(1, 1, 2, 16), torch.zeros(1, 100, 2, 16)
    forward = ops_run._forward_of(kernel, False, q, k, k, _args(1, 100))
    assert float(forward(q, k, k, None)[0].mean()) == 100.0
    copied = ops_run._forward_of(kernel, True, q, k, k, _args(1, 100))
    assert float(copied(q, k, k, None)[0].mean()) == -1.0  # other strides than those that will arrive


def test_a_growing_decode_prepares_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_accel import register_backend
    from vllm_accel.dispatch import registry

    kernel = Prepared()
    toy = SimpleNamespace(
        name="prepared_toy", capability=dataclasses.replace(BACKEND.capability, platforms=frozenset({"cpu"})),
        version=lambda: "1", unavailable_reason=lambda: None, bind=lambda spec, device: kernel,
    )  # fmt: skip
    register_backend("attention", toy)  # type: ignore[arg-type]
    try:
        q = torch.zeros(1, 1, 2, 16)
        for length in (100, 101, 102, 101):
            k = torch.zeros(1, length, 2, 16)
            out = attention(q, k, k, backend="prepared_toy")
            assert float(out.mean()) == float(length)
        assert kernel.prepared == [(1, 100, 100), (1, 101, 101), (1, 102, 102)]
    finally:
        registry.unregister_backend("attention", "prepared_toy")


def test_it_is_explained_for_packed_calls_too() -> None:
    q, cu = _meta(1000, 8, 64), _meta(5, dtype=torch.int32)
    selection = explain(
        attention_varlen, q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=300, max_seqlen_k=300,
        sinks=_meta(8), device="a100", backend="triton",
    )  # fmt: skip
    assert selection.chosen == "triton"


@pytest.mark.parametrize("case", [case for case in FAR_CASES if not case.lengths], ids=lambda case: case.name)
def test_the_far_cases_are_read_by_tma_or_share_their_keys(case: Any) -> None:
    q = torch.empty(case.batch, case.seqlen_q, case.num_heads, case.head_dim, device="meta")
    k = torch.empty(case.batch, case.seqlen_k, case.num_kv_heads, case.head_dim, device="meta")
    sizes = (case.num_heads, case.num_kv_heads, case.head_dim, case.head_dim, case.batch, case.seqlen_q, case.seqlen_k)
    spec = AttentionSpec(torch.bfloat16, torch.bfloat16, *sizes, Relation.SHORTER, Feature(0))
    args = AttentionArgs(
        *(None,) * 8, case.seqlen_q, case.seqlen_k, 0.25, True, (-1, -1), 0.0, 0.0, True, False, False
    )  # fmt: skip
    shared = shares_keys(spec, q, k, k, args, 132)
    assert shared == ("chunk" in case.name)
    assert shared or forward_launch.work_of(q, q, bool(case.options.get("causal"))) >= forward_launch.TMA_WORK


@pytest.mark.parametrize("metadata", [True, False], ids=["TMA", "pointers"])
def test_the_launcher_reads_the_same_of_our_descriptors_as_of_tritons(
    metadata: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton 3.7 reads one attribute more than 3.6: every second call of a plan would have failed there.
    from triton.backends.nvidia import driver

    class Utils:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: (name, args)

    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=SimpleNamespace(utils=Utils())))
    q = torch.zeros(2, 40, 4, 64, dtype=torch.bfloat16)
    shape, strides, tile = forward_launch._described(q, 16)
    given = {
        "swizzle": 3, "elem_size": 2, "elem_type": next(iter(driver.TMA_DTYPE_DEVICE_TO_HOST)), "block_size": tile,
        "fp4_padded": False,
    } if metadata else None  # fmt: skip
    theirs = driver.make_tensordesc_arg(launch.TensorDescriptor(q, shape, strides, tile), given)
    ours = driver.make_tensordesc_arg(tuple.__new__(launch.Encoded, (q, shape, strides, "zero", False)), given)
    assert [str(x) for x in ours] == [str(x) for x in theirs]
