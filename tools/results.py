"""Run the small world's pipeline over several seeds and write docs/results.md from what came out.

    python tools/results.py --seeds 0 1 2

Runs that are finished already are not run again; delete their folder under runs/results to repeat them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from spark_nemo.records.jsonl import write_text_atomic
from spark_nemo.report.label_table import keep_label_section
from spark_nemo.report.results import results_markdown

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Returns the exit status of the first run that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    arguments = parser.parse_args()
    summaries = []
    for seed in arguments.seeds:
        folder = arguments.runs / f"seed-{seed}"
        overrides = ["+experiment=toy", *arguments.overrides, f"run.dir={folder}", f"run.seed={seed}"]
        status = subprocess.call([sys.executable, "-m", "spark_nemo.cli.main", "pipeline", *overrides])
        if status:
            return status
        summaries.append(json.loads((folder / "summary.json").read_text()))
    before = arguments.out.read_text() if arguments.out.exists() else ""
    write_text_atomic(arguments.out, keep_label_section(before, results_markdown(summaries)))
    print(f"{len(summaries)} seeds: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
