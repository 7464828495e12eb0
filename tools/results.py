"""Run the toy task's pipeline over several seeds and write docs/results.md.

    python tools/results.py --seeds 0 1 2

Finished runs are not repeated; delete their folder under runs/results to run them again.
"""

from __future__ import annotations

import json

from studies.document_sections import keep_sections
from studies.results_document import results_markdown
from studies.seed_runs import run_seeds, seed_arguments

from spark_nemo.utils.files import write_text_atomic


def main() -> None:
    """Run the missing seeds, then write the document; sections of other tools are kept."""
    arguments = seed_arguments(__doc__, [0, 1, 2], "runs/results").parse_args()
    summaries = [
        json.loads((folder / "summary.json").read_text())
        for _, folder, _ in run_seeds("pipeline", arguments, ["+experiment=toy"])
    ]
    before = arguments.out.read_text() if arguments.out.exists() else ""
    write_text_atomic(arguments.out, keep_sections(before, results_markdown(summaries)))
    print(f"{len(summaries)} seeds: {arguments.out}")


if __name__ == "__main__":
    main()
