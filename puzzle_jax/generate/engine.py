"""Batched generation by continuous batching: finished requests leave their slots, waiting ones take them.

The host only decides which request runs where (on a mesh over several processes, all hosts decide alike); all work is
in the three programs of `generate.slots`. Prompts are prefilled in chunks, a group of rows at a time, and running
requests decode between the chunks of a long prompt. Requests with the same prompt share a row, which runs once.

A request's tokens depend on the request and on the engine's shape (slots, context, chunk), never on its neighbours
or on when it got its slot. `generate` picks the context by the request's own length, so there they depend on the
request and `slots` alone.
Left out: paging of full caches, sharing of prefixes of different prompts, speculative decoding.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import NamedTuple, TypedDict, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate import slots as programs
from puzzle_jax.generate.sampling import Sampling
from puzzle_jax.generate.slots import Admission, Group, Slots
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.child import View
from puzzle_jax.model.network import states_dtype
from puzzle_jax.model.sharding import beside, generation_mesh, on_mesh, read
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks.context import check_fits

CHUNKS = (512, 256, 128, 64)  # tokens of a prompt that are prefilled at once; contexts are multiples of the last
PREFILL_TOKENS = 1024  # most tokens of all rows of a group in one chunk, per part of a mesh
SLOTS_PER_ROW = 2  # a group waits for as many free slots as it has rows
SMALLEST_CONTEXT, LONG_CONTEXT = 256, 8192
BURST, STEPS_BETWEEN_CHUNKS = 64, 4  # decode steps until the host looks for finished requests; between chunks


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token to complete, a limit of at least one token, and the seed of the sampling noise."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """A completion.

    Attributes:
      tokens: token ids, which end in a stop id unless `truncated`.
      truncated: whether the token limit ended it.
      log_probs: log-probability of each token under the model at temperature 1, if requested.
      experts: [prompt + tokens - 1, layers, k] expert ids of each position that was run, if requested; uint8 or uint16.
    """

    tokens: tuple[int, ...]
    truncated: bool
    log_probs: tuple[float, ...] | None = None
    experts: np.ndarray | None = field(default=None, compare=False)


class Event(NamedTuple):
    """New tokens of one request, and the whole completion once it has ended."""

    index: int
    tokens: tuple[int, ...]
    finished: Generated | None


class EngineOptions(TypedDict, total=False):
    """Options of an `Engine` that `generate` passes on."""

    slots: int
    cache: CacheFormat | None
    view: View | None
    mesh: Mesh | None
    log_probs: bool
    experts: bool


class GenerateOptions(EngineOptions, total=False):
    """Options of `generate`."""

    temperature: float
    top_p: float
    context: int | None


class Engine:
    """Slots of one context length on the device.

    Args:
      params: weights with dense or packed experts, sharded if a mesh is given; norms have the dtype to compute with.
      config: configuration of the model.
      stop_ids: tokens that end a completion and are part of it; without any, every request runs to its limit.
      context: prompt and completion tokens that a slot holds; rounded up to a multiple of 64.
      slots: number of requests that run together.
      sampling: temperature and top-p.
      cache: how keys and values are stored.
      view: the child of the model to run (`Child.view`).
      mesh: mesh of "data" and "model", or one for training, whose other axes join "data"; if it has devices of several
        processes, it spans all of them, and all make the same calls.
      log_probs, experts: whether to return these with each completion.

    Raises PuzzleError for slots below 1, and for a context below 1 or beyond the model's.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        *,
        stop_ids: Sequence[int],
        context: int,
        slots: int = 64,
        sampling: Sampling | None = None,
        cache: CacheFormat | None = None,
        view: View | None = None,
        mesh: Mesh | None = None,
        log_probs: bool = False,
        experts: bool = False,
    ) -> None:
        if slots < 1:
            raise PuzzleError(f"slots is {slots}, but must be at least 1")
        if not 1 <= context <= config.max_position:
            raise PuzzleError(f"context is {context}, but must be from 1 to the model's {config.max_position}")
        self.params, self.config, self.view = params, config, view
        self.sampling = sampling or Sampling()
        self.cache = cache or CacheFormat()
        self._mesh = None if mesh is None else generation_mesh(mesh)
        self.slots = slots
        self.context = slot_context(context)
        self.chunk = chunk_tokens(self.context)
        self.rows = group_rows(self.chunk, slots, 1 if self._mesh is None else self._mesh.shape["data"])
        self._stops = np.asarray(sorted(stop_ids), np.int32)
        self._stop_ids = frozenset(stop_ids)
        self._log_probs, self._experts = log_probs, experts
        self._dtype = states_dtype(params)

    def generate(
        self, requests: Sequence[Request], on_finish: Callable[[int, Generated], None] | None = None
    ) -> list[Generated]:
        """Completes every request; `on_finish(index, completion)` is called as each ends, in any order."""
        results: dict[int, Generated] = {}
        for event in self.stream(requests, burst=BURST, partial=False):
            if event.finished is not None:
                results[event.index] = event.finished
                if on_finish is not None:
                    on_finish(event.index, event.finished)
        return [results[i] for i in range(len(requests))]

    def stream(self, requests: Sequence[Request], *, burst: int = 1, partial: bool = True) -> Iterator[Event]:
        """Completes every request, with events every `burst` steps, without `partial` for whole completions only. If a
        prompt is prefilled meanwhile, the steps between its chunks come on top.

        Raises PuzzleError, before any work, for an empty prompt, a limit below 1, or a request that does not fit.
        """
        for index, request in enumerate(requests):
            check_request(request, index, min(self.context, self.config.max_position))
        return self._stream(requests, burst, partial)

    def cache_bytes(self) -> int:
        """Bytes of the slots' caches; see `model.cache.cache_bytes` for the formula."""
        caches = jax.eval_shape(self._new_slots, None).caches
        return sum(x.size * x.dtype.itemsize for c in caches for x in (c.k, c.v))

    def _new_slots(self, mesh: Mesh | None) -> Slots:
        return programs.empty_slots(
            self.config,
            self.slots,
            self.context,
            self._dtype,
            self.cache,
            log_probs=self._log_probs,
            experts=self._experts,
            mesh=mesh,
        )

    def _new_group(self) -> Group:
        return programs.empty_group(
            self.config, self.rows, self.context, self._dtype, self.cache, experts=self._experts, mesh=self._mesh
        )

    def _chunks(self, request: Request) -> int:
        return -(-len(request.prompt) // self.chunk)

    def _order(self, requests: Sequence[Request], alike: Sequence[int]) -> list[int]:
        """Long prompts first, then those with long answers; equal prompts are neighbours."""
        limits: dict[int, int] = defaultdict(int)
        for index, first in enumerate(alike):
            limits[first] = max(limits[first], requests[index].max_tokens)

        def key(index: int) -> tuple[int, int, int, int]:
            request, first = requests[index], alike[index]
            return -self._chunks(request), -limits[first], first, -request.max_tokens

        return sorted(range(len(requests)), key=key)

    def _stream(self, requests: Sequence[Request], burst: int, partial: bool) -> Iterator[Event]:
        alike = first_alike(requests)
        waiting = deque(self._order(requests, alike))
        state, group = beside(self.params, (self._new_slots(self._mesh), self._new_group()), self._mesh)
        held: dict[int, int] = {}  # first request with a prompt -> row of the group that holds it
        owners: dict[int, int] = {}  # slot -> request
        reported: dict[int, int] = {}  # slot -> tokens reported

        def enough() -> int:
            """Number of free slots that the next request waits for: one if its prompt has been run, else a group's."""
            return 1 if alike[waiting[0]] in held else min(self.rows, len(waiting))

        while waiting or owners:
            free = [slot for slot in range(self.slots) if slot not in owners]
            while waiting and len(free) >= enough():
                if alike[waiting[0]] not in held:
                    # Prompts without a free slot are included: their rows would otherwise run for nothing.
                    firsts = [first for first, _ in islice(groupby(waiting, alike.__getitem__), self.rows)]
                    state, group = self._prefill(state, group, [requests[i] for i in firsts], busy=bool(owners))
                    held = {first: row for row, first in enumerate(firsts)}
                members = []
                while waiting and len(members) < len(free) and alike[waiting[0]] in held:
                    members.append(waiting.popleft())
                slots, free = free[: len(members)], free[len(members) :]
                rows = [held[alike[i]] for i in members]
                state = self._admit(state, group, [requests[i] for i in members], rows, slots)
                owners.update(zip(slots, members, strict=True))
                reported.update(dict.fromkeys(slots, 0))
            state = self._decode(state, burst, enough() if waiting else self.slots)
            idle, counts = read((state.idle, state.counts), self._mesh)
            for slot, index in list(owners.items()):
                if not idle[slot] and not partial:
                    continue
                count, finished = int(counts[slot]), None
                if idle[slot]:
                    finished = self._completion(state, slot, requests[index], count)
                    tokens = finished.tokens
                else:
                    tokens = tuple(programs.read_row(state.tokens, slot, self._mesh)[:count].tolist())
                yield Event(index, tokens[reported[slot] :], finished)
                reported[slot] = count
                if finished is not None:
                    del owners[slot]

    def _prefill(self, state: Slots, group: Group, members: Sequence[Request], *, busy: bool) -> tuple[Slots, Group]:
        """Runs the prompts of at most `rows` requests; rows beyond them repeat the first."""
        members = [*members, *[members[0]] * (self.rows - len(members))]
        chunks = max(map(self._chunks, members))
        tokens = np.zeros((self.rows, chunks * self.chunk), np.int32)
        for row, request in enumerate(members):
            tokens[row, : len(request.prompt)] = request.prompt
        lengths = np.asarray([len(request.prompt) for request in members], np.int32)
        for index in range(chunks):
            start = index * self.chunk
            part = tokens[:, start : start + self.chunk]
            with on_mesh(self._mesh):
                group = programs.prefill(
                    self.params, self.config, group, part, np.int32(start), lengths, self.context, self.view
                )
            if busy and index + 1 < chunks:
                state = self._decode(state, STEPS_BETWEEN_CHUNKS, self.slots)
        return state, group

    def _admit(
        self, state: Slots, group: Group, members: Sequence[Request], rows: Sequence[int], slots: Sequence[int]
    ) -> Slots:
        """Gives slots to requests whose prompts have been run in these rows of the group."""
        numbers = np.zeros((5, self.slots), np.int32)
        numbers[:, : len(members)] = [
            slots,
            rows,
            [len(request.prompt) for request in members],
            [request.max_tokens for request in members],
            [request.seed % 2**31 for request in members],
        ]
        admission = Admission(np.asarray(len(members), np.int32), *numbers)
        return programs.admit(self.params, self.config, state, group, admission)

    def _decode(self, state: Slots, steps: int, idle_target: int) -> Slots:
        numbers = np.float32(self.sampling.temperature), np.int32(steps), np.int32(idle_target)
        with on_mesh(self._mesh):
            return programs.decode(
                self.params, self.config, state, self._stops, *numbers, self.view, self.sampling.top_p
            )

    def _completion(self, state: Slots, slot: int, request: Request, count: int) -> Generated:
        """The completion in a slot whose request has ended after `count` tokens."""
        row, log_probs, experts = programs.read_row((state.tokens, state.log_probs, state.experts), slot, self._mesh)
        tokens = tuple(row[:count].tolist())
        if log_probs is not None:
            log_probs = tuple(log_probs[:count].tolist())
        if experts is not None:
            experts = experts[: len(request.prompt) + count - 1].copy()  # the row is as long as the context
        return Generated(tokens, tokens[-1] not in self._stop_ids, log_probs, experts)


def generate(
    params: Params,
    config: ModelConfig,
    requests: Sequence[Request],
    *,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    context: int | None = None,
    on_finish: Callable[[int, Generated], None] | None = None,
    **options: Unpack[EngineOptions],
) -> list[Generated]:
    """Completes every request, each in an engine of the context that its own length needs (`own_context`).

    Arguments are those of `Engine`; a `context` applies to all requests. Completions are returned in the order of the
    requests; `on_finish(index, completion)` is called as each ends.

    Raises:
      PuzzleError: an empty prompt, a limit below 1, or a prompt that with its limit exceeds the context.
    """
    sampling = Sampling(temperature, top_p)
    by_context: dict[int, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        check_request(request, index, config.max_position)
        tokens = len(request.prompt) + request.max_tokens
        by_context[own_context(tokens, config) if context is None else context].append(index)
    results: dict[int, Generated] = {}
    for positions, members in sorted(by_context.items()):
        engine = Engine(params, config, stop_ids=stop_ids, context=positions, sampling=sampling, **options)

        def finish(member: int, completion: Generated, members: list[int] = members) -> None:
            results[members[member]] = completion
            if on_finish is not None:
                on_finish(members[member], completion)

        engine.generate([requests[i] for i in members], finish)
    return [results[i] for i in range(len(requests))]


def first_alike(requests: Sequence[Request]) -> list[int]:
    """For each request, the index of the first request with the same prompt."""
    firsts: dict[tuple[int, ...], int] = {}
    return [firsts.setdefault(tuple(request.prompt), index) for index, request in enumerate(requests)]


def slot_context(context: int) -> int:
    """Positions of a slot that must hold `context` tokens."""
    return -(-context // CHUNKS[-1]) * CHUNKS[-1]


def chunk_tokens(context: int) -> int:
    """Prompt tokens of a row that are prefilled at once: a divisor of a slot's context, at most an eighth of it, or 64.

    A short prompt is padded to a whole chunk, and many prompts are much shorter than what a slot must hold.
    """
    return next(c for c in CHUNKS if context % c == 0 and (8 * c <= context or c == CHUNKS[-1]))


def group_rows(chunk: int, slots: int, parts: int = 1) -> int:
    """Rows that are prefilled together, the same number on each of the `parts` of a mesh."""
    rows = min(PREFILL_TOKENS // chunk, slots // (SLOTS_PER_ROW * parts))
    return min(max(1, rows) * parts, slots)


def check_request(request: Request, index: int, context: int) -> None:
    """Raises PuzzleError for an empty prompt, a limit below 1, or a request longer than `context`."""
    if not request.prompt:
        raise PuzzleError(f"request {index} has an empty prompt, but generation needs at least one token")
    if request.max_tokens < 1:
        raise PuzzleError(f"request {index} has max_tokens {request.max_tokens}, but at least 1 is needed")
    check_fits(f"request {index}", len(request.prompt), request.max_tokens, context)


def own_context(tokens: int, config: ModelConfig) -> int:
    """The context that `generate` gives a request with `tokens` tokens of prompt and answer.

    There are few contexts, since each needs programs of its own: powers of two, and the quarters between long ones.
    """
    context = SMALLEST_CONTEXT
    while context < tokens:
        context *= 2
    if context > LONG_CONTEXT:
        context = next(c for c in range(context * 5 // 8, context + 1, context // 8) if c >= tokens)
    return min(context, config.max_position)
