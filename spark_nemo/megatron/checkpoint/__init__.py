"""Checkpoints in every direction: those of training, and conversion between Hugging Face, Megatron
and NeMo 2 folders.

``training`` saves and resumes a run. The rest needs no GPU, no process group and no model:
``from_hf`` and ``to_hf`` convert a tensor at a time, ``stored`` reads Megatron's distributed format
lazily, ``compare`` and ``inspection`` look.
"""

from .training_checkpoint import LATEST, STATE_FILE, has_checkpoint, load, newest, save

__all__ = ["LATEST", "STATE_FILE", "has_checkpoint", "load", "newest", "save"]
