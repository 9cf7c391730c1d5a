"""Steps of reinforcement learning, ours compared with TRL's GRPOTrainer: seconds per step and until the first one ends.

The embedded parent, or a checkpoint with the same chat format, answers problems of the embedded tasks at high effort,
several times each, and learns from all of its answers in one optimiser step. Both sides use float32 on the same cores,
no KL term, and the same limit on answers:

    ours     puzzle_jax.train.grpo with the settings of the recipe `grpo-accuracy`
    theirs   trl.GRPOTrainer with the model in transformers, which also generates (eager attention, for the sinks)

Every turn is a process of its own, and the sides take turns. Both draw problems from the same tasks in the same shares
and score answers with the same functions; their problems and answers differ, so the results compare only if the answer
lengths, which are shown, are similar. A turn's first steps, in which ours compiles its programs or reads compiled ones,
are excluded from its seconds per step; the first is timed from the start of the process. Ours runs once beforehand, so
that compiled programs exist, as they do for every run but the first on a machine.

    python benchmarks/grpo.py [--rounds 2] [--steps 4] [--prompts 32] [--group 16] [--json PATH]

Needs the extras `parity` and `train`, and trl (tested: 1.16.0 with torch 2.13.0 and transformers 5.24.0).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHARES = {"chain": 2, "add": 1, "recall": 1}
EFFORT, LIMIT = "high", 128
LEARNING_RATE = 1e-3
SETTLING = 4  # untimed steps, until answers of every length have occurred


def main() -> None:
    options = arguments()
    if options.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[options.side](options)))
        return
    turn(options, "ours")  # compiles
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for round_ in range(options.rounds):
        for side in sorted(found, reverse=round_ % 2 == 1):
            found[side].append(turn(options, side))
    table = Table("", "s per step", "until the first step's end, s", "mean tokens of an answer", "reward")
    steps = {
        side: statistics.median(itertools.chain(*(of["seconds"] for of in turns))) for side, turns in found.items()
    }
    for side, turns in found.items():
        means = {name: statistics.mean(of[name] for of in turns) for name in ("first", "tokens", "reward")}
        first, tokens, reward = (f"{value:.2f}" for value in means.values())
        table.add_row(side, f"{steps[side]:.2f}", first, tokens, reward)
    console = Console(width=110)
    console.print(table)
    console.print(
        f"theirs take {steps['theirs'] / steps['ours']:.1f} times as long per step of {options.prompts} prompts x "
        f"{options.group} answers; {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--steps", type=int, default=4, help=f"timed steps of a turn, after {SETTLING} that are not")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16, help="answers to each prompt")
    parser.add_argument("--micro_batch", type=int, default=32, help="answers of a micro-batch of theirs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def turn(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """Runs one turn of a side in a process of its own."""
    given = {name: value for name, value in vars(options).items() if name not in ("side", "started", "json")}
    own = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *own, "--side", side, "--started", repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def result(options: argparse.Namespace, ends: list[float], tokens: list[float], rewards: list[float]) -> dict[str, Any]:
    """Returns the seconds of each timed step and until the end of the first one, mean tokens and mean reward."""
    return {
        "seconds": [end - start for start, end in itertools.pairwise(ends[SETTLING - 1 :])],
        "first": ends[0] - options.started,
        "tokens": statistics.mean(tokens),
        "reward": statistics.mean(rewards),
    }


def ours(options: argparse.Namespace) -> dict[str, Any]:
    from puzzle_jax.commands import enable_compilation_cache
    from puzzle_jax.search.recipe import EMBEDDED_PARENT
    from puzzle_jax.settings.verbs import parse
    from puzzle_jax.train.__main__ import VERBS
    from puzzle_jax.train.grpo.inputs import GrpoInputs
    from puzzle_jax.train.grpo.primary_rewards import PrimaryRewards
    from puzzle_jax.train.grpo.recipe import GrpoRecipe
    from puzzle_jax.train.grpo.run import Trainer
    from puzzle_jax.train.run import open_placement

    enable_compilation_cache()
    ends, tokens, rewards = [], [], []

    class Timed(Trainer):
        def step(self, *given: Any) -> Any:
            state, metrics = super().step(*given)
            ends.append(time.time())
            tokens.append(metrics[f"tokens/{EFFORT}"])
            rewards.append(metrics["reward"])
            return state, metrics

        def export(self, trained: Any) -> None:
            pass

    model = options.model or EMBEDDED_PARENT
    with tempfile.TemporaryDirectory() as directory:
        recipe = parse(VERBS["grpo"], ["--recipe", "grpo-accuracy", "--model", str(model), "--out", directory])
        assert isinstance(recipe, GrpoRecipe)
        recipe = replace(
            recipe,
            prompts=replace(recipe.prompts, prompts=options.prompts, tasks=SHARES, efforts={EFFORT: 1.0}),
            rollout=replace(recipe.rollout, group=options.group),
            update=replace(recipe.update, reference=False),
            optimizer=replace(recipe.optimizer, warmup_steps=0, learning_rate=LEARNING_RATE),
            loop=replace(recipe.loop, steps=options.steps + SETTLING, evaluate_every=0, save_every=1000),
            monitoring=replace(recipe.monitoring, problems=3, transcripts=1000),
        )
        with PrimaryRewards(recipe.reward) as scorers:
            inputs = GrpoInputs.open(recipe)
            Timed(inputs, open_placement(inputs), Console(quiet=True), scorers).train()
    return result(options, ends, tokens, rewards)


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, GptOssForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from puzzle_jax.search.recipe import EMBEDDED_PARENT
    from puzzle_jax.tasks import TASKS, Chat, problems

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = options.model or EMBEDDED_PARENT
    chat = Chat.load(model)
    ends: list[float] = []
    tokens: list[float] = []
    rewards: list[float] = []

    count = (options.steps + SETTLING) * options.prompts
    drawn = {task: iter(problems(TASKS[task], first_seed=10_000_000, held_out=False)) for task in SHARES}
    order = [task for task, share in SHARES.items() for _ in range(share)]
    asked = [next(drawn[order[number % len(order)]]) for number in range(count)]
    prompts = [chat.decode(chat.prompt_tokens(problem.prompt, EFFORT)) for problem in asked]
    by_prompt = dict(zip(prompts, asked, strict=True))

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        found = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            ended = ids[-1] in chat.stop_ids
            problem = by_prompt[prompt]
            found.append(TASKS[problem.task].score(problem, chat.parse(ids).final) if ended else 0.0)
        tokens.append(statistics.mean(len(ids) for ids in completion_ids))
        rewards.append(statistics.mean(found))
        return found

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())

    answers = options.prompts * options.group
    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=GptOssForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager"),
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=directory,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=options.micro_batch,
                gradient_accumulation_steps=answers // options.micro_batch,
                steps_per_generation=answers // options.micro_batch,
                num_generations=options.group,
                max_completion_length=LIMIT,
                max_steps=options.steps + SETTLING,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                loss_type="dapo",
                beta=0.0,
                temperature=1.0,
                shuffle_dataset=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                generation_kwargs={"eos_token_id": sorted(chat.stop_ids)},
            ),
        )
        trainer.train()
    return result(options, ends, tokens, rewards)


if __name__ == "__main__":
    main()
