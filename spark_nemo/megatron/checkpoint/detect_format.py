"""Which checkpoint a folder is, and for what is none, which folder was probably meant."""

from __future__ import annotations

import re
from pathlib import Path

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_folder import WEIGHT_INDEX

from . import nemo
from .torch_bin import PICKLES
from .training_checkpoint import newest

_WEIGHTS_OF = ("dist_ckpt", "iter_*", "step-*", "release", "weights")


def recognise(folder: str | Path) -> tuple[str, Path]:
    """ "hf", "megatron" or "nemo", and the folder with the weights: of a run the newest step, of NeMo the whole.

    ``ConfigError`` says what is missing and, where it can be seen, what to name instead.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: name its folder")
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not folder.parent.is_dir()
        raise ConfigError(
            f"checkpoint folder {folder} does not exist"
            + (
                " (hub names are not downloaded: hf download NAME --local-dir FOLDER)"
                if hub
                else ""
            )
        )
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
        return "hf", folder  # before a file "latest" is looked at: DeepSpeed has one, too
    weights = newest(folder)
    if _is_megatron(weights):
        return "megatron", weights
    if weights == folder and (folder / "config.json").is_file():
        return "hf", folder
    raise ConfigError(f"{weights} {_what_it_is(weights)}")


def _is_megatron(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() or (folder / ".metadata").is_file()


def _what_it_is(folder: Path) -> str:
    """The end of a sentence that begins with the name of a folder that is no checkpoint."""
    if (folder / "adapter_config.json").is_file():
        return (
            "is an adapter, no model: merge it into its base model first (merge_and_unload of peft)"
        )
    if list(folder.glob("mp_rank_*")):
        return "has Megatron-LM's older format (mp_rank_*), which is not read: save with --ckpt-format torch_dist"
    if inside := sorted(folder.glob("snapshots/*")):
        return f"is the top of a Hugging Face cache: name {inside[-1]}"
    if inside := [
        path for pattern in _WEIGHTS_OF for path in sorted(folder.glob(pattern)) if path.is_dir()
    ]:
        return f"is no checkpoint: name the one in it that you mean, such as {inside[-1]}"
    return "has neither config.json (Hugging Face) nor .metadata (Megatron) nor context/ (NeMo 2)"
