"""Continuous batching: one packed batch a step, of sequences that come, grow, are evicted and end in one cache."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from examples.serve.decoder import Decoder
from vllm_accel import CacheFullError, CacheStep, PagedKVCache


@dataclass(eq=False)
class Request:
    """A prompt that follows the system prompt, and its answer of `wanted` tokens."""

    number: int
    arrives: int
    prompt: list[int]
    wanted: int
    answer: list[int] = field(default_factory=list)
    sequence: int = -1


class Engine:
    """Serve requests from one cache, whose sequences all start as a fork of one system prompt.

    Args:
        system: the tokens of the system prompt; may be none. tokens_per_step: at most so many in one batch.

    Attributes:
        waiting, running: requests without and with a sequence in the cache, oldest first.
        evictions, steps, computed (tokens), peak_blocks: so far.
        seen: the latest step with prompts in it, and the latest of answers only.
    """

    def __init__(self, model: Decoder, cache: PagedKVCache, system: Sequence[int], tokens_per_step: int = 128) -> None:
        self.model, self.cache, self.system_prompt = model, cache, list(system)
        self.tokens_per_step = tokens_per_step
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.evictions = self.steps = self.computed = self.peak_blocks = 0
        self.seen: dict[str, CacheStep] = {}
        self.system = cache.allocate()
        if system:
            self._run([(self.system, self.system_prompt)])  # once: everyone forks it

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            CacheFullError: it does not fit even if it runs alone, so that waiting would never end.
        """
        if not request.prompt or request.wanted < 1:
            raise ValueError(f"request {request.number} needs a prompt and at least one token to answer")
        length = len(self.system_prompt) + len(request.prompt) + request.wanted - 1  # the last token is not read again
        needed, there = self._own_blocks(length), self.cache.num_blocks - len(self.cache.blocks(self.system))
        if needed > there:
            raise CacheFullError(
                f"request {request.number} needs {needed} blocks for {len(request.prompt)} + {request.wanted} tokens; "
                f"the whole cache has {there} beside the system prompt",
                fix="make the cache larger, or ask for less",
            )
        self.waiting.append(request)

    def step(self) -> list[Request]:
        """Admit what fits, compute one packed batch, and return the requests that it finished."""
        self._admit()
        batch = list(self._batch())
        likely: list[int] = []
        while batch:
            try:
                likely = self._run([(request.sequence, new) for request, new in batch])
                break
            except CacheFullError:  # nothing has changed
                evicted = self._evict()
                batch = [(request, new) for request, new in batch if request is not evicted]
        done = []
        for (request, _), token in zip(batch, likely, strict=True):
            if self.cache.length(request.sequence) == len(self._tokens(request)):  # nothing of it is left to read
                request.answer.append(token)
                if len(request.answer) == request.wanted:
                    self.cache.free(request.sequence)
                    self.running.remove(request)
                    done.append(request)
        return done

    def close(self) -> None:
        """Let go of the system prompt."""
        self.cache.free(self.system)

    def _admit(self) -> None:
        """Give a sequence to those whose tokens so far fit beside what the running ones still have to read."""
        free = self.cache.free_blocks - sum(self._missing(r, self.cache.length(r.sequence)) for r in self.running)
        # One more block for each that runs: else the newcomer is the first to be evicted when one of them grows.
        while self.waiting and (missing := self._missing(self.waiting[0], 0)) + len(self.running) <= free:
            free -= missing
            request = self.waiting.popleft()
            request.sequence = self.cache.fork(self.system)
            self.running.append(request)

    def _batch(self) -> Iterator[tuple[Request, list[int]]]:
        """Choose the tokens of a step: whoever needs one gets it, the rest goes to prompts, oldest first."""
        left = self.tokens_per_step
        unread = [(r, self._tokens(r)[self.cache.length(r.sequence) :]) for r in self.running]
        for request, new in sorted(unread, key=lambda pair: len(pair[1]) > 1):
            if left:
                yield request, new[:left]
                left -= len(new[:left])

    def _run(self, batch: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Put new tokens of sequences through the model; return the next token of each."""
        starts = [self.cache.length(sequence) for sequence, _ in batch]
        counts = [len(new) for _, new in batch]
        step = self.cache.extend([sequence for sequence, _ in batch], counts)
        self.peak_blocks = max(self.peak_blocks, self.cache.num_blocks - self.cache.free_blocks)
        self.steps, self.computed = self.steps + 1, self.computed + sum(counts)
        self.seen["prompts" if max(counts) > 1 else "answers"] = step
        tokens = [token for _, new in batch for token in new]
        positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
        likely: list[int] = self.model(tokens, positions, step)
        return likely

    def _evict(self) -> Request:
        """Take the newest request out of the cache and put it first in the queue; its answer so far is kept."""
        evicted = self.running.pop()
        self.cache.free(evicted.sequence)
        self.waiting.appendleft(evicted)
        self.evictions += 1
        return evicted

    def _tokens(self, request: Request) -> list[int]:
        return self.system_prompt + request.prompt + request.answer

    def _own_blocks(self, length: int) -> int:
        """Return the blocks of a sequence of that length that are not shared with the system prompt."""
        if length <= len(self.system_prompt):
            return 0
        return math.ceil(length / self.cache.block_size) - len(self.system_prompt) // self.cache.block_size

    def _missing(self, request: Request, length: int) -> int:
        return self._own_blocks(len(self._tokens(request))) - self._own_blocks(length)


def serve(engine: Engine, requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Submit requests as they arrive, and yield after each step the requests that it finished."""
    coming = deque(sorted(requests, key=lambda request: request.arrives))
    now = 0
    while coming or engine.waiting or engine.running:
        while coming and coming[0].arrives <= now:
            engine.submit(coming.popleft())
        now += 1
        if engine.waiting or engine.running:
            yield engine.step()


def one_by_one(model: Decoder, system: Sequence[int], request: Request, block_size: int) -> list[int]:
    """Answer a request alone in a cache of its own: the whole prompt at once, then token by token."""
    tokens = [*system, *request.prompt]
    cache = model.cache(math.ceil((len(tokens) + request.wanted) / block_size), block_size)
    sequence = cache.allocate()
    answer: list[int] = []
    while len(answer) < request.wanted:
        new = tokens[cache.length(sequence) :]
        step = cache.extend([sequence], [len(new)])
        answer += model(new, range(len(tokens) - len(new), len(tokens)), step)
        tokens.append(answer[-1])
    return answer
