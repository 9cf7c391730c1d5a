"""Runs a baseline of a search through the pipeline of `puzzle run`, to compare it with the searched child.

    python benchmarks/baseline_run.py RUN OUT [--baseline uniform]

RUN is a finished run. Its search and its parent's answers are copied to OUT, where the baseline's checkpoint replaces
that of the searched child. All stages from distillation to the report then run with RUN's settings and on the same
problems, but without the control, which RUN already has. In OUT's tables `cut` is the baseline before training.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

from puzzle_jax.commands import enable_compilation_cache
from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.files import Json
from puzzle_jax.run.__main__ import VERBS
from puzzle_jax.run.page import show_page
from puzzle_jax.run.pipeline import run_road
from puzzle_jax.run.places import CHILD, SETTINGS_FILE, stage_paths
from puzzle_jax.run.resolved import write_settings
from puzzle_jax.run.road import Road
from puzzle_jax.run.settings import RunSettings
from puzzle_jax.search.artifacts import final_candidates
from puzzle_jax.search.context import Search
from puzzle_jax.settings.verbs import parse
from puzzle_jax.stages import STAGE_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline", default="uniform")
    options = parser.parse_args()
    enable_compilation_cache()
    console = plain_console(width=150)
    settings = settings_of(options.run, options.out)
    Road(settings, console)  # creates the directory, or refuses one that holds something else
    for name in ("search", "traces"):
        if not (options.out / name).exists():
            shutil.copytree(options.run / name, options.out / name)
    replace_child(settings, options.baseline)
    write_settings(settings)
    for stage in [name for name in settings.stages if name not in ("search", "traces")]:
        run_road(Road(replace(settings, stage=stage), console))
    show_page(settings.run, console)


def settings_of(run: Path, out: Path) -> RunSettings:
    """Returns a run's settings for another directory, without the control."""
    content: dict[str, Json] = yaml.safe_load((run / SETTINGS_FILE).read_text())
    for name in (*stage_paths(Path(content["parent"]), run, control=True), "run"):
        *sections, key = name.split(".")
        place = content
        for section in sections:
            place = place[section]
        place.pop(key, None)
    with tempfile.TemporaryDirectory() as directory:
        recipe = Path(directory) / "settings.yaml"
        recipe.write_text(yaml.safe_dump(content))
        settings = parse(VERBS[""], ["--recipe", str(recipe), "--run", str(out), "--no-control"])
    assert isinstance(settings, RunSettings)
    return settings


def replace_child(settings: RunSettings, baseline: str) -> None:
    """Replaces the searched child's checkpoint with the baseline's."""
    search = Search(settings.search, plain_console())
    chosen = final_candidates(search.run)[baseline]
    place = search.run / CHILD
    record = (place / STAGE_FILE).read_bytes()
    shutil.rmtree(place)
    child = search.child(chosen)
    provenance = {"parent": str(settings.parent), "predicted": {"kl": chosen.score, **chosen.costs}}
    export_child(settings.parent, place, child.config, child.kept, provenance=provenance)
    (place / STAGE_FILE).write_bytes(record)


if __name__ == "__main__":
    main()
