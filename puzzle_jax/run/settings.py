"""All settings of a run of the whole pipeline, in one frozen tree: each section is the recipe of its own verb.

A section can therefore be given to its verb alone, and a field means the same here as there. What the sections share
(tasks, efforts, limits, devices) is set once at the top level, and `run.derived` copies it into them, with the paths
from one stage to the next and all that follows from the parent and the deployment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from puzzle_jax.commands import did_you_mean
from puzzle_jax.errors import MOST_SEED, ConfigError, check_range, shown
from puzzle_jax.evaluate.settings import BY_EFFORT, Settings
from puzzle_jax.model.weights import check_weights
from puzzle_jax.run.places import STAGES
from puzzle_jax.search.recipe import EMBEDDED_PARENT, Recipe
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.tasks import EFFORTS, check_effort
from puzzle_jax.train.average.command import AverageSettings
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.traces.command import AnswersSettings

_RECIPE = {"recipe": True}
"""Metadata of a section that is the recipe of a verb of its own."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run of the pipeline.

    Attributes:
      parent: checkpoint directory; by default the embedded small parent.
      run: directory of everything that is written.
      tasks: tasks of all stages: families, or .jsonl files of your own prompts and answers, whose rows are divided
        between selection, training and evaluation.
      efforts: reasoning efforts.
      max_tokens: token limit of an answer by effort, or one number for all; by default the deployment's output tokens
        at high effort, a quarter of them at medium and a sixteenth at low.
      scenario: the deployment, a name such as h100x8-64k or a YAML file; `search.scenario` has its fields.
      recipes: recipes that sections start from, by section (search=gpt-oss-20b-1xh100,distill=mine.yaml).
      seed: seed of answers and of training.
      mesh: devices of all stages; a section's own mesh takes precedence.
      weights: how weights are held: packed, dense, or auto (see `model.weights`).
      control: whether to give the parent the accuracy policy's training too, so that the final table shows what the
        training alone does.
      search, traces, distill, accuracy, length, average, evaluate: settings of the stages, as their verbs have them.
      stage: one stage, or "all".
      dry_run: whether to run nothing, and only write the settings and what every stage needs.
      price_per_gpu_hour: price of an hour of one device, in any currency, for a dry run.
      derived: what was filled in and why, by setting; the run writes it itself.
    """

    parent: Path = EMBEDDED_PARENT
    run: Path = Path("runs/road")
    tasks: tuple[str, ...] = ()
    efforts: tuple[str, ...] = EFFORTS
    max_tokens: Mapping[str, int] = field(default_factory=dict, metadata=BY_EFFORT)
    scenario: str | None = None
    recipes: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    mesh: MeshSettings = field(default_factory=MeshSettings)
    weights: str = "auto"
    control: bool = True
    search: Recipe = field(metadata=_RECIPE)
    traces: AnswersSettings = field(metadata=_RECIPE)
    distill: DistillRecipe = field(metadata=_RECIPE)
    accuracy: GrpoRecipe = field(metadata=_RECIPE)
    length: GrpoRecipe = field(metadata=_RECIPE)
    average: AverageSettings = field(metadata=_RECIPE)
    evaluate: Settings = field(metadata=_RECIPE)
    stage: str = "all"
    dry_run: bool = False
    price_per_gpu_hour: float | None = None
    derived: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for effort in (*self.efforts, *self.max_tokens):
            check_effort(effort)
        check_range("seed", self.seed, 0, MOST_SEED)
        check_weights(self.weights)
        if self.price_per_gpu_hour is not None:
            check_range("price_per_gpu_hour", self.price_per_gpu_hour, 0)
        names = ("all", *self.stages)
        if self.stage not in names:
            hint = did_you_mean(self.stage, names)
            raise ConfigError(f"stage is {shown(self.stage)}, but must be one of {', '.join(names)}{hint}")

        for name in ("search", "distill", "accuracy", "length"):
            processes = getattr(self, name).mesh.processes
            if self.stage == "all" and processes != self.mesh.processes:
                raise ConfigError(
                    f"{name}.mesh.processes is {processes}, but mesh.processes {self.mesh.processes}: all stages run "
                    "in the same processes; start one stage alone (stage) where it shall have others"
                )

    @property
    def joined_mesh(self) -> MeshSettings:
        """The mesh whose processes run together: that of the one stage to run, where it has a mesh of its own."""
        section = getattr(self, "accuracy" if self.stage == "control" else self.stage, None)
        return getattr(section, "mesh", self.mesh)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return tuple(name for name in STAGES if name != "control" or self.control)

    @property
    def control_recipe(self) -> GrpoRecipe:
        """The accuracy policy's recipe, for training the parent."""
        return replace(self.accuracy, model=self.parent, out=self.run / "control")
