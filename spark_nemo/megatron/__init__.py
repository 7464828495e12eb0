"""Training and scoring of Hugging Face models on megatron-core, on GPUs or, with the same code, on
CPUs.

``worker.MegatronWorker`` is the door, ``batch.PackedBatch`` goes in; nothing else imports megatron.
This file imports nothing, so that ``batch`` does not cost the seconds that megatron does.
"""
