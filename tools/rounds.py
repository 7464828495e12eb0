"""Run the small world's stages I and II in rounds, where each round's reward model verifies in the next, over several
seeds, and compare labels and reward models round by round: a section of docs/results.md.

    python tools/rounds.py --seeds 0 1 2 --rounds 3

Runs that are finished already are not run again; delete their folder under runs/rounds to repeat them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from spark_nemo.report.round_table import round_section
from spark_nemo.report.sections import update_document

ROOT = Path(__file__).resolve().parents[1]
METHOD = "step_consistency"


def main() -> int:
    """Returns the exit status of the first run that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/rounds"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    arguments = parser.parse_args()
    by_seed = {}
    for seed in dict.fromkeys(arguments.seeds):
        folder = arguments.runs / f"seed-{seed}"
        overrides = ["+experiment=toy", f"pipeline.rounds={arguments.rounds}", f"pipeline.label_methods=[{METHOD}]",
                     "pipeline.rewards=[]", "pipeline.rl_answers=null", *arguments.overrides, f"run.dir={folder}",
                     f"run.seed={seed}"]
        status = subprocess.call([sys.executable, "-m", "spark_nemo.cli.main", "pipeline", *overrides])
        if status:
            return status
        by_seed[seed] = json.loads((folder / "summary.json").read_text())
    command = " ".join(["python tools/rounds.py --seeds", *map(str, by_seed), f"--rounds {arguments.rounds}",
                        *arguments.overrides])
    update_document(arguments.out, round_section(by_seed, command))
    print(f"{len(by_seed)} seeds: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
