"""Training and scoring of Hugging Face models on megatron-core, on GPUs or CPUs with the same code.

``worker.MegatronWorker`` is the entry; it takes ``packed_batch.PackedBatch``. No other package
imports megatron. This file imports nothing, so that importing a submodule that needs no megatron
stays cheap: importing megatron takes seconds.
"""


class NonFiniteGradient(RuntimeError):
    """The gradient norm is not a finite number; the optimizer step was not taken."""
