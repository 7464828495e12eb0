"""Helpers of every layer: atomic writes, a progress bar, the place of a process in a Slurm step."""
