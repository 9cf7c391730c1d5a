"""The deployments that a child is made for, and the targets that it must reach in them.

`puzzle_jax.costs.deployments` resolves the names of usual deployments and reads files of others.
Left out: pipeline parallelism, prompts and answers of mixed lengths, and requests that share a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, NoReturn

from puzzle_jax.errors import MOST_TIMES, ConfigError, check_range, shown
from puzzle_jax.numeric import LARGEST, Number

_COUNTS = ("input_tokens", "output_tokens", "devices", "expert_parallel", "batch", "tensor_parallel", "max_batch")


@dataclass(frozen=True)
class Scenario:
    """One deployment of the model.

    The devices form `replicas` groups of `tensor_degree` devices. Within a group, attention, head and the KV cache of
    its requests are split by tensor parallelism. Experts are split in the same way or, with `expert_parallel` above 1,
    whole experts are spread over that many devices, which then exchange tokens.

    Attributes:
      name: name of the scenario, made of letters, digits, "-" and "_".
      input_tokens: prompt length of every request.
      output_tokens: tokens generated for every request.
      batch: requests that run together on all devices; None leaves it open, up to what memory and `max_batch` allow.
      kv_bytes_per_value: bytes per cached value: 4 (float32), 2 (bfloat16) or 1 (FP8).
      hardware: a name of `hardware.HARDWARE`, or "local" for the devices present.
      devices: number of devices that share the work.
      tensor_parallel: devices in one group; None means all of them.
      expert_parallel: 1, or how many devices one copy of the experts is spread over, a multiple of `tensor_parallel`.
      max_batch: most requests that the engine runs together if the batch is open; None takes the assumptions' value.
      usable_memory: share of a device's memory for weights, caches and activations; None takes the assumptions' value.
    """

    name: str
    input_tokens: int
    output_tokens: int
    batch: int | None = None
    kv_bytes_per_value: int = 2
    hardware: str = "local"
    devices: int = 1
    tensor_parallel: int | None = None
    expert_parallel: int = 1
    max_batch: int | None = None
    usable_memory: Number | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ConfigError(f"scenario name is {self.name!r}, but must be of letters, digits, '-' and '_'")
        for count in _COUNTS:
            if (value := getattr(self, count)) is not None:
                check_range(f"{count} of scenario {self.name!r}", value, 1, MOST_TIMES)
        if self.usable_memory is not None:
            check_range(f"usable_memory of scenario {self.name!r}", self.usable_memory, 0, 1, above=True)
        if self.kv_bytes_per_value not in (1, 2, 4):
            self._refuse("kv_bytes_per_value", "1, 2 or 4")
        if not self.hardware:
            self._refuse("hardware", "a name")
        if self.devices % self.tensor_degree:
            self._refuse("tensor_parallel", f"a divisor of devices ({self.devices})")
        if self.devices % self.expert_degree or self.expert_degree % self.tensor_degree:
            self._refuse(
                "expert_parallel",
                f"1, or a multiple of tensor_parallel ({self.tensor_degree}) that divides devices ({self.devices})",
            )

    def _refuse(self, field: str, rule: str) -> NoReturn:
        raise ConfigError(f"{field} of scenario {self.name!r} is {shown(getattr(self, field))}, but must be {rule}")

    @property
    def context_tokens(self) -> int:
        """Positions of a request at its final length."""
        return self.input_tokens + self.output_tokens

    @property
    def tensor_degree(self) -> int:
        """Devices of one group."""
        return self.devices if self.tensor_parallel is None else self.tensor_parallel

    @property
    def replicas(self) -> int:
        """Groups, each with its own requests and its own copy of attention, embedding and head."""
        return self.devices // self.tensor_degree

    @property
    def expert_degree(self) -> int:
        """Devices that hold one copy of the experts."""
        return self.tensor_degree if self.expert_parallel == 1 else self.expert_parallel

    @property
    def expert_copies(self) -> int:
        return self.devices // self.expert_degree

    @property
    def given_batch(self) -> int:
        """The batch. Raises `ConfigError` if it is open."""
        if self.batch is None:
            self._refuse("batch", "given here")
        return self.batch

    def memory_bytes(self, *, dense: int, experts: int, kv: int, batch: int) -> int:
        """Bytes on all devices: dense x replicas + experts x copies + batch x KV bytes of a request at full length.

        Routers count as experts. Left out: caches that are shared, or paged at a finer grain than a request, in which
        requests that are still short leave room for others.
        """
        return dense * self.replicas + experts * self.expert_copies + batch * kv

    def largest_batch(self, *, dense: int, experts: int, kv: int, room: int, at_most: int) -> int:
        """The most requests, up to `at_most`, whose caches fit into `room` bytes beside the weights; 0 if none fits."""
        free = room - self.memory_bytes(dense=dense, experts=experts, kv=kv, batch=0)
        return max(0, min(free // kv, at_most))

    def at(self, batch: int) -> Scenario:
        """Returns the same deployment with the given batch."""
        return replace(self, batch=batch)


def candidate_batches(largest: Sequence[int]) -> tuple[int, ...]:
    """Batches worth trying: the `largest` that fit some architectures, and all powers of two and midpoints between
    them up to the greatest of these."""
    top = max(largest)
    powers = [2**exponent for exponent in range(top.bit_length())]
    middles = [3 * power // 2 for power in powers if power > 1]
    return tuple(sorted({*largest, *(batch for batch in (*powers, *middles) if batch <= top)} - {0}))


Amount = Number | dict[str, Number] | None
"""One limit for every scenario, or limits by scenario name."""


class Group(NamedTuple):
    """Traces of one task, of one effort, or of one task at one effort; None stands for all tasks or all efforts."""

    task: str | None
    effort: str | None

    @property
    def name(self) -> str:
        """The task, the effort, or "task/effort"."""
        return "/".join(part for part in self if part is not None)

    def holds(self, task: str, effort: str) -> bool:
        """Returns whether a trace of this task and effort belongs to the group."""
        return self.task in (None, task) and self.effort in (None, effort)


class KlLimit(NamedTuple):
    """One limit on the child's KL over a group of traces; `form` is the field of `MaxKl` that sets the value."""

    group: Group
    form: str
    value: Number


@dataclass(frozen=True)
class MaxKl:
    """Limits of the child's KL over groups of traces, so that a low mean cannot hide that one task or effort is lost.

    Every field maps names of groups to limits. A name is that of an effort, of a task, or "task/effort"; `efforts` and
    `tasks` stand for every effort and every task that is not named itself. The KL of a group is the mean over its
    completion tokens.

    Attributes:
      nats: nats per token, such as `{high: 0.05}`.
      times_mean: times the child's KL over all tokens, such as `{tasks: 2, recall: 1.5}`.
      share_of_entropy: share of the parent's own mean entropy on the group's completion tokens, in nats per token.
    """

    nats: dict[str, Number] = field(default_factory=dict)
    times_mean: dict[str, Number] = field(default_factory=dict)
    share_of_entropy: dict[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for form, values in self._forms().items():
            for name, value in values.items():
                check_range(f"max_kl.{form}.{name}", value, 0, LARGEST, above=True)

    @property
    def is_empty(self) -> bool:
        return not any(self._forms().values())

    def _forms(self) -> dict[str, dict[str, Number]]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def limits(self, kinds: Sequence[tuple[str, str]]) -> tuple[KlLimit, ...]:
        """The limits as they apply to traces of these kinds (task, effort).

        Raises `ConfigError` for a name that is none of their tasks and efforts.
        """
        tasks, efforts = (tuple(dict.fromkeys(names)) for names in zip(*kinds, strict=True))
        found = []
        for form, values in self._forms().items():
            of_form: dict[Group, Number] = {}
            for name in sorted(values, key=lambda name: name not in ("efforts", "tasks")):  # those named come last
                if name == "efforts":
                    groups = [Group(None, effort) for effort in efforts]
                elif name == "tasks":
                    groups = [Group(task, None) for task in tasks]
                else:
                    groups = [_group(f"target.max_kl.{form}", name, kinds, tasks, efforts)]
                of_form |= dict.fromkeys(groups, values[name])
            found += [KlLimit(group, form, value) for group, value in of_form.items()]
        return tuple(found)


def _group(
    where: str, name: str, kinds: Sequence[tuple[str, str]], tasks: Sequence[str], efforts: Sequence[str]
) -> Group:
    if name in efforts:
        return Group(None, name)
    if name in tasks:
        return Group(name, None)
    task, _, effort = name.rpartition("/")
    if (task, effort) in kinds:
        return Group(task, effort)
    raise ConfigError(
        f"{where} names {shown(name)}, but must name efforts, tasks, an effort ({', '.join(efforts)}), a task "
        f"({', '.join(tasks)}), or both as in {'/'.join(kinds[0])}"
    )


@dataclass(frozen=True)
class Target:
    """Limits that the child must meet; None means no limit. A limit that depends on the scenario holds in every one,
    or is given by scenario name: `min_speedup: {long: 1.5, short: 1.2}`.

    Attributes:
      max_expert_bytes_ratio: bytes of experts and routers relative to the parent's, in (0, 1].
      min_speedup: tokens per second relative to the parent's, at least 1.
      max_kv_bytes_ratio: KV-cache bytes of a request at its final length relative to the parent's, in (0, 1].
      min_tokens_per_second: generated tokens per second of all devices.
      max_memory_bytes: bytes of weights, and of the whole batch's caches at their final length, on all devices.
      max_seconds_to_first_token: seconds until the whole batch has its first token.
      max_seconds_per_token: seconds of one decoding step.
      max_kl: limits of the child's KL by task and effort, beside at least one of the limits above.
    """

    max_expert_bytes_ratio: Number | None = None
    min_speedup: Amount = None
    max_kv_bytes_ratio: Amount = None
    min_tokens_per_second: Amount = None
    max_memory_bytes: Amount = None
    max_seconds_to_first_token: Amount = None
    max_seconds_per_token: Amount = None
    max_kl: MaxKl = field(default_factory=MaxKl)

    def __post_init__(self) -> None:
        for name, value in self._values():
            limited = name.partition(".")[0]
            if limited.endswith("_ratio"):
                check_range(name, value, 0, 1, above=True)
            elif limited == "min_speedup":
                check_range(name, value, 1, LARGEST)
            else:
                check_range(name, value, 0, LARGEST, above=True)
        if not any(self._values()):
            alone = "" if self.max_kl.is_empty else " apart from max_kl"
            raise ConfigError(
                f"the target is empty{alone}, but needs one of {', '.join(self._amounts())}: "
                "without a limit on costs the best child is the parent"
            )

    def _values(self) -> Iterator[tuple[str, Number]]:
        """Every limit on costs that is given, under its name or "name.scenario"."""
        for name, value in self._amounts().items():
            if isinstance(value, dict):
                yield from ((f"{name}.{scenario}", limit) for scenario, limit in value.items())
            elif value is not None:
                yield name, value

    def _amounts(self) -> dict[str, Amount]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "max_kl"}

    def limit(self, name: str, scenario: str) -> Number | None:
        """The limit that a field sets in a scenario."""
        value = getattr(self, name)
        return value.get(scenario) if isinstance(value, dict) else value

    def check_scenarios(self, names: Sequence[str]) -> None:
        """Raises `ConfigError` if a limit is for a scenario that is not among `names`."""
        for name, value in self._values():
            of = name.partition(".")[2]
            if of and of not in names:
                raise ConfigError(f"target.{name} is {value!r}, but the scenarios are {', '.join(names)}")
