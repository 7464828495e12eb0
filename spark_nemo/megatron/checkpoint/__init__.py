"""Training checkpoints, and conversion between Hugging Face, Megatron and NeMo 2 folders.

``training_checkpoint`` saves and resumes a run. The rest needs no GPU, no process group and no
model: ``reader`` opens any format, ``conversion`` writes it in another a tensor at a time,
``reshard`` cuts a training checkpoint for another layout, ``compare_tensors`` and ``inspection``
compare and describe. ``torch_dist_reader`` and ``torch_dist_writer`` are Megatron's distributed
format, ``nemo`` is NeMo 2's folder.
"""

from .training_checkpoint import LATEST, STATE_FILE, has_checkpoint, load, newest, save

__all__ = ["LATEST", "STATE_FILE", "has_checkpoint", "load", "newest", "save"]
