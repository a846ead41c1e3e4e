"""Measured tables: what is read, what is near, what is interpolated, and how automatic choice follows."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tables import CPU, Toy, choice, row, spec_of, table, write
from vllm_accel import State, register_backend, reload_settings
from vllm_accel.dispatch import cost, estimate, measured, quarantine, registry
from vllm_accel.dispatch import settings as settings_module
from vllm_accel.dispatch.cost import Fit, fitted, middle, work_of
from vllm_accel.dispatch.device import detect, preset
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature
from vllm_accel.dispatch.spec_json import spec_from_json, spec_to_json
from vllm_accel.dispatch.table_file import Row, Table, Timing, dump, merged, parse, update


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_ACCEL_TABLES", str(tmp_path / "tables"))
    monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped")
    reload_settings()
    yield
    monkeypatch.undo()
    settings_module._current = None
    measured.forget()
    quarantine.release()


@pytest.fixture
def toys() -> Iterator[dict[str, Toy]]:
    """Register `first`, `second` and `third`, in this order before all others."""
    made = {name: Toy(name) for name in ("third", "second", "first")}
    before = registry.ordered("attention", ("cpu", "sdpa_cpu", "reference"))[0]
    for name, backend in made.items():
        register_backend("attention", backend, before=before)
        before = name
    yield made
    for name in made:
        registry.unregister_backend("attention", name)


def test_the_fastest_by_the_table_is_chosen_and_explained(toys: dict[str, Toy]) -> None:
    assert choice().chosen == "first" and "nothing measured" in choice().decided_by
    path = write(table(row(spec_of(), first=3e-4, second=1e-4, third=2e-4)))
    found = choice()
    assert found.chosen == "second" and path.name in found.decided_by
    assert [c.name for c in found.candidates][:3] == ["second", "third", "first"]
    assert found["first"].state is State.ABLE and found["second"].estimate is not None
    assert "100 us measured" in str(found) and "300 us measured" in str(found)
    told = found.as_dict()["candidates"][0]["estimate"]
    assert told == {"seconds": 1e-4, "noise": 0.01, "rests_on": "measured", "rows": 1}


def test_a_call_runs_what_explain_names(toys: dict[str, Toy]) -> None:
    write(table(row(spec_of(), first=3e-4, second=1e-4, third=2e-4)))
    q = torch.randn(1, 64, 4, 16)
    from vllm_accel import attention

    attention(q, q, q)
    assert [toys[name].runs for name in ("first", "second", "third")] == [0, 1, 0]


@pytest.mark.parametrize(("gain", "noise", "chosen"), [
    (0.02, 0.0, "first"),  # below 3 % nothing is worth leaving the order for
    (0.10, 0.01, "second"),
    (0.10, 0.08, "first"),  # within the noise of the two
    (0.20, 0.30, "second"),  # beyond 15 % it counts, however noisy
])  # fmt: skip
def test_the_shipped_order_yields_only_to_a_gain_beyond_the_noise(
    toys: dict[str, Toy], gain: float, noise: float, chosen: str
) -> None:
    write(table(row(spec_of(), noise, first=1e-4 * (1 + gain), second=1e-4)))
    assert choice().chosen == chosen


def test_a_row_speaks_for_one_octave_and_no_further(toys: dict[str, Toy]) -> None:
    write(table(row(spec_of(256), first=2e-4, second=1e-4)))
    for length, chosen in ((128, "second"), (512, "second"), (96, "first"), (640, "first")):
        found = choice(length)
        assert found.chosen == chosen, length
        assert (found["second"].estimate is not None) == (chosen == "second")
    assert choice(256, batch=2).chosen == "second" and choice(256, batch=3).chosen == "first"
    assert choice(256, heads=8).chosen == choice(256, causal=True).chosen == "first"  # GQA, a mask: other kinds


def test_options_without_a_cost_share_rows(toys: dict[str, Toy]) -> None:
    write(table(row(spec_of(256), first=2e-4, second=1e-4)))
    assert choice(256, return_lse=True, softmax_scale=0.3).chosen == "second"
    assert choice(256, softcap=20.0).chosen == "first"
    write(table(row(spec_of(1, 256, causal=True), first=2e-4, second=1e-4)))
    assert choice(1, 256).chosen == "second"  # one query: causal or not is one kind of work
    assert choice(4, 256).chosen == choice(2, 256, causal=True).chosen == "first"


def test_between_rows_the_nearer_one_counts_more(toys: dict[str, Toy]) -> None:
    rows = (row(spec_of(128), first=1e-4, second=3e-4), row(spec_of(512), first=9e-4, second=3e-4))
    write(table(*rows))
    assert choice(160).chosen == "first" and choice(448).chosen == "second"
    at = choice(448)["second"].estimate
    assert at is not None and not at.exact and at.rows == 1 and "interpolated from 1 row" in str(at)
    assert choice(256)["first"].estimate.rows == 2


def test_interpolation_follows_work_that_grows_by_the_square() -> None:
    fit = Fit(2e-5, 1e-11, 0.0)
    specs = [spec_of(n) for n in (128, 512)]
    # A backend at 1.5 times its model everywhere: so it should be in between.
    rows = [row(spec, toy=1.5 * fit.seconds(middle(spec))) for spec in specs]
    # A kind is expected in the middle of its lengths: 256 to 319.
    wanted = replace(spec_of(256), seqlen_q=286, seqlen_k=286)
    assert middle(spec_of(256)) == wanted
    found = estimate.estimates(spec_of(256), rows, {"toy": fit}, cost.CPU)["toy"]
    assert found.seconds == pytest.approx(1.5 * fit.seconds(wanted), rel=1e-9) and found.rows == 2
    # Without a model of its own, that of the device.
    flat = estimate.estimates(spec_of(256), rows, {}, Fit(1.0, 0.0, 0.0))["toy"]
    assert flat.seconds == pytest.approx(math.sqrt(rows[0].times["toy"].seconds * rows[1].times["toy"].seconds))


def test_device_and_host_are_interpolated_apart_and_the_longer_one_counts() -> None:
    fit = Fit(0.0, 1e-11, 0.0)
    specs = [spec_of(n) for n in (128, 512)]
    device = [fit.seconds(spec) for spec in specs]
    at = fit.seconds(spec_of(256))
    for host, expected in ((3 * at, 3 * at), (at / 3, at)):
        times = [Timing(max(d, host), 0.01, cold=d, host=host) for d in device]
        rows = [Row("attention", spec, {"toy": t}) for spec, t in zip(specs, times, strict=True)]
        found = estimate.estimates(spec_of(256), rows, {"toy": fit}, cost.CPU)["toy"]
        assert found.seconds == pytest.approx(expected, rel=1e-9)
    # Rows without the two halves: the whole time is scaled.
    rows = [Row("attention", spec, {"toy": Timing(2 * d, 0.01)}) for spec, d in zip(specs, device, strict=True)]
    assert estimate.estimates(spec_of(256), rows, {"toy": fit}, cost.CPU)["toy"].seconds == pytest.approx(2 * at)


def test_the_model_is_recovered_from_times_that_obey_it() -> None:
    true = Fit(3e-5, 2e-11, 4e-10)
    specs = [spec_of(q, k, batch=b) for q, k in ((32, 32), (64, 512), (512, 512), (16, 4096)) for b in (1, 8)]
    found = fitted([(spec, true.seconds(spec)) for spec in specs])
    assert found is not None
    assert (found.fixed, found.per_operation, found.per_byte) == pytest.approx(
        (true.fixed, true.per_operation, true.per_byte), rel=1e-4
    )
    assert fitted([(spec, 1e-4) for spec in specs[:4]]) is None  # too few
    free = fitted([(spec, 1e-4) for spec in specs])
    assert free is not None and free.seconds(spec_of(512, 512)) == pytest.approx(free.fixed) == pytest.approx(1e-4)
    # Times that fall as the work grows: no coefficient may be negative.
    falling = fitted([(spec, 1e-3 / math.sqrt(work_of(spec)[0])) for spec in specs])
    assert falling is not None and min(falling.fixed, falling.per_operation, falling.per_byte) >= 0.0


@pytest.mark.parametrize(("n", "below", "above"), [
    (1, 1, 1), (7, 7, 7), (8, 8, 8), (10, 9, 10), (2048, 1916, 2289), (4096, 3832, 4579), (5120, 4580, 5608),
])  # fmt: skip
def test_the_middle_of_a_kind(n: int, below: int, above: int) -> None:
    """Lengths are named by the lower end of their quarter octave, over a paged cache by the upper one."""
    dense = spec_of(n, n, batch=n)
    assert middle(dense) == replace(dense, batch=above, seqlen_q=above, seqlen_k=above)
    paged = replace(dense, block_size=16)
    assert middle(paged) == replace(paged, batch=above, seqlen_q=below, seqlen_k=below)
    product = GemmSpec(Form.DENSE, torch.bfloat16, torch.bfloat16, torch.bfloat16, 64, 128, 256, 0, Feature(0))
    assert middle(product) is product


def test_a_time_is_moved_from_where_it_was_taken_to_the_middle_of_the_kind() -> None:
    """The device's part only: what the host takes does not grow with the lengths."""
    fit, spec = Fit(0.0, 1e-11, 0.0), spec_of(2048)

    def at(n: int, **more: Any) -> Timing:
        device = fit.seconds(replace(spec, seqlen_q=n, seqlen_k=n))
        return Timing(max(device, more.get("host", 0.0)), 0.01, at=(1, n, n), cold=device if more else None, **more)

    expected = fit.seconds(middle(spec))
    for timing, wanted in (
        (at(2048), expected), (at(2500), expected), (at(2048, host=1e-6), expected), (at(2048, host=1.0), 1.0),
    ):  # fmt: skip
        found = estimate.estimates(spec, [Row("attention", spec, {"toy": timing})], {"toy": fit}, cost.CPU)["toy"]
        assert found.exact and found.seconds == pytest.approx(wanted, rel=1e-9)
    unknown = estimate.estimates(spec, [row(spec, toy=3e-4)], {"toy": fit}, cost.CPU)["toy"]
    assert unknown.seconds == pytest.approx(3e-4, rel=1e-9)


def test_tiles_that_just_exceed_the_multiprocessors_are_expected_to_take_twice_as_long() -> None:
    def chunk(heads: int, queries: int, keys: int = 8192) -> Any:
        return replace(spec_of(1, keys), num_heads=heads, num_kv_heads=heads, seqlen_q=queries)

    assert [work_of(chunk(heads, 128), 132)[2] / work_of(chunk(1, 128), 132)[2] for heads in (132, 133, 265)] == [
        1,
        2,
        3,
    ]
    assert work_of(chunk(8, 129), 132)[2] == work_of(chunk(8, 256), 132)[2] == work_of(chunk(16, 128), 132)[2]
    # Of a triangle short tiles fill the gaps of long ones.
    square = replace(spec_of(1024, causal=True), num_heads=40, num_kv_heads=40)
    assert work_of(square, 132)[2] == pytest.approx(work_of(square)[0] / 132)
    one = spec_of(1024, causal=True)
    assert work_of(one, 132)[2] == 2 * 128 * 1024 * 32 > work_of(one)[0] / 132
    # A kernel that goes by waves is told from one that shares out its keys.
    calls = [chunk(h, q, k) for h in (4, 20, 40) for q in (128, 512, 1024) for k in (2048, 8192)]
    for true in (Fit(1e-5, 0.0, 0.0, 2e-13, 132), Fit(1e-5, 3e-15, 0.0, 0.0, 132)):
        found = fitted([(call, true.seconds(call)) for call in calls], 132)
        assert found is not None and found.places == 132
        assert (found.fixed, found.per_operation, found.per_longest) == pytest.approx(
            (true.fixed, true.per_operation, true.per_longest), rel=1e-4, abs=1e-20
        )


def test_rates_of_one_head_size_are_fitted_apart_where_enough_of_it_was_measured() -> None:
    """There is a kernel for each head size, and at 64 the exponentials set the pace."""
    fast, slow = Fit(1e-5, 1e-12, 0.0), Fit(1e-5, 4e-12, 0.0)
    wide = [spec_of(n) for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192)]
    narrow = [replace(spec, head_dim=8, head_dim_v=8) for spec in wide]
    rows = [row(s, x=fit.seconds(middle(s))) for fit, specs in ((fast, wide), (slow, narrow)) for s in specs]

    def per_operation(rows: list[Row], spec: Any) -> float:
        found = measured.Source.made(Path("x"), table(*rows)).fit("attention", "x", spec, detect(CPU))
        assert found is not None
        return found.per_operation * 1e12

    assert [per_operation(rows, s[0]) for s in (wide, narrow)] == pytest.approx([1, 4], rel=1e-3)
    few = rows[:12]  # four of the narrow ones: they take what all say
    assert per_operation(few, wide[0]) == pytest.approx(1, rel=1e-3) and per_operation(few, narrow[0]) > 1.02
    assert per_operation(few, narrow[0]) == per_operation(few, replace(wide[0], head_dim=32))


def test_far_from_every_row_the_model_is_shown_and_not_used(toys: dict[str, Toy]) -> None:
    true = Fit(3e-5, 2e-11, 0.0)
    known = [(s, true.seconds(middle(s))) for s in map(spec_of, (16, 32, 64, 128, 256))]
    rows = [row(s, first=2 * seconds, second=seconds) for s, seconds in known]
    write(table(*rows))
    assert choice(256).chosen == "second"
    found = choice(4096)
    assert found.chosen == "first" and "nothing measured near" in found.decided_by
    assert found["second"].estimate.seconds == pytest.approx(true.seconds(middle(spec_of(4096))), rel=1e-3)
    assert "by the model" in str(found) and found.as_dict()["candidates"][0]["estimate"]["rests_on"] == "by the model"


def test_rows_of_another_version_do_not_count(toys: dict[str, Toy]) -> None:
    write(table(row(spec_of(), first=3e-4, second=1e-4)))
    assert choice().chosen == "second"
    toys["second"].release = "1.1"
    measured.forget()
    found = choice()
    assert found.chosen == "first" and found["second"].estimate is None and found["first"].estimate is not None


@pytest.mark.parametrize("other", ["2.1.0", "99.0"])
def test_tables_of_another_torch_do_not_count(toys: dict[str, Toy], other: str) -> None:
    write(table(row(spec_of(), first=3e-4, second=1e-4), torch=other))
    assert choice().chosen == "first"


def test_a_patch_release_of_torch_keeps_torchs_own_times() -> None:
    major, minor, *_ = str(torch.__version__).split("+")[0].split(".")
    patched = f"{major}.{minor}.77"
    made = table(row(spec_of(), sdpa_cpu=1e-3, reference=1e-4))
    write(replace(made, torch=patched, versions=dict.fromkeys(made.versions, patched)))
    found = choice()
    assert found["sdpa_cpu"].estimate.exact and found["reference"].estimate.seconds == 1e-4
    names = [candidate.name for candidate in found.candidates]
    assert names.index("reference") < names.index("sdpa_cpu")


def test_the_users_rows_come_over_the_shipped_ones(toys: dict[str, Toy]) -> None:
    shipped = measured.shipped_file(detect(CPU))
    write(table(row(spec_of(64), first=3e-4, second=1e-4), row(spec_of(1024), first=3e-4, second=1e-4)), shipped)
    assert choice(64).chosen == choice(1024).chosen == "second"
    write(table(row(spec_of(64), first=5e-5)))  # of this backend only: the other one's shipped time still counts
    found = choice(64)
    assert found.chosen == "first" and found["second"].estimate is not None
    assert choice(1024).chosen == "second" and shipped.name in choice(1024).decided_by


def test_a_failure_where_it_was_measured_outweighs_neighbours(toys: dict[str, Toy]) -> None:
    write(table(row(spec_of(64), second=2e-4, failed={"first": "wrong"}), row(spec_of(96), first=1e-5, second=2e-4)))
    found = choice(64)
    assert found.chosen == "second" and "failed when it was measured: wrong" in found["first"].why
    assert choice(96).chosen == "first"


def test_batch_invariant_choices_ignore_the_table(toys: dict[str, Toy]) -> None:
    write(table(row(spec_of(batch_invariant=True), first=3e-4, second=1e-4)))
    found = choice(batch_invariant=True)
    assert found.chosen == "first" and found["second"].estimate is None


def test_the_choice_does_not_depend_on_earlier_calls(toys: dict[str, Toy]) -> None:
    write(table(row(spec_of(128), first=1e-4, second=3e-4), row(spec_of(512), first=9e-4, second=3e-4)))
    lengths = (128, 160, 192, 224, 256, 320, 384, 448, 512)
    fresh = {}
    for n in lengths:
        measured.forget()
        fresh[n] = choice(n).chosen
    measured.forget()
    assert {n: choice(n).chosen for n in reversed(lengths)} == fresh and set(fresh.values()) == {"first", "second"}


def test_pinned_tables_stand_alone_and_stay(toys: dict[str, Toy]) -> None:
    from vllm_accel.dispatch.table_file import PinnedError

    write(table(row(spec_of(1024), first=3e-4, second=1e-4)), measured.shipped_file(detect(CPU)))
    path = write(table(row(spec_of(64), first=3e-4, second=1e-4), pinned=True))
    assert choice(64).chosen == "second" and choice(1024).chosen == "first"
    with pytest.raises(PinnedError, match="--unpin"):
        update(path, table(row(spec_of(64), first=1e-6)))
    assert choice(64).chosen == "second"


def test_tables_are_merged_by_backend_and_stale_times_go() -> None:
    a, b = spec_of(64), spec_of(256)
    old = table(row(a, x=1e-4, y=2e-4), row(b, x=1e-3))
    new = table(row(a, x=5e-5, failed={"y": "wrong"}), driver=old.driver)
    both = {r.spec: r for r in merged(old, new).rows}
    assert both[a].times["x"].seconds == 5e-5 and both[a].failed == {"y": "wrong"} and "y" not in both[a].times
    assert both[b].times["x"].seconds == 1e-3
    newer = table(row(a, x=5e-5), release="2.0")
    assert b not in {r.spec for r in merged(old, newer).rows}  # x of 1.0 was all that it had
    for changed in ({"driver": "13.0"}, {"policy": "another"}, {"torch": "99.0"}, {"device": "another"}):
        assert merged(replace(old, **changed), new) == new


def test_a_table_is_the_same_after_writing_and_reading() -> None:
    timing = Timing(1.25e-4, 0.02, 0.03, 1e-4, 9e-5, 2e-5, (1, 70, 512))
    specs = [spec_of(64), spec_of(1, 512, causal=True, softcap=5.0)]
    rows = tuple(Row("attention", spec, {"x": timing, "y": Timing(1e-3, 0.5)}, {"z": "wrong"}) for spec in specs)
    made = table(*rows, driver="13.0", pinned=True, provenance={"date": "today"})
    text = dump(made)
    assert parse(text) == made
    lines = text.splitlines()
    assert sum('"op"' in line for line in lines) == 2 and '"new_length": 0.03' in text  # one row a line, with names
    assert parse(dump(Table("d", "2.0"))) == Table("d", "2.0")


@pytest.mark.parametrize("spec", [
    GemmSpec(Form.MOE, torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16, 64, 128, 256, 8, Feature.GRAD,
             Scaling.ROW, Scaling.BLOCK_1x128, activation="silu", top_k=2),
    spec_of(64, causal=True, window_size=(5, 0)),
], ids=str)  # fmt: skip
def test_specs_are_plain_data_and_back(spec: Any) -> None:
    op = "gemm" if isinstance(spec, GemmSpec) else "attention"
    assert spec_from_json(op, json.loads(json.dumps(spec_to_json(spec)))) == spec


def _broken() -> dict[str, Any]:
    """Return what may be wrong with a table: a name, and the change to its data."""

    def timing(**values: Any) -> Any:
        return lambda data: data["rows"][0]["seconds"]["first"].update(values)

    def call(**values: Any) -> Any:
        return lambda data: data["rows"][0]["call"].update(values)

    return {
        "format": lambda data: data.update(format=99),
        "versions": lambda data: data.update(versions=[1]),
        "a version": lambda data: data.update(versions={"attention:first": 3}),
        "pinned": lambda data: data.update(pinned="yes"),
        "rows": lambda data: data.update(rows={}),
        "a row": lambda data: data.update(rows=[7]),
        "an operation": lambda data: data["rows"][0].update(op="sort"),
        "no seconds": timing(seconds=None),
        "negative": timing(seconds=-1.0),
        "a year": timing(seconds=1e9),
        "not a number": timing(seconds=float("nan")),
        "noise": timing(noise=50.0),
        "text": timing(host="fast"),
        "an unknown time": timing(median=1e-4),
        "lengths": timing(at=[1, 64]),
        "no length": timing(at=[1, 64, 0]),
        "a fraction": timing(at=[1, 64, 64.5]),
        "dtype": call(dtype="float99"),
        "code for a dtype": call(dtype="__class__"),
        "features": call(features=["warp"]),
        "relation": call(relation="sideways"),
        "heads": call(num_heads=3, num_kv_heads=2),
        "huge": call(seqlen_q=1 << 60),
        "a bool": call(seqlen_q=True),
        "field": call(colour="red"),
        "failed": lambda data: data["rows"][0].update(failed={"x": 1}),
    }


@pytest.mark.parametrize("name", _broken())
def test_what_is_wrong_in_a_file_is_named_and_the_file_ignored(
    toys: dict[str, Toy], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(table(row(spec_of(), first=3e-4, second=1e-4)))
    data = json.loads(path.read_text())
    _broken()[name](data)
    path.write_text(json.dumps(data))
    measured.forget()
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        assert choice().chosen == "first"
        choice(1024)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and path.name in said[0] and "ignored" in said[0] and "vllm-accel tune" in said[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0\0", "[" * 100_000, '{"format": 1}'])
def test_what_is_no_table_is_ignored(toys: dict[str, Toy], text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(table(row(spec_of(), first=3e-4, second=1e-4)))
    path.write_text(text)
    measured.forget()
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        assert choice().chosen == "first"
    assert len(caplog.records) == 1 and "is ignored" in caplog.text


def test_a_table_of_another_device_or_policy_is_ignored(toys: dict[str, Toy], caplog: pytest.LogCaptureFixture) -> None:
    for changed in ({"device": "nvidia_h200"}, {"policy": "by feeling"}):
        write(table(row(spec_of(), first=3e-4, second=1e-4), **changed))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vllm_accel"):
            assert choice().chosen == "first"
        assert "is ignored" in caplog.text


def test_tables_are_named_by_device() -> None:
    assert measured.table_name(preset("h200")) == "nvidia_h200"
    name = measured.table_name(detect(CPU))
    assert name.endswith("_cores") and name == name.lower() and "/" not in name


def test_backends_that_compile_stay_back_until_they_are_built(toys: dict[str, Toy]) -> None:
    toys["second"].capability = replace(toys["second"].capability, first_call_seconds=4.0)
    write(table(row(spec_of(), first=3e-4, second=1e-4)))
    found = choice()
    assert found.chosen == "first" and found["second"].state is State.HELD_BACK
    assert found["second"].estimate.seconds == 1e-4  # what warmup would bring


def test_every_shipped_table_is_valid_and_about_its_device() -> None:
    folder = Path(measured.__file__).parents[1] / "data" / "tables"
    for path in folder.glob("*.json"):
        found = parse(path.read_text())
        assert found.device == path.stem and found.rows and found.provenance["date"] and found.provenance["command"]
        for r in found.rows:
            for name in r.times:
                assert f"{r.op}:{name}" in found.versions
            assert Feature.BATCH_INVARIANT not in getattr(r.spec, "features", Feature(0))
