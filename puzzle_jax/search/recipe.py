"""All settings of a search that a user may change, in one frozen tree.

A recipe is a YAML file of these fields; the command line overrides any of them by its dotted name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puzzle_jax.codec import to_plain
from puzzle_jax.config import ModelConfig
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import MOST_SEED, MOST_TIMES, MOST_TOGETHER, MOST_TOKENS, ConfigError, check_choice, check_range
from puzzle_jax.evaluate.settings import BY_EFFORT
from puzzle_jax.model.weights import check_weights
from puzzle_jax.search.rank.rules import PROPOSING, RULES
from puzzle_jax.search.solve.baselines import BASELINES
from puzzle_jax.search.space import DEFAULT_FRACTIONS, Restriction
from puzzle_jax.settings.files import ASSETS
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.tasks import EFFORTS, check_effort
from puzzle_jax.temperature import check_temperature
from puzzle_jax.train.student import check_trainable

TRACE_SETS = ("calibration", "validation", "confirmation", "heldout")
TRAINING = "training"
"""The set of traces that finalists are trained on; the others are asked of the parent in every search."""

MOST_PROBLEMS = 100_000
"""The most problems of a task; beyond it, problems would share seeds."""

EMBEDDED_PARENT = ASSETS / "tiny"


@dataclass(frozen=True)
class TraceSettings:
    """The parent's own answers.

    Attributes:
      tasks: task families to ask; every problem is asked at every effort. Accuracy is measured on them too.
      efforts: reasoning efforts.
      calibration: problems per task for ranking and scoring.
      validation: problems per task for choosing among the integer program's best solutions.
      confirmation: problems per task for accepting or refusing refinements.
      heldout: problems per task for the reported KL; no choice depends on them.
      temperature: sampling temperature; 0 means greedy.
      seed: random seed; another one draws other problems and other answers.
      max_tokens: most tokens of an answer by effort, or one number for all; required for every effort if there are
        tasks.
      batch_size: number of answers generated together.
      ended_only: whether answers that the limit on tokens cut are left out of all sets but the held-out one, so that
        only whole answers decide.
      file: traces that the parent generated elsewhere (`generate.traces.read_traces`), used instead of asking it; the
        prompts are split into the sets in the proportions of the numbers above.
    """

    tasks: tuple[str, ...] = ()
    efforts: tuple[str, ...] = EFFORTS
    calibration: int = 48
    validation: int = 32
    confirmation: int = 32
    heldout: int = 64
    temperature: float = 1.0
    seed: int = 0
    max_tokens: dict[str, int] = field(default_factory=dict, metadata=BY_EFFORT)
    batch_size: int = 64
    ended_only: bool = False
    file: Path | None = None

    def __post_init__(self) -> None:
        for effort in (*self.efforts, *self.max_tokens):
            check_effort(effort)
        for effort in self.efforts if self.tasks else self.max_tokens:
            if self.max_tokens.get(effort, 0) < 1:
                raise ConfigError(f"traces.max_tokens has no limit of at least 1 for effort {effort!r}")
            check_range(f"traces.max_tokens.{effort}", self.max_tokens[effort], 1, MOST_TOKENS)
        for name in TRACE_SETS:
            check_range(f"traces.{name}", getattr(self, name), 1, MOST_PROBLEMS)
        check_range("traces.batch_size", self.batch_size, 1, MOST_TOGETHER)
        _check_distinct("traces.tasks", self.tasks, may_be_empty=True)
        _check_distinct("traces.efforts", self.efforts)
        check_temperature("traces.temperature", self.temperature)
        check_range("traces.seed", self.seed, 0, MOST_SEED)


WITH_SINKS = (8192, 1024)
"""Windows that are offered by default."""


@dataclass(frozen=True)
class SpaceSettings:
    """Alternatives offered in every layer.

    Attributes:
      fractions: shares of the parent's experts that a layer may keep.
      divisor: degree of expert parallelism; every expert count must be a multiple of it.
      windows: windows offered on full-attention layers; null means 8192 and 1024 for a parent with attention sinks, and
        none for others, which have nothing to attend to where a window hides the first tokens.
      restrict: limits on the alternatives of some layers.
    """

    fractions: tuple[float, ...] = DEFAULT_FRACTIONS
    divisor: int = 1
    windows: tuple[int, ...] | None = None
    restrict: tuple[Restriction, ...] = ()

    def __post_init__(self) -> None:
        _check_distinct("space.fractions", self.fractions)
        check_range("space.divisor", self.divisor, 1, MOST_TOGETHER)
        for window in self.windows or ():
            check_range("space.windows", window, 1, MOST_TOKENS)
        _check_distinct("space.windows", self.windows or (), may_be_empty=True)

    def windows_for(self, parent: ModelConfig) -> tuple[int, ...]:
        """The windows that are offered on a parent's full-attention layers."""
        if self.windows is not None:
            return self.windows
        return WITH_SINKS if parent.variant.sinks else ()


@dataclass(frozen=True)
class RankSettings:
    """Ranking of experts.

    Attributes:
      rules: names of the `search.rank.rules` that propose expert sets, which are then scored exactly.
    """

    rules: tuple[str, ...] = PROPOSING

    def __post_init__(self) -> None:
        _check_distinct("rank.rules", self.rules)
        for name in self.rules:
            check_choice("rank.rules", name, tuple(RULES))


@dataclass(frozen=True)
class ScoreSettings:
    """Scoring of alternatives.

    Attributes:
      method: "exact" scores all on every calibration trace; "adaptive" scores all on a few traces, and on more only
        those whose uncertainty could change the integer program's choice; "lens" only estimates scores.
      first: number of traces that adaptive scoring begins with.
      draws: bootstrap draws of the traces, from which adaptive scoring estimates uncertainty.
      keep_sets: expert sets per layer and count that are scored exactly, the best by the lens; 0 scores all.
      tokens_per_batch: number of tokens in a micro-batch.
      per_call: alternatives that run together on a micro-batch.
      keep_every: number of layers from one kept hidden state to the next.
      ending_weight: how often the tokens with which thinking ends count in every KL by which children are chosen, while
        other tokens count once: the last `ending_tokens` of the analysis, the change to the final message, and the
        token that ends the answer.
      ending_tokens: see `ending_weight`.
    """

    method: Literal["adaptive", "exact", "lens"] = "adaptive"
    first: int = 24
    draws: int = 32
    keep_sets: int = 3
    tokens_per_batch: int = 1024
    per_call: int = 8
    keep_every: int = 8
    ending_weight: int = 1
    ending_tokens: int = 8

    def __post_init__(self) -> None:
        for name in ("first", "draws", "tokens_per_batch", "per_call", "keep_every"):
            check_range(f"score.{name}", getattr(self, name), 1, MOST_TOKENS)
        check_range("score.ending_weight", self.ending_weight, 1, 1000)
        check_range("score.ending_tokens", self.ending_tokens, 0, MOST_TOKENS)
        check_range("score.keep_sets", self.keep_sets, 0, MOST_TOGETHER)

    @property
    def ending(self) -> tuple[int, int]:
        return self.ending_weight, self.ending_tokens


@dataclass(frozen=True)
class RefineSettings:
    """Refinement after the integer program.

    A step is accepted only if the KL on confirmation traces falls by more than two standard errors.

    Attributes:
      rounds: rounds in which all alternatives are rescored around the child; at most 2.
      swaps: experts tried on either side of a swap, in every layer; 0 tries no swaps.
      swaps_by: how these are proposed: by "removal_error" in the parent, or by "gradients" around the child before each
        proposal.
      proposals: the most swap proposals that are tested, one after the other as long as they are accepted.
    """

    rounds: int = 1
    swaps: int = 4
    swaps_by: Literal["removal_error", "gradients"] = "removal_error"
    proposals: int = 16

    def __post_init__(self) -> None:
        check_range("refine.rounds", self.rounds, 0, 2)
        check_range("refine.swaps", self.swaps, 0, MOST_TOGETHER)
        check_range("refine.proposals", self.proposals, 0, MOST_TOGETHER)
        check_choice("refine.swaps_by", self.swaps_by, ("removal_error", "gradients"))


@dataclass(frozen=True)
class SolveSettings:
    """The integer program.

    Attributes:
      solutions: number of solutions that are run whole; the one with the lowest expected KL becomes the child
        (`search.refine.expected`).
      time_limit: seconds allowed for each solution.
      gap: relative gap that counts as optimal.
    """

    solutions: int = 8
    time_limit: float = 30.0
    gap: float = 1e-4

    def __post_init__(self) -> None:
        check_range("solve.solutions", self.solutions, 1, 10_000)
        check_range("solve.time_limit", self.time_limit, 0, above=True)
        check_range("solve.gap", self.gap, 0)


@dataclass(frozen=True)
class FinalistSettings:
    """Short distillations of the best children that see far in different layers; the one that learns best is chosen.

    What a child loses before training does not tell what training can mend, least of all for windows.

    Attributes:
      count: children that are trained, the integer program's choice among them; 0 trains none.
      steps: steps for which each is trained.
      problems: problems per task whose answers they are trained on; the answers are a trace set of their own.
      train: which of "router" and "experts" are trained besides attention, norms, embedding and head.
      learning_rate: peak of a cosine schedule after a short warm-up.
      row_length, rows: tokens in a row, and rows of a step.
    """

    count: int = 0
    steps: int = 100
    problems: int = 200
    train: tuple[str, ...] = ("router", "experts")
    learning_rate: float = 1e-4
    row_length: int = 512
    rows: int = 4

    def __post_init__(self) -> None:
        check_range("finalists.count", self.count, 0, MOST_TOGETHER)
        if self.count == 1:
            raise ConfigError("finalists.count is 1, but a choice needs at least 2; 0 trains none")
        check_range("finalists.steps", self.steps, 1, MOST_TIMES)
        check_range("finalists.problems", self.problems, 1, MOST_PROBLEMS)
        check_trainable(self.train, where="finalists.")
        check_range("finalists.learning_rate", self.learning_rate, 0, above=True)
        check_range("finalists.row_length", self.row_length, 2, MOST_TOKENS)
        check_range("finalists.rows", self.rows, 1, MOST_TOGETHER)


@dataclass(frozen=True)
class EvaluateSettings:
    """Measurements for the report's table.

    Attributes:
      problems: problems per task, each asked at every effort and answered greedily.
      baselines: names of the `search.solve.baselines` that are measured beside the child.
      rounds: interleaved rounds of throughput measurement on the devices present; 0 leaves it out, as does a search of
        several processes.
      seed: random seed; another one draws other problems.
    """

    baselines: tuple[str, ...] = ("uniform", "experts_only", "windows_only")
    problems: int = 100
    rounds: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("evaluate.problems", self.problems, 1, MOST_PROBLEMS)
        check_range("evaluate.rounds", self.rounds, 0, MOST_TOGETHER)
        check_range("evaluate.seed", self.seed, 0, MOST_SEED)
        _check_distinct("evaluate.baselines", self.baselines, may_be_empty=True)
        for name in self.baselines:
            check_choice("evaluate.baselines", name, BASELINES)


@dataclass(frozen=True)
class ChildSettings:
    """Settings of the child other than its blocks.

    Attributes:
      yarn_factor: YaRN factor of the child's rotary embedding; None keeps the parent's. A larger one steadies contexts
        near the end of the parent's range but needs distillation; the child's quality is measured with it.
    """

    yarn_factor: float | None = None

    def __post_init__(self) -> None:
        if self.yarn_factor is not None:
            check_range("child.yarn_factor", self.yarn_factor, 1)


@dataclass(frozen=True)
class Recipe:
    """One search.

    Attributes:
      parent: the parent's checkpoint directory; by default the small embedded parent.
      run: directory that the search writes everything to.
      traces, space, rank, score, solve, finalists, refine, evaluate: settings of the stages.
      scenario: the deployment.
      more_scenarios: further deployments that the same child must serve.
      target: limits that the child must meet in these scenarios, absolute or relative to its parent.
      child: settings of the child other than its blocks.
      mesh: devices that the search itself runs on.
      weights: how the parent's weights are held: "packed" (MXFP4), "dense", or "auto" (see `model.weights`).
      costs: "measured" times our own sub-blocks on the devices present, "xla" compiles them for the TPU that the
        scenario names, "roofline" models the scenario's hardware, and a path ending in .json names a costs.json that
        was timed elsewhere and is used as it is.
    """

    scenario: Scenario
    target: Target
    parent: Path = EMBEDDED_PARENT
    run: Path = Path("runs/tiny")
    traces: TraceSettings = field(default_factory=TraceSettings)
    space: SpaceSettings = field(default_factory=SpaceSettings)
    rank: RankSettings = field(default_factory=RankSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    solve: SolveSettings = field(default_factory=SolveSettings)
    finalists: FinalistSettings = field(default_factory=FinalistSettings)
    refine: RefineSettings = field(default_factory=RefineSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    more_scenarios: tuple[Scenario, ...] = ()
    child: ChildSettings = field(default_factory=ChildSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    weights: str = "auto"
    costs: str = "measured"

    def __post_init__(self) -> None:
        if self.costs not in ("measured", "xla", "roofline") and not self.costs.endswith(".json"):
            raise ConfigError(
                f"costs is {self.costs!r}, but must be measured, xla, roofline, or the path of a .json file"
            )
        check_weights(self.weights)
        names = [scenario.name for scenario in self.scenarios]
        if len(set(names)) != len(names):
            raise ConfigError(f"the scenarios are named {', '.join(names)}, but every name may come once only")
        self.target.check_scenarios(names)
        self.mesh.check_without("a search", "sequence")
        self.mesh.check_over_processes()
        if self.finalists.count and self.mesh.devices > 1:
            raise ConfigError(
                f"finalists.count is {self.finalists.count}, but finalists are trained on one device, and mesh has "
                f"{self.mesh.devices}; leave finalists.count at 0, or search on one device"
            )

    @property
    def trace_sets(self) -> dict[str, int]:
        """Problems of every trace set by its name; one to train on comes last, where finalists are trained."""
        sets = {name: getattr(self.traces, name) for name in TRACE_SETS}
        return sets | {TRAINING: self.finalists.problems} if self.finalists.count else sets

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        return (self.scenario, *self.more_scenarios)

    @property
    def external_costs(self) -> Path | None:
        """The file of costs that were timed elsewhere, if one is given."""
        return Path(self.costs) if self.costs.endswith(".json") else None

    def section(self, name: str) -> dict[str, object]:
        """One section as JSON values, by which changes of a stage's settings are detected."""
        return to_plain(getattr(self, name))


def _check_distinct(name: str, values: Sequence[object], may_be_empty: bool = False) -> None:
    """Raises `ConfigError` for a repeated value, and for no values unless `may_be_empty`."""
    if not values and not may_be_empty:
        raise ConfigError(f"{name} is empty, but must have at least one value")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{name} has {value!r} twice")
