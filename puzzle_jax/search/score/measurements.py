"""The loss that each alternative causes: KL(parent || child) per completion token.

The mean is over all tokens, whichever trace they belong to: a wrong turn anywhere in an answer spoils it, so long
answers have more to lose. If every trace had the same weight, short answers would decide: on the embedded parent that
chose a child with less than half the accuracy at medium and high effort (docs/results.md).

Alternatives for attention and for experts are scored separately; the integer program adds their scores. A window does
not affect tokens that see no more keys than the window has, so traces no longer than it count as zero without being
run. The loss per token beyond the window is reported beside the mean (`late_kl`), as is the loss by context length.

Results are kept trace by trace in a `ScoreTable`, which is saved as it grows: an interrupted run resumes where it was,
and nothing is scored again for another target.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from puzzle_jax.evaluate.statistics import weighted_mean
from puzzle_jax.files import write_beside
from puzzle_jax.generate.batches import MicroBatch, TokenWeights, alike, micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.processes.published import values_of
from puzzle_jax.search.score.estimator import estimate, kinds_of, post_stratified
from puzzle_jax.search.score.replace_one import CONTEXTS, METRICS, Alternative

_SAVE_SECONDS = 10.0
_UNCHANGED = np.array([0.0, 1.0, 1.0, *[0.0] * (len(METRICS) - 3)])


@runtime_checkable
class Runner(Protocol):
    """Measures METRICS of traces under alternatives: a `ReplaceOne`, a `Lens` or `WholeChildren`."""

    @property
    def base(self) -> Sequence[Alternative] | None: ...

    @property
    def choices(self) -> Sequence[Alternative]: ...

    def __call__(
        self, batch: MicroBatch, wanted: Sequence[tuple[int, Alternative]], on_done: Callable[[int], None] | None
    ) -> Float[np.ndarray, "alternatives rows metrics"]: ...

    def work(self, wanted: Sequence[tuple[int, Alternative]]) -> int: ...


@dataclass(frozen=True)
class Score:
    """Means over completion tokens.

    Attributes:
      kl: KL(parent || child) in nats per token; `kl_se` is its standard error over traces (infinite for one trace).
      agreement: share of positions whose most likely token is the parent's.
      cosine: cosine similarity of the final hidden states.
      traces: number of traces scored.
      kl_by_context: mean KL per token, by the number of tokens that its position sees, itself included.
      late_share: share of completion tokens whose position sees more than the window; 1 if no window was narrowed.
      late_kl: KL per such token; 0 if there is none.
    """

    kl: float
    kl_se: float
    agreement: float
    cosine: float
    traces: int
    kl_by_context: dict[str, float]
    late_share: float = 1.0
    late_kl: float = 0.0


@dataclass
class ScoreTable:
    """METRICS of traces under alternatives.

    Attributes:
      alternatives: layer and choice of each alternative.
      traces: the traces; each alternative is scored on some of them.
      values: the measurements; NaN where an alternative was not scored on a trace.
      lens: KL as estimated by the lens, if it is used; NaN on traces that it was not run on. Not saved to disk.
      stratified: whether means weight each kind of trace by its tokens among all traces, as estimates with a lens do,
        because some kinds were scored more often than others.
      weigh: weights of the completion tokens, in means over a trace and of traces.
      known: values of an earlier run. Each is adopted only when it is requested, so that a resumed run chooses by the
        same numbers as one that was never interrupted.
    """

    alternatives: Sequence[tuple[int, Alternative]]
    traces: Sequence[Trace]
    values: Float[np.ndarray, "alternatives traces metrics"]
    lens: Float[np.ndarray, "alternatives traces"] | None = None
    known: Float[np.ndarray, "alternatives traces metrics"] | None = None
    stratified: bool = False
    weigh: TokenWeights = alike

    @staticmethod
    def empty(
        alternatives: Sequence[tuple[int, Alternative]], traces: Sequence[Trace], weigh: TokenWeights = alike
    ) -> ScoreTable:
        shape = (len(alternatives), len(traces), len(METRICS))
        return ScoreTable(alternatives, traces, np.full(shape, np.nan), weigh=weigh)

    @cached_property
    def tokens(self) -> Int[np.ndarray, "traces"]:
        """Completion tokens of every trace, counted by their weights, which are the weight of the trace."""
        return np.array([self.weigh(trace).sum() for trace in self.traces])

    @property
    def scored(self) -> Bool[np.ndarray, "alternatives traces"]:
        return ~np.isnan(self.values[..., 0])

    def means(self) -> Float[np.ndarray, "alternatives"]:
        """Mean KL of every alternative over the traces it was scored on."""
        return self._means(self.scored)

    def estimates(self, traces: Int[np.ndarray, "drawn"] | None = None) -> Float[np.ndarray, "alternatives"]:
        """The best estimate of every KL: the means, or with a lens the estimates of `estimator`.

        `traces` are bootstrap draws, each counted as often as it was drawn; by default every trace counts once. An
        alternative scored on none of them is NaN.
        """
        times = np.ones(len(self.traces)) if traces is None else np.bincount(traces, minlength=len(self.traces))
        times = (self.scored * times).astype(float)
        if self.lens is None:
            return self._means(times)
        kinds = self._kinds()
        layers = np.array([layer for layer, _ in self.alternatives])
        return estimate(self.values[..., 0], self.lens, times=times, tokens=self.tokens, kinds=kinds, layers=layers)

    def _means(self, times: np.ndarray) -> Float[np.ndarray, "alternatives"]:
        if self.stratified:
            weights = post_stratified(times.astype(float), self.tokens, self._kinds())
        else:
            weights = times * self.tokens
        with np.errstate(invalid="ignore"):
            return np.sum(np.nan_to_num(self.values[..., 0]) * weights, axis=1) / weights.sum(axis=1)

    def _kinds(self) -> Int[np.ndarray, "traces"]:
        return kinds_of([(trace.task, trace.effort) for trace in self.traces])

    def score(self, number: int, base_window: int | None = None) -> Score:
        """One alternative's means; `base_window` is the window that the alternative may narrow."""
        rows = np.flatnonzero(self.scored[number])
        values, tokens = self.values[number, rows], self.tokens[rows]
        by_context = np.array([_tokens_by_context(self.traces[int(row)], self.weigh) for row in rows])
        window = self.alternatives[number][1].window
        late = 1.0 if window is None or window == base_window else self._late_share(rows, window)
        kl, kl_se = weighted_mean(values[:, 0], tokens)
        return Score(
            kl=kl,
            kl_se=kl_se,
            agreement=weighted_mean(values[:, 1], tokens)[0],
            cosine=weighted_mean(values[:, 2], tokens)[0],
            traces=len(rows),
            kl_by_context={
                name.removeprefix("kl "): float((values[:, 3 + i] * tokens).sum() / by_context[:, i].sum())
                for i, name in enumerate(METRICS[3:])
                if by_context[:, i].any()
            },
            late_share=late,
            late_kl=kl / late if late else 0.0,
        )

    def _late_share(self, rows: Int[np.ndarray, "scored"], window: int) -> float:
        """Share of completion tokens that are predicted from more than `window` tokens."""
        traces = [self.traces[row] for row in rows]
        late = [np.average(_contexts(trace) > window, weights=self.weigh(trace)) for trace in traces]
        return weighted_mean(np.array(late), self.tokens[rows])[0]

    # On disk -------------------------------------------------------------------------------------------------------

    def key(self, parent: str) -> str:
        """A hash of everything that the values depend on; `parent` names what is not in the table."""
        digest = hashlib.sha256(parent.encode())
        for layer, choice in self.alternatives:
            digest.update(f"{layer} {choice.window} {np.flatnonzero(choice.expert_mask).tolist()}\n".encode())
        for trace in self.traces:
            digest.update(f"{trace.prompt} {trace.completion}\n".encode())
            if self.weigh is not alike:
                digest.update(self.weigh(trace).tobytes())
        return digest.hexdigest()

    def save(self, path: Path, key: str) -> None:
        values = self.values if self.known is None else np.where(np.isnan(self.values), self.known, self.values)
        write_beside(path, save({"values": values}, metadata={"key": key}))

    def recall(self, alternatives: Sequence[int], traces: Sequence[int]) -> None:
        """Adopts the known values of these alternatives on these traces."""
        if self.known is not None:
            asked = np.ix_(alternatives, traces)
            self.values[asked] = np.where(np.isnan(self.values[asked]), self.known[asked], self.values[asked])

    def load(self, path: Path, key: str) -> None:
        """Reads the values of an earlier run with the same key; a damaged file or one with another key is ignored."""
        if not path.is_file():
            return
        try:
            with safe_open(path, framework="numpy") as found:
                if (found.metadata() or {}).get("key") == key:
                    self.known = found.get_tensor("values").reshape(self.values.shape)
        except (SafetensorError, ValueError):
            return


class SavedTable:
    """A table that is saved from time to time, so that a killed run can resume; with a path of None it is not saved.

    The identity names everything that the values depend on and that is not in the table; a file with another identity
    is not read.
    """

    def __init__(self, table: ScoreTable, path: Path | None, identity: str) -> None:
        self.table, self.path, self.key = table, path, table.key(identity)
        self._saved = time.monotonic()
        if path is not None:
            table.load(path, self.key)

    def save(self, *, now: bool = False) -> None:
        """Saves the table if the last save was some time ago, or at once if `now`."""
        if self.path is not None and (now or time.monotonic() - self._saved > _SAVE_SECONDS):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.table.save(self.path, self.key)
            self._saved = time.monotonic()


def longest_context(traces: Sequence[Trace]) -> int:
    """The most tokens that any position before a completion token sees; 0 without traces.

    A window changes nothing on traces whose contexts it covers, so those are no evidence of what it costs.
    """
    return max((len(trace.prompt) + len(trace.completion) - 1 for trace in traces), default=0)


def _contexts(trace: Trace) -> Int[np.ndarray, "completion"]:
    """Number of tokens that the position before each completion token sees."""
    return len(trace.prompt) + np.arange(len(trace.completion))


def _tokens_by_context(trace: Trace, weigh: TokenWeights) -> Float[np.ndarray, "buckets"]:
    bucket = np.searchsorted(CONTEXTS, _contexts(trace))
    return np.bincount(bucket, weights=weigh(trace), minlength=len(CONTEXTS) + 1)


@dataclass(frozen=True)
class Fill:
    """Scores alternatives on those traces (both are numbers in the table) that they have not been scored on yet."""

    table: ScoreTable
    run: Runner
    alternatives: Sequence[int]
    traces: Sequence[int]
    tokens_per_batch: int = 1024

    @property
    def work(self) -> int:
        """Number of layers to run, summed over the remaining alternatives and batches."""
        return sum(self._work(wanted) for _, wanted in self._to_do())

    def __call__(
        self, on_batch: Callable[[], None] | None = None, on_done: Callable[[int], None] | None = None
    ) -> None:
        """Fills the table, with the same values in all processes.

        Args:
          on_batch: called after every batch, when the table may be saved.
          on_done: called with the amount of `work` just done.
        """
        for batch, wanted in [task for task in self._to_do() if task[1]]:
            found = values_of(self.run(batch, [self.table.alternatives[number] for number in wanted], on_done))
            real = batch.ids >= 0
            self.table.values[np.ix_(wanted, batch.ids[real].tolist())] = found[:, real]
            if on_batch is not None:
                on_batch()

    def _work(self, wanted: Sequence[int]) -> int:
        return self.run.work([self.table.alternatives[number] for number in wanted])

    def _to_do(self) -> Iterator[tuple[MicroBatch, list[int]]]:
        """Yields batches with the alternatives to run on each, and fills in values that a window cannot change."""
        table, run = self.table, self.run
        table.recall(self.alternatives, self.traces)
        longest = max(len(trace.prompt) + len(trace.completion) for trace in table.traces)
        traces = [table.traces[number] for number in self.traces]
        size, weigh = self.tokens_per_batch, table.weigh
        for batch in micro_batches(traces, tokens_per_batch=size, longest=longest, weigh=weigh):
            ids = np.where(batch.ids >= 0, np.asarray(self.traces)[batch.ids], -1)
            batch = batch._replace(ids=ids)
            rows = ids[ids >= 0]
            wanted = []
            for number in self.alternatives:
                layer, choice = table.alternatives[number]
                if run.base is None and _changes_nothing(choice, run.choices[layer], batch):
                    table.values[number, rows] = _UNCHANGED
                elif np.isnan(table.values[number, rows, 0]).any():
                    wanted.append(number)
            yield batch, wanted


def _changes_nothing(choice: Alternative, base: Alternative, batch: MicroBatch) -> bool:
    """Returns whether an alternative only narrows the window, to one that still covers every trace of the batch."""
    if choice.window is None or not np.array_equal(choice.expert_mask, base.expert_mask):
        return False
    return choice.window >= int(np.max(np.asarray(batch.lengths)))
