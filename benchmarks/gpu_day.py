"""Everything to measure on a GPU that is available for a few minutes, the most informative steps first.

    python benchmarks/gpu_day.py --out DIR [--only doctor,kernels] [--minutes 8] [--dry]

    doctor            self-checks of kernels; what serves each operation of gpt-oss-120b, and why others do not
    kernels           errors and times of all kernels beside XLA, tokamax and their floors (benchmarks/kernels.py)
    search_tiny       a search on the embedded parent whose choice depends on no clock, so that its child can be
                      compared with a CPU's (JAX_PLATFORMS=cpu, --only search_tiny)
    search_20b_width  a search with measured costs on two random layers of gpt-oss-20b's width
    distill_step      a few steps of distillation of a child of the same two layers
    grpo_step         a few steps of reinforcement learning of that child, with random rewards
    tiles             a search for tile sizes (benchmarks/kernels.py --tune)

Every step is a process of its own (`--step`), which is killed with everything that it started when its share of the
time is over. A kernel that hangs or crashes its process therefore costs only its own step. Time that a step does not
use goes to later steps. A step that was killed is reported with what it had found by then.

When a step ends, DIR/results.jsonl gets a line and DIR/report.md is rewritten; DIR/STEP.log has what the step printed.
`--dry` does the same on a CPU at the smallest sizes, to check that everything runs before a GPU is available;
`search_tiny` has no smaller size, so only its options are parsed.

Left out: any assessment of the results. The process that starts the steps does not import JAX.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from puzzle_jax.commands import guarded
from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import Json, read_json, write_beside

ROOT = Path(__file__).resolve().parents[1]
RESULTS, REPORT, VERDICTS = "results.jsonl", "report.md", "kernel_verdicts.json"
LOOK_SECONDS, REAP_SECONDS = 0.2, 10.0
"""Seconds between polls of a step, and for a killed process to end, which one stuck in a driver never does."""

ERROR_LINES = 15
now = time.monotonic


@dataclass(frozen=True)
class Step:
    """One thing to measure.

    Attributes:
      weight: its share of eight minutes, in seconds. The remaining time is divided in these proportions.
      run: called with DIR and whether the run is dry; measures in the step's own process and writes files to DIR.
      figures: called with DIR; returns what those files say, even if the step was killed.
      least: fewest seconds for which the step is started.
      parsed_when_dry: whether a dry run only parses the options of its command.
    """

    weight: float
    run: Callable[[Path, bool], None]
    figures: Callable[[Path], dict[str, Json]]
    least: float = 5.0
    parsed_when_dry: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended: a line of results.jsonl.

    Attributes:
      status: "ok", "failed", "timed out" or "skipped".
      limit_seconds: seconds that it was allowed to take.
      error: last lines of what it printed or why it did not start; empty if it succeeded.
    """

    step: str
    status: str
    seconds: float
    limit_seconds: float
    result: dict[str, Json] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Options:
    """Settings from the command line."""

    out: Path
    steps: tuple[str, ...]
    minutes: float
    dry: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps, or one of them in this process; returns the exit code."""
    return guarded("gpu_day.py", partial(_main, arguments), f"finished steps are in {RESULTS}")


def _main(arguments: Sequence[str] | None) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of everything that is written")
    parser.add_argument("--only", help="names of steps, with commas between them")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all steps may take together")
    parser.add_argument("--dry", action="store_true", help="smallest sizes, on a CPU")
    parser.add_argument("--step", choices=[*STEPS, MODEL], help="runs this step alone, here and without a limit")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    if given.step:
        run_here(given.step, out, given.dry)
        return
    measure(Options(out, _asked(given.only), _minutes(given.minutes), given.dry))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PuzzleError(message)


def _asked(only: str | None) -> tuple[str, ...]:
    """Names of the requested steps, in the order of `STEPS`."""
    asked = list(STEPS) if only is None else only.split(",")
    unknown = [name for name in asked if name not in STEPS]
    if unknown:
        raise PuzzleError(f"--only names {unknown[0]!r}, but the steps are {', '.join(STEPS)}")
    return tuple(name for name in STEPS if name in asked)


def _minutes(given: float) -> float:
    if not 0 < given < math.inf:
        raise PuzzleError(f"--minutes is {given}, but must be a number above 0")
    return given


# The steps in turn ----------------------------------------------------------------------------------------------------


def measure(options: Options) -> list[Outcome]:
    """Runs all requested steps and writes their results as they end.

    Raises PuzzleError if the directory already holds results.
    """
    if (options.out / RESULTS).exists():
        raise PuzzleError(f"{options.out} holds the results of an earlier run; name another directory with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    end = now() + 60 * options.minutes
    for index, name in enumerate(options.steps):
        weights = [STEPS[each].weight for each in options.steps[index:]]
        limit = max(0.0, end - now()) * weights[0] / sum(weights)
        print(f"{name:<18}", end="", flush=True)
        outcome = run_step(name, options, limit)
        outcomes.append(outcome)
        print(f"{outcome.status}, {outcome.seconds:.1f} of {limit:.0f} s", flush=True)
        with open(options.out / RESULTS, "a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        write_beside(options.out / REPORT, report(outcomes, options).encode())
    print(f"{options.out / REPORT}")
    return outcomes


def run_step(name: str, options: Options, limit: float) -> Outcome:
    """Runs a step in a process of its own for at most `limit` seconds; failures become part of the outcome."""
    step, log = STEPS[name], options.out / f"{name}.log"
    if limit < step.least:
        return Outcome(name, "skipped", 0.0, limit, error=f"{limit:.3g} s are left, and it needs {step.least:.3g}")
    began = now()
    try:
        code = run_child(command(name, options), log, limit)
    except OSError as error:
        return Outcome(name, "failed", now() - began, limit, error=str(error))
    seconds = now() - began
    try:
        result = step.figures(options.out)
    except Exception as error:  # a killed process may leave its files in any state
        result = {"unreadable": f"{type(error).__name__}: {error}"}
    if options.dry and step.parsed_when_dry:
        result = {"dry": "parsed only"}
    if code == 0:
        return Outcome(name, "ok", seconds, limit, result)
    lines = log.read_text(errors="replace").splitlines()[-ERROR_LINES:]
    status = "timed out" if code is None else "failed"
    return Outcome(name, status, seconds, limit, result, "\n".join(lines) or f"it ended with code {code}")


def command(name: str, options: Options) -> list[str]:
    """The command line of a step's own process."""
    dry = ["--dry"] if options.dry else []
    return [sys.executable, str(Path(__file__).resolve()), "--step", name, "--out", str(options.out), *dry]


def run_child(command: Sequence[str], log: Path, limit: float) -> int | None:
    """Runs a command; returns its exit code, or None if it did not finish within `limit` seconds.

    No process that it started and that stayed in its process group outlives it.
    """
    with open(log, "wb") as output:
        end = now() + limit
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and now() < end:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
            return process.poll()
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(REAP_SECONDS)


# The report -----------------------------------------------------------------------------------------------------------


def report(outcomes: Sequence[Outcome], options: Options) -> str:
    """All results so far, as markdown."""
    found = {outcome.step: outcome.result for outcome in outcomes}
    devices = found.get("doctor", {}).get("devices") or [found.get("kernels", {}).get("device", "device not known")]
    parts = [
        "# A day with a GPU" + (" (dry run on a CPU)" if options.dry else ""),
        "\n".join(
            [
                *(f"- {device}" for device in devices),
                *(f"- {name} {version}" for name, version in _versions().items()),
                f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {options.minutes:g} minutes at most",
            ]
        ),
        _table([_row(outcome) for outcome in outcomes]),
    ]
    for outcome in outcomes:
        parts.append(f"## {outcome.step}: {outcome.status}")
        parts += [_figure(name, value) for name, value in outcome.result.items()]
        parts += [f"```\n{outcome.error}\n```"] if outcome.error else []
    tried = verdicts(options.out)
    if len(tried) > len(found.get("doctor", {}).get("verdicts", [])):
        parts += ["## Kernels that were tried in all steps", _table(tried)]
    return "\n\n".join(parts) + "\n"


def _figure(name: str, value: Json) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{name}:\n\n{_table(value)}"
    return f"{name}: {_shown(value)}"


def _row(outcome: Outcome) -> dict[str, Json]:
    seconds, limit = round(outcome.seconds, 1), round(outcome.limit_seconds, 1)
    return {"step": outcome.step, "status": outcome.status, "seconds": seconds, "limit": limit}


def _table(rows: Sequence[Mapping[str, Json]]) -> str:
    """Rows as a markdown table, with a column for every name that occurs."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, ["---"] * len(columns), *([_shown(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _shown(value: Json) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("puzzle-jax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "tokamax"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# In a step's own process ----------------------------------------------------------------------------------------------


def run_here(name: str, out: Path, dry: bool) -> None:
    """Runs one step. Exits with the code of a command that fails."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PUZZLE_KERNEL_VERDICTS"] = str(out / VERDICTS)  # so that kernels are tried anew
    if dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    make_model(out, dry) if name == MODEL else STEPS[name].run(out, dry)


def call(*arguments: object, attempts: int = 1, output: Path | None = None, **environment: str) -> None:
    """Runs Python with these arguments; exits with its code if it fails.

    Args:
      attempts: most runs, as long as signals end them. A kernel that crashed one run is not tried by the next.
      output: file for its standard output.
    """
    line = [sys.executable, *map(str, arguments)]
    for left in reversed(range(attempts)):
        print(f"$ {shlex.join(line)}", flush=True)
        with nullcontext() if output is None else open(output, "wb") as file:
            code = subprocess.run(line, stdout=file, env={**os.environ, **environment}, cwd=ROOT).returncode
        if code >= 0 or not left:
            break
        print(f"ended by signal {-code}; once more", flush=True)
    if code:
        sys.exit(code if code > 0 else 128 - code)


verb = partial(call, "-m", attempts=3)
"""Runs a verb of the package, given its module and arguments."""


def doctor(out: Path, dry: bool) -> None:
    model = ROOT / "benchmarks" / "published" / "gpt-oss-120b.json"
    verb("puzzle_jax.doctor", "--model", model, "--json", output=out / "doctor.json")


def kernels(out: Path, dry: bool) -> None:
    sizes = ("--only", "experts", "--rounds", 1, "--small")
    if not dry:
        sizes = ("--only", "packed", "experts", "decode", "window", "chunk", "grouped", "--rounds", 3)
    call("benchmarks/kernels.py", "--json", out / "kernels.json", *sizes)


def tiles(out: Path, dry: bool) -> None:
    call("benchmarks/kernels.py", "--tune", "--json", out / "tiles.json", *(["--small"] if dry else []))


def search_tiny(out: Path, dry: bool) -> None:
    """Runs a search whose costs are modelled and whose target limits bytes, so that the child depends on no clock."""
    asked = ("--traces", "calibration=16,validation=8,confirmation=8,heldout=16")
    target = ("--target", "max_expert_bytes_ratio=0.65,min_speedup=1,max_kv_bytes_ratio={chat: 0.6}")
    costs = ("--costs", "roofline", "--scenario.hardware", "h100", "--refine.swaps", 0, "--solve.solutions", 4)
    judged = ("--evaluate", "problems=8,rounds=3,baselines=[]")
    last = ["--print_config"] if dry else []
    verb("puzzle_jax.search", "--recipe", "tiny", "--run", out / "search_tiny", *asked, *target, *costs, *judged, *last)


def search_20b_width(out: Path, dry: bool) -> None:
    parent = made_model(out, dry) / "parent"
    sizes = SMALL if dry else LARGE
    asked = f"tasks=chain,efforts=low,max_tokens={{low: {sizes.answer}}},batch_size={sizes.answers}"
    counts = ",".join(f"{name}={sizes.traces}" for name in ("calibration", "validation", "confirmation", "heldout"))
    space = ("--space.fractions", "1,0.75,0.5", "--space.windows", sizes.window)
    scenario = f"name=chat,input_tokens={sizes.input_tokens},output_tokens=16,batch={sizes.answers}"
    costs = ("--costs", "roofline", "--scenario.hardware", "h100") if dry else ("--costs", "measured")
    work = ("--solve.solutions", 2, "--refine", "rounds=0,swaps=0")
    judged = ("--evaluate", f"problems={sizes.traces},rounds={0 if dry else 3},baselines=[]")
    verb(
        *("puzzle_jax.search", "--parent", parent, "--run", out / "search_20b_width", "--traces", f"{asked},{counts}"),
        *(*space, "--scenario", scenario, "--target.max_expert_bytes_ratio", 0.8, *costs, *work, *judged),
    )


def distill_step(out: Path, dry: bool) -> None:
    model, sizes = made_model(out, dry), SMALL if dry else LARGE
    files = ("--parent", model / "parent", "--child", model / "child", "--traces", model / "traces.parquet")
    data = ("--data", f"row_length={sizes.row},rows={sizes.rows},heldout=2")
    loop = ("--loop", f"steps={sizes.steps},log_every=1", "--optimizer.learning_rate", 1e-4)
    verb("puzzle_jax.train", "distill", *files, "--out", out / "distill_step", *data, *loop)


def grpo_step(out: Path, dry: bool) -> None:
    model, sizes = made_model(out, dry), SMALL if dry else LARGE
    prompts = ("--prompts", f"tasks=chain,efforts=low,prompts={sizes.prompts},min_pass_rate=0,max_pass_rate=1")
    rollout = f"group=4,max_tokens={{low: {sizes.answer}}},slots={4 * sizes.prompts}"
    reward = ("--reward.function", f"{Path(__file__).resolve()}:random_reward")
    update = ("--update", f"row_length={sizes.answer + 128},rows={sizes.rows}")
    loop = ("--loop", f"steps={sizes.steps},log_every=1", "--monitoring", "problems=1,transcripts=0")
    verb(
        *("puzzle_jax.train", "grpo", "--model", model / "child", "--out", out / "grpo_step", *prompts),
        *("--rollout", rollout, *reward, *update, *loop),
    )


_REWARDS = random.Random(0)


def random_reward(answer: object, score: object) -> float:
    """A random reward, so that every group of a random model's answers has something to learn from."""
    return _REWARDS.random()


# The model of two layers ----------------------------------------------------------------------------------------------

MODEL, VOCABULARY = "model", 128  # the embedded parent's vocabulary size


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, which otherwise is gpt-oss-20b, and of what is run on it.

    Attributes:
      experts: experts of each layer; the child keeps half of them.
      traces: traces in each set of a search.
      answer, answers: tokens of an answer, and answers that are generated together.
      window: window offered to the search, and the child's in its second layer.
      row, rows: tokens of a training row, and rows of a step.
    """

    changes: dict[str, int]
    experts: int
    traces: int
    answer: int
    answers: int
    window: int
    input_tokens: int
    row: int
    rows: int
    prompts: int
    steps: int


LARGE = Sizes({}, 32, 8, 128, 32, 64, 1024, 2048, 4, 8, 5)
_SMALL_MODEL = dict(hidden_size=64, intermediate_size=32, num_heads=6, num_kv_heads=3, head_dim=10, experts_per_token=2)
SMALL = Sizes(_SMALL_MODEL, 8, 1, 8, 4, 24, 32, 64, 2, 1, 3)


def made_model(out: Path, dry: bool) -> Path:
    """Returns the directory of parent/, child/ and traces.parquet, created by the first step that needs it."""
    done = out / MODEL / "traces.parquet"
    if not done.exists():
        this = Path(__file__).resolve()
        call(this, "--step", MODEL, "--out", out, *(["--dry"] if dry else []), JAX_PLATFORMS="cpu")
    return done.parent


def make_model(out: Path, dry: bool) -> None:
    """Writes two layers of gpt-oss-20b with random weights and the embedded parent's tokens, a child, and traces.

    Experts are random bytes of MXFP4, since packing random numbers would take minutes.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from puzzle_jax.config import BlockConfig
    from puzzle_jax.convert_hf.configuration.config_json import parse_config
    from puzzle_jax.convert_hf.export import export_child, save_checkpoint
    from puzzle_jax.generate.traces import Trace, write_traces
    from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4
    from puzzle_jax.model.spec import ParamSpec, is_spec, param_specs
    from puzzle_jax.tasks.chat.embedded import chat_files

    sizes, source = SMALL if dry else LARGE, ROOT / "benchmarks" / "published" / "gpt-oss-20b.json"
    published = parse_config(read_json(source), source)
    blocks = tuple(replace(block, num_experts=sizes.experts) for block in published.blocks[:2])
    config = replace(published, blocks=blocks, vocab_size=VOCABULARY, **sizes.changes)
    rng = np.random.default_rng(0)

    def draw(spec: ParamSpec) -> Any:
        if spec.init != "normal":
            return np.full(spec.shape, float(spec.init == "ones"), np.float32)
        if spec.axes[0] == "experts":
            experts, inputs, outputs = spec.shape
            codes = rng.integers(0, 256, (experts, outputs, inputs // 2), np.uint8)
            exponent = round(math.log2(spec.fan_in**-0.5 / 2.9))  # 2.9 is the root mean square of the sixteen codes
            scales = jnp.full((experts, outputs, inputs // GROUP), 127 + exponent, jnp.uint8)
            return MXFP4(jnp.asarray(codes), scales)
        return rng.standard_normal(spec.shape, np.float32) * np.float32(spec.fan_in**-0.5)

    model = out / MODEL
    params = jax.tree.map(draw, param_specs(config), is_leaf=is_spec)
    save_checkpoint(model / "parent", config, params, config_base={}, extra_files=chat_files())
    half = sizes.experts // 2
    smaller = (BlockConfig(half, blocks[0].window), BlockConfig(half, sizes.window))
    kept = [sorted(rng.permutation(sizes.experts)[:half].tolist()) for _ in smaller]
    export_child(model / "parent", model / "child", config.with_blocks(smaller), kept, provenance={})
    words = rng.integers(0, VOCABULARY, (64, sizes.row - 1)).tolist()
    traces = [Trace("random", "low", n, {}, tuple(row[:8]), tuple(row[8:]), None, False) for n, row in enumerate(words)]
    write_traces(model / "traces.parquet", traces)


# What the files of a step say -----------------------------------------------------------------------------------------


def doctor_figures(out: Path) -> dict[str, Json]:
    """Returns what serves each operation, and the verdicts on kernels, which even a killed run leaves behind."""
    path = out / "doctor.json"
    found = read_json(path) if path.exists() and path.stat().st_size else {}
    served = [
        {"operation": each["what"], "served by": each["chosen"], "refusal": each["refusals"].get("mosaic_gpu")}
        for each in found.get("operations", [])
    ]
    return {"devices": found.get("devices", []), "operations": served, "verdicts": verdicts(out)}


def verdicts(out: Path) -> list[dict[str, Json]]:
    """A row for every kernel that was tried: why it is left out, its errors, and its time relative to XLA's."""
    path, rows = out / VERDICTS, []
    for entries in read_json(path).values() if path.exists() else []:
        for key, found in entries.items():
            reason = "a trial that did not end" if found.get("trying") else found.get("reason")
            errors = {"error": found.get("error"), "error of XLA": found.get("xla_error")}
            seconds, of_xla = found.get("seconds", {}), found.get("xla_seconds", {})
            ratios = {f"time {what} / XLA's": seconds[what] / of_xla[what] for what in seconds}
            rows.append({"kernel": key, "left out": reason, **errors, **ratios})
    return rows


def kernel_figures(out: Path) -> dict[str, Json]:
    found, rows = read_json(out / "kernels.json"), []
    for row in found["rows"]:
        shown = {"case": row["case"], "implementation": row["implementation"]}
        if "missing" in row:
            rows.append({**shown, "missing": row["missing"]})
            continue
        seconds = statistics.median(row["seconds"])
        share = None if row["floor"] is None else row["floor"] / seconds
        rows.append({**shown, "milliseconds": 1e3 * seconds, "share of floor": share, "error": row["error"]})
    return {"device": found["device"], "kernels": rows}


def tile_figures(out: Path) -> dict[str, Json]:
    """Returns the table, if there is one, and the fastest candidate of every size so far, read from the log."""
    rows: list[dict[str, Json]] = []
    for line in (out / "tiles.log").read_text().splitlines():
        tiles, _, milliseconds = line.strip().removesuffix(" ms").rpartition(": ")
        if ", up to " in line and not line.startswith(" "):
            rows.append({"size": line})
        elif rows and line.endswith(" ms"):  # the fastest comes first
            rows[-1].setdefault("fastest", tiles)
            rows[-1].setdefault("milliseconds", float(milliseconds))
            if tiles == "as reckoned":
                rows[-1]["as reckoned"] = float(milliseconds)
    path = out / "tiles.json"
    return {"table": read_json(path) if path.exists() else None, "sizes": rows}


def search_figures(name: str, out: Path) -> dict[str, Json]:
    """Returns the seconds of finished stages, the child, and the evaluation of every model."""
    run = out / name
    stages = sorted(
        (read_json(path) for path in run.glob("*/stage.json")), key=lambda stage: STAGES.index(stage["name"])
    )
    result: dict[str, Json] = {"stages": [{"stage": each["name"], "seconds": each["seconds"]} for each in stages]}
    if (run / "refine" / "refined.json").exists():
        layers = read_json(run / "refine" / "refined.json")["child"]["layers"]
        result["child"] = [
            {"layer": n, "experts": layer["num_local_experts"], "window": layer["sliding_window"] or "full"}
            for n, layer in enumerate(layers)
        ]
    if (run / "evaluate" / "evaluation.json").exists():
        result["models"] = [
            {
                "model": model,
                "expert bytes": found["expert_bytes"],
                "predicted tokens/s": scenario["predicted_tokens_per_second"],
                "measured tokens/s": (scenario["throughput"] or {}).get("tokens_per_second"),
                "held-out KL": found["heldout"]["kl"],
            }
            for model, found in read_json(run / "evaluate" / "evaluation.json").items()
            for scenario in found["scenarios"].values()
        ]
    return result


STAGES = ("cost", "trace", "rank", "refine_costs", "score", "solve", "refine", "assemble", "evaluate", "report")


def training_figures(name: str, out: Path) -> dict[str, Json]:
    """Returns metrics of steps, and their median seconds without the first (compiles) and the last (evaluates)."""
    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    shown = ("step", "seconds_per_step", "loss", "grad_norm", "reward", "updates", "rollout_seconds", "score_seconds")
    shown += ("update_seconds", "rollout_tokens_per_second")
    steps = [{key: line[key] for key in shown if key in line} for line in lines]
    between = [line["seconds_per_step"] for line in lines[1:-1]]
    return {"median seconds of a step": statistics.median(between) if between else None, "steps": steps}


STEPS: dict[str, Step] = {
    "doctor": Step(90, doctor, doctor_figures),
    "kernels": Step(90, kernels, kernel_figures),
    "search_tiny": Step(80, search_tiny, partial(search_figures, "search_tiny"), parsed_when_dry=True),
    "search_20b_width": Step(80, search_20b_width, partial(search_figures, "search_20b_width")),
    "distill_step": Step(45, distill_step, partial(training_figures, "distill_step")),
    "grpo_step": Step(45, grpo_step, partial(training_figures, "grpo_step")),
    "tiles": Step(50, tiles, tile_figures),
}

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the running step is killed
    sys.exit(main())
