"""Start the trainer ranks of one machine with torch's own launcher; under Slurm or torchrun they are there already."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from spark_nemo.config import MegatronConfig


def must_launch(layout: MegatronConfig) -> bool:
    """Does the layout need several ranks that nobody has started yet?"""
    return layout.world_size > 1 and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ


def launch_ranks(layout: MegatronConfig, arguments: Sequence[str]) -> int:
    """Run this very command once per rank on this machine and return the ranks' exit status."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.world_size}",
        "--no-python", sys.executable, "-m", "spark_nemo.cli.main", *arguments]
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()  # the ranks got the same Ctrl-C and are writing their checkpoint
