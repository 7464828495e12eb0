"""The completion check: a stage run that is complete for the command's settings is not run again.

``DONE.json`` alone does not tell: other settings or a longer data file may ask for more, or for
something else. The marker therefore holds the fingerprint of what the stage run was made from.
Engine and trainer layout are not in it: they do not change the results.
"""

from __future__ import annotations

from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.records.fingerprint import content_fingerprint, settings_fingerprint
from spark_nemo.run.run_folder import mark_done, read_done, reward_model_path, stage1_folder
from spark_nemo.run.run_lock import is_main_rank
from spark_nemo.run.stage_spec import STAGES

FINGERPRINT = "fingerprint"
_REWARD_MODEL = "the reward model"
_STORE = "the stage I store"


def stage_fingerprint(config: SparkConfig, stage: str) -> dict[str, object]:
    """Return the fingerprint of everything that the results of ``stage`` depend on."""
    fingerprint = settings_fingerprint(config, STAGES[stage].inputs)
    if stage == "stage2":
        fingerprint[_STORE] = content_fingerprint(stage1_folder(config.run) / "store")
    if stage == "stage3" and config.rl.asks_reward_model:
        fingerprint[_REWARD_MODEL] = content_fingerprint(reward_model_path(config))
    return fingerprint


def resume_fingerprint(
    config: SparkConfig, stage: str, reward_model: str | None = None
) -> dict[str, object]:
    """Return the fingerprint of everything that an unfinished run of ``stage`` must not change.

    ``reward_model`` is the fingerprint of a reward model that is served already.
    """
    spec = STAGES[stage]
    # A section and an exception of an exception below it give the same setting twice.
    settings = settings_fingerprint(config, spec.same_on_resume)
    fingerprint = {name: value for name, value in settings.items() if spec.is_same_on_resume(name)}
    if stage == "stage3" and config.rl.asks_reward_model:
        fingerprint[_REWARD_MODEL] = reward_model or content_fingerprint(reward_model_path(config))
    return fingerprint


def is_complete(config: SparkConfig, stage: str) -> bool:
    """Return whether ``stage`` finished with the settings of ``config`` and its results exist."""
    spec = STAGES[stage]
    folder = spec.folder(config)
    done = read_done(folder) or {}
    if FINGERPRINT not in done or not (folder / spec.result).exists():
        return False
    return done[FINGERPRINT] == stage_fingerprint(config, stage)


def fingerprint_before_work(config: SparkConfig, stage: str) -> dict[str, object] | None:
    """Return ``stage_fingerprint`` on the main rank, None on the others.

    It is taken before the work begins, so that a file that is edited meanwhile counts as it was
    read. Only the main rank writes it: hundreds of ranks would read the same models for nothing.
    """
    return stage_fingerprint(config, stage) if is_main_rank() else None


def record_fingerprint(folder: Path, fingerprint: dict[str, object] | None) -> None:
    """Add the fingerprint to the DONE marker of a finished stage run; None adds nothing."""
    if fingerprint is not None:
        mark_done(folder, {**(read_done(folder) or {}), FINGERPRINT: fingerprint})
