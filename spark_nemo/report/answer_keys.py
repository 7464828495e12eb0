"""Which parts of a run read answer keys to train, from what the stages wrote down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spark_nemo.config import REFERENCE_GUIDED, SparkConfig
from spark_nemo.config.designs import READS_ANSWER_KEYS, VARIANTS, asks_reward_model, variant_suffix

LABELS = "labels.json"


def answer_key_readers(folders: Sequence[Path], config: SparkConfig) -> dict[str, str]:
    """Part of the run by its place in the run folder, and what it read answers for; empty for a run
    without.

    ``folders`` are those of the rounds, the run's own first. Evaluation, which reads answers to
    measure, is no part.
    """
    top, found = folders[0], {}
    for folder in folders:
        for path in sorted(folder.glob("stage1/stats-*.json")):
            if json.loads(path.read_text()).get("reference_guided"):
                found[_place(folder / "stage1", top)] = (
                    "the verifier of the reference-guided baseline saw the answers"
                )
        for path in sorted(folder.glob(f"stage2/*/{LABELS}")):
            if json.loads(path.read_text())["reads_answer_keys"]:
                guided = path.parent.name.startswith(REFERENCE_GUIDED)
                found[_place(path.parent, top)] = (
                    "labels of the reference-guided baseline"
                    if guided
                    else "labels balanced by ground truth"
                )
    for path in sorted(top.glob("stage3/*/")):
        design, variant = _arm(path.name)
        if design in READS_ANSWER_KEYS:
            found[_place(path, top)] = "the reward is the answer key"
        elif asks_reward_model(design) and config.rl.reward_model is None:
            model = f"{config.stage2.method}{variant_suffix(variant)}"
            if any(_place(folder / "stage2" / model, top) in found for folder in folders[-1:]):
                found[_place(path, top)] = f"its reward model, {model}, learned from such labels"
    return found


def _arm(name: str) -> tuple[str, str | None]:
    """A folder of stage III as design and kind of reward model."""
    design, _, variant = name.rpartition("-")
    return (design, variant) if variant in VARIANTS and design else (name, None)


def _place(folder: Path, top: Path) -> str:
    return folder.relative_to(top).as_posix()
