"""Settings of a run that recipes and the command line leave open.

For the embedded parent the recipe `run-tiny` sets everything. For any other parent the user gives tasks and a
deployment, and the rest follows from these and from the checkpoint: `derived` in the settings lists what, and why.
Settings that are given take precedence. Memory is that of the devices present or, in a dry run and with several
processes, of the deployment's devices, so that a plan for a GPU host can be made on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle_jax.config import ModelConfig, cache_bytes
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.costs.deployments import get_scenario
from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.evaluate.accuracy import DISJOINT_SPLITS, UNSEEN, QuestionSet
from puzzle_jax.evaluate.settings import every_effort
from puzzle_jax.run.places import FINAL, stage_paths
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from puzzle_jax.search.recipe_file import is_embedded_parent
from puzzle_jax.settings.fields import Setting, settings_of
from puzzle_jax.settings.files import RECIPES, read_recipe, recipe_names, recipe_path
from puzzle_jax.settings.forms import formed
from puzzle_jax.tasks import EFFORTS, Chat, FiniteTask, check_effort, get_task

EMBEDDED_RECIPE = "run-tiny"
SECTIONS = ("search", "traces", "distill", "accuracy", "length", "average", "evaluate")

_VERBS = {"search": "search", "distill": "distill", "accuracy": "grpo", "length": "grpo"}
"""The verb whose recipes a section may name."""

_RECIPES = {
    "search": "gpt-oss-20b-1xh100",
    "distill": "distill-gpt-oss-120b",
    "accuracy": "grpo-gpt-oss-puzzle-88b",
    "length": "grpo-gpt-oss-puzzle-88b",
}
"""Recipes that a run of the user's own parent starts from, for the methods but not the devices."""

_OF_OTHERS = {
    "search": ("parent", "run", "mesh", "weights", "traces", "scenario", "more_scenarios", "target"),
    "distill": ("data", "loop", "mesh"),
    "accuracy": ("prompts", "rollout", "update", "loop", "mesh"),
    "length": ("prompts", "rollout", "update", "loop", "mesh"),
}
"""Parts of these recipes that are left out, since they are made for other tasks and machines."""

_TASKS, _PROBLEMS = 64, 2000
"""Problems of an endless task whose prompts are measured, and that the parent answers for distillation."""

_STEP_TOKENS, _PASSES, _STEPS = 1 << 18, 4, 20
"""Most tokens in a step of distillation, passes over the answers, and fewest steps."""

_ROUNDED, _MOST_TOGETHER = 128, 256
_CACHE_SHARE = 0.4
"""Share of the memory left beside the weights that KV caches of answers may take."""


def starting_fields(given: Mapping[str, Any], recipe: str | None, runs: bool) -> dict[str, Any]:
    """Values of fields that are not given, by dotted name.

    Args:
      given: values of recipes and the command line, by dotted name.
      recipe: the last recipe that was named.
      runs: False where settings are only shown.

    Raises `ConfigError` where a parent of the user's own comes without what only the user can know, and where a path
    from one stage to another is given.
    """
    from puzzle_jax.run.settings import RunSettings

    settings = settings_of(RunSettings)
    embedded = is_embedded_parent(given.get("parent", EMBEDDED_PARENT))
    fields: dict[str, Any] = {}

    def take(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            fields.update(formed(value, name, settings, ""))

    if embedded:
        road = read_recipe(RECIPES / f"{EMBEDDED_RECIPE}.yaml")
        take(_of_recipes(road["recipes"] | dict(given.get("recipes", {})), {}))
        take(road)
    else:
        named = dict(given.get("recipes", {}))
        take(_of_recipes({section: name for section, name in _RECIPES.items() if section not in named}, _OF_OTHERS))
        take(_of_recipes(named, {"search": _OF_OTHERS["search"][:2]}))
    if not runs:
        return fields
    found = _Derived(settings, fields, given, embedded)
    take(found.fields())
    return fields | {"derived": found.reasons}


def _of_recipes(recipes: Mapping[str, str], without: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The fields of recipes by section; raises `ConfigError` for an unknown section or recipe."""
    found = {}
    for section, name in recipes.items():
        if section not in SECTIONS:
            raise ConfigError(f"recipes names {shown(section)}, but must be of {', '.join(SECTIONS)}")
        path = recipe_path(name, recipe_names(_VERBS.get(section)))
        left_out = (*without.get(section, ()), *(("parent", "run") if section == "search" else ()))
        found |= {f"{section}.{key}": value for key, value in read_recipe(path).items() if key not in left_out}
    return found


@dataclass
class _Derived:
    """The settings that follow from those that are known.

    Attributes:
      settings: all settings of a run.
      base: fields set by recipes.
      given: fields set by the user, which take precedence.
      embedded: whether the parent is the embedded one.
      reasons: what was derived and why, by dotted name.
    """

    settings: Mapping[str, Setting]
    base: Mapping[str, Any]
    given: Mapping[str, Any]
    embedded: bool
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._new: dict[str, Any] = {}

    def fields(self) -> dict[str, Any]:
        """All derived fields."""
        self._paths()
        self._check()
        self._check_rows()
        if not self.embedded:
            self._deployment()
            self._questions()
        self._shared()
        if not self.embedded:
            self._sizes()
        return self._new

    def known(self, name: str, default: Any = None) -> Any:
        """The current value of a field."""
        for source in (self.given, self._new, self.base):
            if name in source:
                return source[name]
        return default

    def put(self, name: str, value: Any, why: str = "", over: bool = False) -> None:
        """Sets a field that is not given; replaces a recipe's value only with `over`."""
        if name in self.given or name in self._new or (name in self.base and not over):
            return
        self._new[name] = value
        if why:
            self.reasons[name] = f"{_written(value)}: {why}"

    # Paths ----------------------------------------------------------------------------------------------------------

    @cached_property
    def parent(self) -> Path:
        return Path(str(self.known("parent", EMBEDDED_PARENT)))

    def _paths(self) -> None:
        """Sets where each stage finds what the stages before it have made."""
        if "run" not in self.given and not self.embedded:
            self._new["run"] = f"runs/{self.parent.resolve().name}"
        run = Path(str(self.known("run", "runs/road")))
        paths = stage_paths(self.parent, run, control=self.known("control", True))
        for name, path in paths.items():
            if name in self.given and self.given[name] != path:
                raise ConfigError(
                    f"{name} is {shown(self.given[name])}, but a run gives its stages their places itself ({path}); "
                    "leave it out"
                )
        self._new |= paths
        self.put("evaluate.cache_dtypes", {FINAL: "float8_e4m3fn"})

    def _check(self) -> None:
        """Raises `ConfigError`, naming the fields, where something is missing that only the user can know."""
        if self.embedded:
            return
        missing = []
        if not self.known("tasks"):
            missing.append("tasks (what it shall be good at: .jsonl files, reasoning-gym:FAMILY)")
        if self.known("scenario") is None and self.known("search.scenario.input_tokens") is None:
            missing.append("scenario (the deployment, such as h100x8-64k, or a YAML file)")
        if missing:
            raise ConfigError(f"a run of {self.parent} needs {' and '.join(missing)}")

    def _check_rows(self) -> None:
        """Raises `ConfigError` for a file with too few rows to fill each of the splits that stages draw from."""
        for name in self.known("tasks"):
            if isinstance(get_task(name), FiniteTask):
                for split in (*DISJOINT_SPLITS, UNSEEN):
                    QuestionSet((name,), self.efforts, 1, split).questions()

    # The parent and its machine -------------------------------------------------------------------------------------

    @cached_property
    def description(self) -> Description:
        return describe_checkpoint(self.parent)

    @property
    def config(self) -> ModelConfig:
        return self.description.config

    @cached_property
    def machine(self) -> tuple[int, int]:
        """The number of devices that a process of the run has, and the memory of each in bytes."""
        hardware = HARDWARE.get(self.scenario.hardware)
        elsewhere = self.known("dry_run") or self.known("mesh.processes", 1) > 1
        if elsewhere and hardware is not None:
            return self.scenario.devices, int(hardware.memory_bytes)
        import jax

        from puzzle_jax.model.weights import device_memory

        count = jax.local_device_count() if jax.default_backend() != "cpu" else 1
        return count, device_memory()

    @cached_property
    def scenario(self) -> Scenario:
        """The deployment, as far as it is known."""
        known = {name: self.known(f"search.scenario.{name}") for name in asdict(Scenario("known", 1, 1))}
        return Scenario(**{"name": "serving", **{name: value for name, value in known.items() if value is not None}})

    def _deployment(self) -> None:
        """Sets the scenario that is named, a target, and the devices of the run."""
        text = self.known("scenario")
        if text is not None:
            for name, value in asdict(get_scenario(text)).items():
                self.put(f"search.scenario.{name}", value, over=True)
        else:
            self.put("search.scenario.name", "serving")
        if not any(name.startswith("search.target.") for name in (*self.given, *self.base)):
            self.put("search.target.max_expert_bytes_ratio", 0.75, "no target was given")
        local = self.scenario.hardware == "local"
        self.put("search.costs", "measured" if local else "roofline", "as the deployment's hardware is", over=True)
        devices, _ = self.machine
        if devices > 1 and not any(name.startswith("mesh.") for name in self.given):
            self.put("mesh.model", devices, "all devices of this host")

    # Questions ------------------------------------------------------------------------------------------------------

    @cached_property
    def efforts(self) -> tuple[str, ...]:
        given = [check_effort(effort) for effort in self.known("efforts", EFFORTS)]
        return tuple(effort for effort in EFFORTS if effort in given)

    @cached_property
    def limits(self) -> dict[str, int]:
        """The limit of an answer by effort. Raises `ConfigError` for an effort without one."""
        return self._by_effort("max_tokens")

    def _by_effort(self, name: str) -> dict[str, int]:
        value, found = every_effort(self.known(name), name), {}
        for effort in self.efforts:
            number = str(value.get(effort)) if isinstance(value, Mapping) else ""
            if not number.isdecimal():
                raise ConfigError(
                    f"{name} is {shown(value)}, which has no whole number for effort {effort!r}; "
                    "give each of efforts one, or a number for all"
                )
            found[effort] = int(number)
        return found

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt: over all rows of a finite task; for endless ones, a quarter more than seen."""
        chat, longest = Chat.load(self.parent), 0.0
        for name in self.known("tasks"):
            task = get_task(name)
            finite = isinstance(task, FiniteTask)
            asked = QuestionSet((name,), self.efforts, task.size if finite else _TASKS, "evaluation").questions()
            seen = max(len(chat.prompt_tokens(problem.prompt, effort)) for problem, effort in asked)
            longest = max(longest, seen if finite else 1.25 * seen)
        return round(longest)

    def _questions(self) -> None:
        """Sets the limits of answers and the numbers of problems."""
        if not self.known("max_tokens"):
            room = self.config.max_position - self.prompt_tokens
            high = min(self.scenario.output_tokens, room)
            limits = {"low": high // 16, "medium": high // 4, "high": high}
            found = {effort: max(1, limits[effort]) for effort in self.efforts}
            self.put("max_tokens", found, "the deployment's output tokens at high effort, less at lower ones")
        tasks = [get_task(name) for name in self.known("tasks")]
        finite = [task.size for task in tasks if isinstance(task, FiniteTask)]
        if finite:
            why = "a sixth of each file's rows is for training, and another for judging"
            self.put("traces.problems", max(1, max(finite) // 6), why)
            self.put("evaluate.rows", "unseen", why)
            self.put("evaluate.problems", max(len(tasks), sum(max(1, size // 6) for size in finite)))
        self.put("traces.problems", _PROBLEMS)
        self.put("average.problems", 100)
        self.put("average.weights", [0.0, 0.25, 0.5, 0.75, 1.0])

    def _shared(self) -> None:
        """Copies top-level settings into the sections, over those of a recipe only where the user gave them."""
        tasks, efforts, limits = self.known("tasks"), list(self.known("efforts", EFFORTS)), self.limits
        every = {
            "tasks": {f"{name}.tasks": list(tasks) for name in ("search.traces", "traces", "average", "evaluate")}
            | {f"{name}.prompts.tasks": dict.fromkeys(tasks, 1.0) for name in ("accuracy", "length")},
            "efforts": {f"{name}.efforts": efforts for name in ("search.traces", "traces", "average", "evaluate")}
            | {f"{name}.prompts.efforts": dict.fromkeys(efforts, 1.0) for name in ("accuracy", "length")},
            "max_tokens": {f"{n}.max_tokens": dict(limits) for n in ("search.traces", "traces", "average", "evaluate")}
            | {f"{name}.rollout.max_tokens": dict(limits) for name in ("accuracy", "length")},
            "seed": {
                f"{name}.seed": self.known("seed", 0)
                for name in ("search.traces", "traces", "distill", "accuracy", "length", "average", "evaluate")
            }
            | {f"{name}.prompts.seed": self.known("seed", 0) for name in ("accuracy", "length")},
            "weights": {
                f"{name}.weights": self.known("weights", "auto")
                for name in ("search", "traces", "distill", "accuracy", "length", "evaluate")
            },
        }
        for top, fields in every.items():
            for name, value in fields.items():
                self.put(name, value, over=top in self.given)
        self._meshes()

    def _meshes(self) -> None:
        """Sets the sections' meshes: the top-level mesh, without the axes that a stage does not support."""
        shape = {axis: self.known(f"mesh.{axis}", 1) for axis in ("data", "sequence", "model", "processes")}
        given = any(name.startswith("mesh.") for name in self.given)
        for section in ("search", "traces", "distill", "accuracy", "length"):
            for axis, size in shape.items():
                has = axis not in {"search": ("sequence",), "traces": ("sequence", "processes")}.get(section, ())
                self.put(f"{section}.mesh.{axis}", size if has else 1, over=given)

    # Sizes ----------------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.prompt_tokens + max(self.limits[effort] for effort in self.efforts)

    def _cache_memory(self, devices: int) -> int:
        """Bytes for KV caches of answers on this many devices, which together hold the weights once."""
        weights = sum(spec.nbytes for spec in self.description.tensors.values())
        return max(1, int(_CACHE_SHARE * (devices * self.machine[1] - weights)))

    def _sizes(self) -> None:
        """Sets rows, batches and steps that fit the context and the memory."""
        span = self.known("mesh.sequence", 1) * _ROUNDED
        length = min(-(-self.longest // span) * span, self.config.max_position)
        why = f"prompts of up to {self.prompt_tokens} tokens with the longest answers"
        for name in ("distill.data", "accuracy.update", "length.update"):
            self.put(f"{name}.row_length", length, why)
        rows = self.known("mesh.data", 1)
        for name in ("distill.data", "accuracy.update", "length.update"):
            self.put(f"{name}.rows", rows)
        answered = {e: many * len(self.known("tasks")) for e, many in self._by_effort("traces.problems").items()}
        tokens = sum(many * (self.prompt_tokens + self.limits[effort] / 2) for effort, many in answered.items())
        micro = max(1, min(_STEP_TOKENS, int(tokens) // _STEPS) // (length * rows))
        self.put("distill.data.micro_batches", micro, f"at most {_STEP_TOKENS:,} tokens in a step")
        self.put("distill.data.heldout", max(1, min(512, sum(answered.values()) // 8)), over=True)
        steps = max(_STEPS, round(_PASSES * tokens / (length * rows * micro)))
        self.put("distill.loop.steps", steps, f"{_PASSES} passes over about {tokens:,.0f} tokens of answers")
        warmup = min(self.known("distill.optimizer.warmup_steps", 0), self.known("distill.loop.steps") // 10)
        self.put("distill.optimizer.warmup_steps", warmup, over=True)
        for name in ("accuracy", "length"):
            self.put(f"{name}.loop.steps", 100)
            self.put(f"{name}.loop.save_every", 10)
            self.put(f"{name}.loop.evaluate_every", 25)
        self.put("length.loss.length_bonus", 0.3, "right answers earn more the shorter they are")
        self.put("length.loss.length_penalty", 0.1)
        why = f"caches of {self.longest:,} tokens in {_CACHE_SHARE:.0%} of the memory beside the weights"
        together = self._together(self.known("mesh.data", 1) * self.known("mesh.model", 1))
        for name in ("search.traces.batch_size", "traces.batch_size", "accuracy.rollout.slots", "length.rollout.slots"):
            self.put(name, together, why)
        for name in ("average.batch_size", "evaluate.slots"):
            self.put(name, self._together(1), f"{why}, on one device")
        self.put("evaluate.cache_memory", self._cache_memory(1), f"{_CACHE_SHARE:.0%} of one device's, likewise")
        self.put("evaluate.scenarios", {self.scenario.name: self._measured_lengths()})

    def _together(self, devices: int) -> int:
        """The number of answers that are generated together on this many devices."""
        one = cache_bytes(self.config, self.longest, 2)
        return max(1, min(_MOST_TOGETHER, self._cache_memory(devices) // one))

    def _measured_lengths(self) -> list[int]:
        """Input and output tokens of the deployment, as far as the context holds both."""
        inputs = min(self.scenario.input_tokens, self.config.max_position // 2)
        return [inputs, min(self.scenario.output_tokens, self.config.max_position - inputs)]


def _written(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_written(of)}" for key, of in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
