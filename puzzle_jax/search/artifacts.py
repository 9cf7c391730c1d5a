"""Every file of a run: its place, how it is written and how it is read.

    cost/costs.json             bytes and seconds of every alternative
    traces/<set>.parquet        the parent's own answers, in four sets that share no problem, or five with finalists
    rank/ranking.safetensors    every expert's score by every rule
    rank/agreement.json         how much the rules agree
    rank/routing.json           how unevenly the experts are loaded
    refine_costs/costs.json     costs with those loads
    score/scores.json           the space of alternatives and the KL of each
    solve/solutions.json        the pool of solutions with real KL, the chosen one, the baselines and the frontier
    finalists/finalists.json    children trained for a while, with their KL before and after, and the chosen one
    refine/refined.json         the final child, and what was tried to improve it
    child/                      the child's checkpoint
    evaluate/evaluation.json    KL, accuracy, tokens and speed of parent, child and baselines
    report/                     report.html, report.md, figures/*.png
    hours.json                  how long every stage took (`hours.measured`)
    score-book.safetensors, refine-book.safetensors   scores trace by trace, which outlive their stages

The JSON form of an object is described beside its class (`Costs`, `Candidate`, `scores_to_json`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors.numpy import load_file, save_file

from puzzle_jax.costs.routing import Profile
from puzzle_jax.costs.table import Costs, read_costs
from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import read_json
from puzzle_jax.generate.traces import Trace, read_traces, write_traces
from puzzle_jax.search.rank.ranking import Ranking
from puzzle_jax.search.rank.rules import RULES
from puzzle_jax.search.recipe import TRACE_SETS, TRAINING
from puzzle_jax.search.solve.problem import Candidate

Value = TypeVar("Value")

SCORE_TABLE, REFINED_SCORE_TABLE = "score-book.safetensors", "refine-book.safetensors"
CHILD = "child"


@dataclass(frozen=True)
class Artifact(Generic[Value]):
    """One file of a run.

    Attributes:
      path: path below the run directory.
      save: writes a value to a path.
      load: reads a value from a path; raises PuzzleError for a damaged file.
    """

    path: str
    save: Callable[[Path, Value], None]
    load: Callable[[Path], Value]

    def write(self, out: Path, value: Value) -> None:
        """Writes the file into `out`, the output directory of a stage."""
        self.save(out / Path(self.path).name, value)

    def find(self, run: Path) -> Path:
        """The file in a run; raises PuzzleError where it has not been written."""
        return find(run, self.path)

    def read(self, run: Path) -> Value:
        """The value in a run; raises PuzzleError where the file is missing or damaged."""
        return self.load(self.find(run))


def find(run: Path, path: str) -> Path:
    """A file or directory of a run; raises PuzzleError, saying what to do, where it is missing."""
    found = run / path
    if not found.exists():
        raise PuzzleError(f"{found} is missing; run the stages before it first (or all: `puzzle search`)")
    return found


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _json(path: str) -> Artifact[Any]:
    return Artifact(path, _write_json, read_json)


def _costs(path: str) -> Artifact[Costs]:
    return Artifact(path, lambda file, costs: _write_json(file, costs.to_json()), read_costs)


def _traces(name: str) -> Artifact[Sequence[Trace]]:
    return Artifact(f"traces/{name}.parquet", write_traces, read_traces)


def _save_ranking(path: Path, ranking: Ranking) -> None:
    save_file({**ranking.scores, "routed": ranking.routed}, path)


def _load_ranking(path: Path) -> Ranking:
    tensors = load_file(path)
    return Ranking({rule: tensors[rule] for rule in RULES if rule in tensors}, tensors["routed"])


COSTS, REFINED_COSTS = _costs("cost/costs.json"), _costs("refine_costs/costs.json")
TRACES = {name: _traces(name) for name in (*TRACE_SETS, TRAINING)}
RANKING = Artifact("rank/ranking.safetensors", _save_ranking, _load_ranking)
AGREEMENT = _json("rank/agreement.json")
ROUTING: Artifact[Profile] = Artifact("rank/routing.json", _write_json, lambda file: tuple(read_json(file)))
SCORES = _json("score/scores.json")
SOLUTIONS = _json("solve/solutions.json")
FINALISTS = _json("finalists/finalists.json")
REFINED = _json("refine/refined.json")
EVALUATION = _json("evaluate/evaluation.json")


COPIED = (
    *(each.path for each in (*TRACES.values(), RANKING, REFINED_COSTS, SCORES, SOLUTIONS, REFINED)),
    *(SCORE_TABLE, REFINED_SCORE_TABLE),
)
"""Files that the stages read in all processes of a search."""


def chosen_candidate(run: Path, finalists: bool = False) -> Candidate:
    """The candidate that `solve` chose from its pool, or the one that was chosen among the `finalists`."""
    artifact, listed = (FINALISTS, "finalists") if finalists else (SOLUTIONS, "pool")
    found = artifact.read(run)
    return Candidate.from_json(found[listed][found["chosen"]])


def chosen_of_pool(run: Path) -> Any:
    """The candidate that `solve` chose as solutions.json has it, with its measurements.

    Raises PuzzleError for a file of an earlier version, which has no expected KL.
    """
    solutions = SOLUTIONS.read(run)
    return _with_expected(solutions["pool"][solutions["chosen"]], SOLUTIONS.path, "solve")


def expected_of_refined(run: Path) -> Any:
    """The KL to expect of the final child, and its standard error.

    Raises PuzzleError for a file of an earlier version, which has none.
    """
    return _with_expected(REFINED.read(run), REFINED.path, "refine")["expected"]


def _with_expected(found: Any, path: str, stage: str) -> Any:
    if "expected" not in found:
        raise PuzzleError(f"{path} has no expected KL, as of an earlier version; run the stage {stage} again")
    return found


def final_candidates(run: Path) -> dict[str, Candidate]:
    """The parent, the refined child and the baselines, by name."""
    solutions, refined = SOLUTIONS.read(run), REFINED.read(run)
    found = {"parent": Candidate.from_json(solutions["parent"]), "child": Candidate.from_json(refined["child"])}
    return found | {entry["name"]: Candidate.from_json(entry) for entry in solutions["baselines"]}
