"""examples/serve: whatever shares the cache and whoever is evicted, each request gets the tokens that it gets alone.

And the pages about serving: what their code says, happens.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.serve import __main__ as program
from examples.serve.decoder import Decoder, Sizes
from examples.serve.engine import Engine, Request, one_by_one, serve
from host import FIRST_ON_CPU
from vllm_accel import CacheFullError, attention
from vllm_accel.ops import shared_prefix

ROOT = Path(__file__).resolve().parent.parent
SMALL = Sizes(vocabulary=97, layers=2, heads=4, kv_heads=2, head_dim=16, inner=96)
#: Four tokens a block, and six in the system prompt: its second block is half full, so every fork copies it.
BLOCK = 4
SYSTEM = (5, 90, 17, 3, 3, 61)


@dataclass(frozen=True)
class NoCache:
    """What the decoder needs of a step, over one whole sequence and with attention written out."""

    length: int
    heads: int = SMALL.heads

    def __getitem__(self, layer: int) -> NoCache:
        object.__setattr__(self, "written", None)
        return self

    @property
    def cu_seqlens_q(self) -> torch.Tensor:
        return torch.tensor([0, self.length])

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        object.__setattr__(self, "written", (k, v))

    def attend(self, q: torch.Tensor, causal: bool, **_: Any) -> torch.Tensor:
        assert causal
        k, v = (t.repeat_interleave(self.heads // t.shape[1], 1).transpose(0, 1) for t in self.written)  # type: ignore[attr-defined]
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        hidden = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def without_a_cache(model: Decoder, prompt: list[int], wanted: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(wanted):
        step: Any = NoCache(len(tokens))
        tokens += model(tokens, range(len(tokens)), step)
    return tokens[len(prompt) :]


def requests(seed: int, count: int = 7) -> list[Request]:
    source = random.Random(seed)
    lengths = [(source.choice((1, 3, 9, 22)), source.choice((1, 5, 14))) for _ in range(count)]
    return [
        Request(i, source.randrange(6), [source.randrange(SMALL.vocabulary) for _ in range(prompt)], wanted)
        for i, (prompt, wanted) in enumerate(lengths)
    ]


def served(
    model: Decoder, asked: list[Request], blocks: int, system: tuple[int, ...] = SYSTEM, per_step: int = 12
) -> Engine:
    """Serve to the end, and see after every step that blocks are free or held, and nothing is left at the end."""
    engine = Engine(model, model.cache(blocks, BLOCK), system, per_step)
    finished = []
    for done in serve(engine, asked):
        finished += done
        held = {block for sequence in engine.cache.sequences for block in engine.cache.blocks(sequence)}
        assert len(held) + engine.cache.free_blocks == blocks
        assert set(engine.cache.sequences) == {engine.system, *(r.sequence for r in engine.running)}
    assert sorted(r.number for r in finished) == [r.number for r in asked]
    engine.close()
    assert engine.cache.free_blocks == blocks and not engine.cache.sequences
    return engine


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_invariant": True}, {"backend": "reference"}, {"backend": "sdpa_cpu"}],
    ids=["automatic", "batch_invariant", "reference", "sdpa_cpu"],
)
def test_sharing_a_full_cache_changes_no_token(options: dict[str, Any], seed: int) -> None:
    model = Decoder(SMALL, seed, **options)
    asked = requests(seed)
    engine = served(model, asked, blocks=12)
    assert engine.evictions > 0 and engine.peak_blocks > 10
    for request in asked:
        assert request.answer == without_a_cache(model, [*SYSTEM, *request.prompt], request.wanted), request.number
    # Else a model that always says the same would do.
    assert len({token for request in asked for token in request.answer}) > 15


def test_one_by_one_is_without_a_cache() -> None:
    model = Decoder(SMALL, 9)
    for request in requests(9, 3):
        want = without_a_cache(model, [*SYSTEM, *request.prompt], request.wanted)
        assert one_by_one(model, SYSTEM, request, BLOCK) == want


@pytest.mark.parametrize("system", [(), SYSTEM[:4], SYSTEM], ids=["none", "whole blocks", "half a block"])
@pytest.mark.parametrize("per_step", [1, 5, 1000])
def test_any_system_prompt_and_any_size_of_step(system: tuple[int, ...], per_step: int) -> None:
    model = Decoder(SMALL, 4)
    asked = requests(2, 5)
    served(model, asked, 11, system, per_step)
    for request in asked:
        assert request.answer == one_by_one(model, system, request, BLOCK), request.number


def test_steps_are_mixed_and_no_longer_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read in chunks, beside the answers that are being written."""
    model, seen = Decoder(SMALL, 0), []
    run = Engine._run

    def watched(engine: Engine, batch: Any) -> list[int]:
        seen.append([len(new) for _, new in batch])
        return run(engine, batch)

    monkeypatch.setattr(Engine, "_run", watched)
    engine = served(model, [Request(0, 0, [1, 2], 9), Request(1, 1, list(range(30)), 4)], 40, per_step=12)
    assert seen == [[6], [2], [1, 11], [1, 11], [1, 8], [1, 1], [1, 1], [1, 1], [1], [1]]
    assert engine.evictions == 0 and engine.computed == 6 + 2 + 8 + 30 + 3


def test_the_system_prompt_is_computed_and_kept_once() -> None:
    model = Decoder(SMALL, 0)
    system = tuple(range(40))
    engine = served(model, [Request(i, 0, [i, i + 1], 3) for i in range(4)], 40, system)
    assert engine.computed == 40 + 4 * (2 + 2)
    assert engine.peak_blocks == 10 + 4 * 1


def test_a_newcomer_waits_for_blocks_and_is_evicted_first() -> None:
    model = Decoder(SMALL, 0)
    old, new, last = Request(0, 0, [1] * 8, 9), Request(1, 0, [2] * 8, 9), Request(2, 0, [3] * 8, 1)
    engine = Engine(model, model.cache(6, BLOCK), ())
    for request in (old, new, last):
        engine.submit(request)
    engine.step()
    assert engine.running == [old, new] and list(engine.waiting) == [last]
    while not engine.evictions:
        engine.step()
    assert engine.running == [old] and list(engine.waiting) == [new, last]
    kept = list(new.answer)
    assert kept
    while engine.running or engine.waiting:
        engine.step()
    assert new.answer[: len(kept)] == kept
    for request in (old, new, last):
        assert request.answer == one_by_one(model, (), request, BLOCK)


def test_what_never_fits_is_refused_at_once() -> None:
    model = Decoder(SMALL, 0)
    engine = Engine(model, model.cache(7, BLOCK), SYSTEM)
    fits = Request(0, 0, [1] * 9, 8)  # 6 + 9 + 7 tokens: 6 blocks, of which one is shared
    with pytest.raises(CacheFullError, match=r"request 1 needs 6 blocks for 9 \+ 11 tokens; the whole cache has 5"):
        engine.submit(replace(fits, number=1, wanted=11))  # the last of them is not read again, and takes no room
    with pytest.raises(CacheFullError, match=r"make the cache larger, or ask for less"):
        engine.submit(replace(fits, prompt=[1] * 12))
    for wrong in (replace(fits, prompt=[]), replace(fits, wanted=0)):
        with pytest.raises(ValueError, match="needs a prompt and at least one token"):
            engine.submit(wrong)
    assert not engine.waiting
    engine.submit(fits)
    while engine.waiting or engine.running:
        engine.step()
    assert engine.evictions == 0 and fits.answer == one_by_one(model, SYSTEM, fits, BLOCK)


ARGUMENTS = ["--requests", "4", "--layers", "1", "--head-dim", "16", "--blocks", "30", "--device", "cpu"]


def test_the_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert program.main([*ARGUMENTS, "--compare-one-by-one"]) == 0
    told = capsys.readouterr().out
    assert "4 of 4 answers equal" in told and re.search(r"tokens answered +\d+, \d+/s", told)
    assert re.search(r"of 30 at most, 0 now", told)
    assert re.search(rf"steps with prompts +{FIRST_ON_CPU} on ", told)
    assert re.search(rf"steps of answers only +{FIRST_ON_CPU} on ", told)
    assert program.main([*ARGUMENTS, "--backend", "reference"]) == 0
    assert re.search(r"steps with prompts +reference on ", capsys.readouterr().out)
    monkeypatch.setattr(program, "one_by_one", lambda model, system, request, size: [-1])
    assert program.main([*ARGUMENTS, "--compare-one-by-one"]) == 1
    assert "different: requests [0, 1, 2, 3]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--blocks", "5"], "the whole cache has 2 beside the system prompt"),
        (["--blocks", "2"], "40 new tokens need 3 more blocks of 16 tokens; 2 of 2 are free"),
        (["--backend", "sdpa_cp"], "did you mean 'sdpa_cpu'?"),
        (["--backend", "flash_attn_2"], "runs on cuda"),
    ],
)
def test_the_program_says_what_is_wrong(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([*ARGUMENTS, *arguments]) == 2
    assert text in " ".join(capsys.readouterr().out.split())


def test_the_page_about_serving_runs() -> None:
    """Its pieces of Python one after another, as a reader would type them; then what they say."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    pieces = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(pieces) == 2
    exec(pieces[0], names)
    assert names["out"].shape == (40, 8, 64) and names["cache"].length(names["first"]) == 41
    assert names["step"].prefix_blocks == 2 and names["cache"].sequences == (names["first"],)
    exec(pieces[1], names)
    want = attention(*(names[x][None] for x in "qkv"), causal=True).flatten(2)
    assert (names["prompt"] - want).abs().max() < 1e-5
    assert names["token"].shape == (1, 1, 8, 64) and names["cache"].length(0) == 41


def test_the_page_names_the_limits_of_the_code() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for device, words in (("cpu", "from 48 MiB on on the CPU"), ("cuda", "from 512 MiB on on a GPU")):
        assert words in " ".join(text.split()) and f"{shared_prefix.MIN_SAVED[device] >> 20} MiB" in words
