"""The run folder: the place of each stage's results, the DONE marker, and the progress file.

::

    run.dir/
      config.yaml           the resolved configuration
      data/                 problem files made for the toy task
      sft/                  data.json, metrics.jsonl, checkpoints/, model/ of the format SFT
      stage1/store/         shards of solutions and verifications
      stage1/               stats-*.json, token_accounting-*.json
      stage2/<method>/      labels.jsonl, metrics.jsonl, checkpoints/, model/, processbench.json of
                            a PRM-CoT
      stage2/<method>-<variant>/   the same of a PRM; an ORM has whole_solution.json instead
      stage3/<design>/      metrics.jsonl, checkpoints/, evaluations.jsonl, samples.jsonl,
                            verifier.jsonl, timing.jsonl, hacking.jsonl, top_rewards.jsonl, model/
                            of a reward design with a PRM-CoT, or of a baseline
      stage3/<design>-<variant>/   the same with another kind of reward model
      DONE.json             in a finished stage run's folder: its figures and fingerprint
      LOCK                  process that holds the folder: here the pipeline, in a stage run's
                            folder its main rank
      round-<n>/            stage1/ and stage2/ of a later round, whose verifier is the reward model
                            of the round before
      summary.json, report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spark_nemo.config import RunConfig, SparkConfig, Stage1Config
from spark_nemo.config.designs import variant_suffix
from spark_nemo.utils.files import write_json_atomic
from spark_nemo.utils.progress_bar import progress_bar

DONE, PROGRESS = "DONE.json", "progress.json"
PROCESSBENCH, WHOLE_SOLUTION = "processbench.json", "whole_solution.json"
"""Files with the score of stage II's model: as a critic of steps, or of whole solutions."""


def sft_folder(run: RunConfig) -> Path:
    """Folder of the policy's format SFT."""
    return Path(run.dir) / "sft"


def stage1_folder(run: RunConfig) -> Path:
    """Folder of the verification data: its store and statistics."""
    return Path(run.dir) / "stage1"


def round_run(run: RunConfig, number: int) -> RunConfig:
    """Run settings of a round of labelling; round 1 is the run itself."""
    return run if number == 1 else replace(run, dir=str(Path(run.dir) / f"round-{number}"))


def stage2_folder(run: RunConfig, method: str, variant: str | None) -> Path:
    """Folder of one reward model, by its label method and kind."""
    return Path(run.dir) / "stage2" / f"{method}{variant_suffix(variant)}"


def stage3_folder(run: RunConfig, rl_variant: str) -> Path:
    """Folder of one RL variant, by ``SparkConfig.rl_variant``."""
    return Path(run.dir) / "stage3" / rl_variant


def reward_model_path(config: SparkConfig) -> Path:
    """Folder of stage III's reward model: the configured one, or stage II's result in this run."""
    if config.rl.named_reward_model is not None:
        return Path(config.rl.named_reward_model)
    return stage2_folder(config.run, config.stage2.method, config.reward_variant) / "model"


def read_done(folder: Path) -> dict[str, object] | None:
    """Return what ``mark_done`` wrote, None while the stage run is unfinished.

    The marker means success, never an exit code.
    """
    path = folder / DONE
    return json.loads(path.read_text()) if path.exists() else None


def mark_done(folder: Path, result: dict[str, object]) -> None:
    """Mark the stage run in ``folder`` as finished."""
    write_json_atomic(folder / DONE, result)


class Clock:
    """Seconds of work on a stage run, summed over its restarts."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "seconds.json"
        self._before = json.loads(self._path.read_text())["seconds"] if self._path.exists() else 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far, with those before a restart."""
        return self._before + time.monotonic() - self._started

    def save(self) -> None:
        """Store the seconds for a later restart."""
        write_json_atomic(self._path, {"seconds": self.seconds})


class Progress:
    """A progress bar on the terminal, and ``progress.json`` in the folder for other processes."""

    def __init__(self, folder: Path, total: int, unit: str, clock: Clock | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._total, self._written = folder / PROGRESS, total, 0.0
        self._clock = clock
        self._bar = progress_bar(total=total, unit=unit, desc=folder.name)

    def update(self, done: int, note: str) -> None:
        """Show ``done`` of the total."""
        self._bar.n = done
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(0)
        if time.monotonic() - self._written > 1 or done == self._total:
            self._written = time.monotonic()
            write_json_atomic(self._path, {"done": done, "total": self._total, "note": note})
            if self._clock is not None:
                self._clock.save()  # a kill loses at most one second

    def close(self) -> None:
        """Leave the last state on the terminal."""
        self._bar.close()


@contextmanager
def progress(folder: Path, total: int, unit: str, clock: Clock | None = None) -> Iterator[Progress]:
    """A ``Progress`` that is closed at the end of the block."""
    bar = Progress(folder, total, unit, clock)
    try:
        yield bar
    finally:
        bar.close()


def shard_name(stage: Stage1Config) -> str:
    """Return the name of a shard, with the number of shards: another number cuts differently."""
    return "shard-all" if stage.shard is None else f"shard-{stage.shard}-of-{stage.num_shards}"
