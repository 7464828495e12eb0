"""Detect a folder's checkpoint format; if it has none, suggest the folder the user meant."""

from __future__ import annotations

import re
from pathlib import Path

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_folder import WEIGHT_INDEX

from . import nemo
from .torch_bin import PICKLES
from .training_checkpoint import newest

_CHECKPOINT_FOLDERS = ("dist_ckpt", "iter_*", "step-*", "release", "weights")


def detect_format(folder: str | Path) -> tuple[str, Path]:
    """Return "hf", "megatron" or "nemo", and the folder that holds the weights.

    That is the newest step of a run, and the whole folder for NeMo. Raises ``ConfigError`` naming
    what is missing and, if it can tell, the folder to use instead.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: pass its folder")
    if not folder.is_dir():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not folder.parent.is_dir():
            hint = " (hub names are not downloaded: hf download NAME --local-dir FOLDER)"
        raise ConfigError(f"checkpoint folder {folder} does not exist{hint}")
    if (folder / nemo.CONTEXT).is_dir():
        return "nemo", folder
    if _is_megatron(folder):
        return "megatron", folder
    of_model = [
        path
        for pattern in ("*.safetensors", WEIGHT_INDEX, PICKLES)
        for path in folder.glob(pattern)
    ]
    if of_model and (
        (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file()
    ):
        return "hf", folder  # before reading a file "latest", which DeepSpeed writes too
    weights = newest(folder)
    if _is_megatron(weights):
        return "megatron", weights
    if weights == folder and (folder / "config.json").is_file():
        return "hf", folder
    raise ConfigError(f"{weights} {_suggestion(weights)}")


def _is_megatron(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() or (folder / ".metadata").is_file()


def _suggestion(folder: Path) -> str:
    """Return the rest of an error message that begins with the folder's name."""
    if (folder / "adapter_config.json").is_file():
        return "is an adapter, not a model: merge it into its base model (merge_and_unload of peft)"
    if list(folder.glob("mp_rank_*")):
        return (
            "has Megatron-LM's older format (mp_rank_*), which is not supported: save with "
            "--ckpt-format torch_dist"
        )
    snapshots = sorted(folder.glob("snapshots/*"))
    if snapshots:
        return f"is the top of a Hugging Face cache: pass {snapshots[-1]}"
    inside = [
        path
        for pattern in _CHECKPOINT_FOLDERS
        for path in sorted(folder.glob(pattern))
        if path.is_dir()
    ]
    if inside:
        return f"is not a checkpoint: pass a folder in it, such as {inside[-1]}"
    return "has neither config.json (Hugging Face) nor .metadata (Megatron) nor context/ (NeMo 2)"
