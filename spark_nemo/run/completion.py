"""Is a part finished, from the very settings and files that a command names? Then there is nothing
to do.

``DONE.json`` alone does not say so: another setting or a longer data file may ask for more than
what was done, or for something else, which the stage itself goes on with or refuses. Engines and
layouts do not count: they are how a part is worked on, and it has been.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from spark_nemo.config import SparkConfig
from spark_nemo.records import content_key
from spark_nemo.records.fingerprint import model_fingerprint
from spark_nemo.records.shards import shard_paths
from spark_nemo.run.run_folder import mark_done, read_done, stage1_folder, stage2_folder
from spark_nemo.run.run_lock import is_main_rank

_INPUTS = "inputs"
_READS = {
    "sft": ("sft", "rl.prompt_set", "data.sft_examples", "models.policy_base"),
    "stage1": (
        "stage1",
        "data.stage1_problems",
        "models.generator",
        "models.verifier",
        "models.critic",
    ),
    "stage2": ("stage2", "labels", "stage1.prompt_set", "data.processbench", "models.reward_base"),
    "stage3": (
        "rl",
        "evaluation",
        "stage1.prompt_set",
        "reward_variant",
        "data.rl_problems",
        "data.eval_problems",
        "data.rl_answers",
        "models.policy",
    ),
}
"""Settings that a part's results depend on, by section or by name, besides ``run.seed``."""


def inputs_of(config: SparkConfig, part: str) -> str:
    """16 hex digits of all that ``part`` (sft, stage1, stage2 or stage3) is made from: settings,
    and of the files, models and stores that they name the content (of large ones sizes and ends).
    """
    read = {name: _plain(attrgetter(name)(config)) for name in ("run.seed", *_READS[part])}
    if part == "stage2":
        read["the store"] = _identity(str(stage1_folder(config.run) / "store"))
    if part == "stage3" and config.rl.asks_reward_model and config.rl.reward_model is None:
        made = stage2_folder(config.run, config.stage2.method, config.reward_variant) / "model"
        read["the reward model"] = _identity(str(made))
    return content_key(read)


def is_finished(config: SparkConfig, part: str, folder: Path) -> bool:
    """Was ``part``, whose folder this is, finished from what ``config`` names, and is its result
    still there?
    """
    result = folder.parent / "store" if part == "stage1" else folder / "model/config.json"
    done = read_done(folder) or {}
    return _INPUTS in done and result.exists() and done[_INPUTS] == inputs_of(config, part)


def inputs_to_remember(config: SparkConfig, part: str) -> str | None:
    """``inputs_of`` before the work begins; None but on the main rank, which notes them: hundreds
    of ranks would read the same data and models for nothing.
    """
    return inputs_of(config, part) if is_main_rank() else None


def remember_inputs(folder: Path, inputs: str | None) -> None:
    """Note in the marker of a part that is finished what it was made from."""
    if inputs is not None:
        mark_done(folder, {**(read_done(folder) or {}), _INPUTS: inputs})


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return _identity(value) if isinstance(value, str) else value


def _identity(value: str) -> str | list[object]:
    """What a file or folder of this name holds, or the text itself when there is none."""
    if not value:
        return value
    path = Path(value)
    if path.is_file():
        with path.open("rb") as file:
            return ["file", hashlib.file_digest(file, "sha256").hexdigest()]
    if (path / "config.json").is_file():
        return ["model", model_fingerprint(path)]
    if shards := shard_paths(path):
        return ["store", [[shard.name, shard.stat().st_size] for shard in shards]]
    return value
