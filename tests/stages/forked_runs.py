"""Kill runs of stage III by SIGKILL at the end of a phase and start them again:
``forked_runs.py FOLDER < runs``.

The imports, most of a small run's time, are made once: every run is a fork of this process and
calls the command's ``main``. ``runs`` is a JSON list of ``{"name", "overrides", "phase", "step",
"responses"}``; a run without a phase is undisturbed. Two runs are made at a time. The killing is
installed here, from outside; the package knows nothing of it. Writes ``FOLDER/statuses.json``: for
every run, the exit status of its processes (negative: by that signal).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from world import VERIFIER, command

from spark_nemo.cli.main import main
from spark_nemo.megatron.checkpoint import training_checkpoint as checkpoint
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.rollout.evaluator import Evaluator
from spark_nemo.rollout.timeline import GENERATE, Timeline
from spark_nemo.rollout.worker import RolloutWorker
from spark_nemo.stages.stage3 import PolicySync
from spark_nemo.toy.problem_files import write_answers, write_problems
from spark_nemo.training.grpo_trainer import GRPOTrainer

Run = dict[str, object]


def die() -> None:
    """As from outside: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner: object, name: str, due: Callable[..., bool]) -> None:
    """Die when the function ``owner.name`` has returned and ``due`` of its arguments says so."""
    original = getattr(owner, name)

    def wrapped(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        if due(*args, **kwargs):
            die()
        return result

    setattr(owner, name, wrapped)


def after_async(owner: object, name: str, due: Callable[..., bool]) -> None:
    """``after`` for a coroutine function."""
    original = getattr(owner, name)

    async def wrapped(*args: object, **kwargs: object) -> object:
        result = await original(*args, **kwargs)
        if due(*args, **kwargs):
            die()
        return result

    setattr(owner, name, wrapped)


def counted(number: int) -> Callable[..., bool]:
    """True on the ``number``-th call."""
    calls = iter(range(1, 1_000_000))
    return lambda *args, **kwargs: next(calls) == number


def generated(step: int, responses: int) -> None:
    """Die when ``responses`` responses of ``step`` have been sampled; none of them has all its
    siblings judged.
    """
    original, due = Timeline.during, counted(responses)

    @contextlib.contextmanager
    def during(self: Timeline, kind: str, of_step: int) -> Iterator[None]:
        with original(self, kind, of_step):
            yield
        if kind == GENERATE and of_step == step and due():
            die()

    Timeline.during = during


def install(phase: str, step: int, responses: int) -> None:
    """Make this process die at the end of ``phase`` of ``step``."""
    match phase:
        case "generate":
            generated(step, responses)
        case "verify":
            after_async(
                RolloutWorker, "generate_batch", lambda worker, problems, of_step: of_step == step
            )
        case "train":
            after(GRPOTrainer, "update", lambda trainer, of_step, rollouts: of_step == step)
        case "sync":
            after(PolicySync, "push", lambda sync, version: version == step)
        case "saving":  # everything is written, the folder has not got its name yet
            saves = counted(1 + (step + 1) // 2 - 1)
            original = checkpoint.replace_folder
            checkpoint.replace_folder = lambda *args: die() if saves() else original(*args)
        case "save":
            after(
                MegatronWorker,
                "save_checkpoint",
                lambda worker, folder, state, **more: state["step"] == step + 1,
            )
        case "evaluate":
            after(Evaluator, "run", lambda evaluator, of_step: of_step == step)
        case _:
            raise ValueError(f"unknown phase {phase}")


def launch(folder: Path, common: list[str], run: Run, *, killed: bool) -> int:
    """Make one run in a child process and return its exit status."""
    if (child := os.fork()) == 0:
        with (folder / f"{run['name']}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if killed:
            step, responses = int(run["step"]), int(run["responses"])  # type: ignore[call-overload]
            install(str(run["phase"]), step, responses)
        raise SystemExit(
            main(command("stage3", folder / str(run["name"]), *common, *run["overrides"])[3:])
        )
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_run(folder: Path, common: list[str], run: Run) -> None:
    """Make the run that dies, if it should, and the one that resumes."""
    statuses = [launch(folder, common, run, killed=True)] if run["phase"] else []
    statuses.append(launch(folder, common, run, killed=False))
    (folder / f"{run['name']}.json").write_text(json.dumps(statuses))


def run_all(folder: Path, runs: list[Run]) -> None:
    """Two processes share the runs; all runs share the problem files, which take longer to make
    than a run.
    """
    problems, eval_problems = (
        write_problems("rl", 7, 0, folder),
        write_answers("eval", 6, 0, folder),
    )
    common = [
        f"rl.reward.model={VERIFIER}",
        "pipeline.rewards=[process_aware]",
        "pipeline.rl_answers=null",
        f"data.rl_problems={problems}",
        f"data.eval_problems={eval_problems}",
        f"data.stage1_problems={problems}",
        f"data.processbench={problems}",
    ]
    halves = []
    for half in (0, 1):
        if (child := os.fork()) == 0:
            for run in runs[half::2]:
                make_run(folder, common, run)
            os._exit(0)
        halves.append(child)
    for child in halves:
        os.waitpid(child, 0)
    found = {run["name"]: json.loads((folder / f"{run['name']}.json").read_text()) for run in runs}
    (folder / "statuses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), json.load(sys.stdin))
