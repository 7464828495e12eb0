"""Sample the small world's verification data with every labelling method over several seeds and compare the labels
with the hidden truth: a section of docs/results.md.

    python tools/label_quality.py --seeds 0 1 2 3 4

Runs that are finished already are not sampled again; delete their folder under runs/labels to repeat them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from spark_nemo.config import ConfigError
from spark_nemo.config.compose import compose_config
from spark_nemo.report.label_table import label_section
from spark_nemo.report.labels import label_scores
from spark_nemo.report.sections import update_document
from spark_nemo.toy.resolve import oracle_for, resolve_toy

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Returns the exit status of the first run that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/labels"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    arguments = parser.parse_args()
    by_seed = {}
    for seed in dict.fromkeys(arguments.seeds):
        folder = arguments.runs / f"seed-{seed}"
        overrides = ["+experiment=toy_labels", *arguments.overrides, f"run.dir={folder}", f"run.seed={seed}"]
        status = subprocess.call([sys.executable, "-m", "spark_nemo.cli.main", "stage1", *overrides])
        if status:
            return status
        config = resolve_toy(compose_config(overrides))
        oracle = oracle_for(config)
        if oracle is None:
            raise ConfigError("label quality needs the small world's generator: only it has a hidden truth")
        by_seed[seed] = label_scores(folder, config, oracle)
    command = " ".join(["python tools/label_quality.py --seeds", *map(str, by_seed), *arguments.overrides])
    update_document(arguments.out, label_section(by_seed, command))
    print(f"{len(by_seed)} seeds: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
