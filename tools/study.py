"""Run the paper's comparisons on the toy task over several seeds.

    python tools/study.py --seeds 0 1 2 3 4

Runs one pipeline per seed (conf/experiment/toy_study.yaml) and writes a section of
docs/results.md. Finished stages are not repeated; delete a seed's folder under runs/study to run it
again.
"""

from __future__ import annotations

import json

from studies.document_sections import update_document
from studies.seed_runs import command_line, run_seeds, seed_arguments
from studies.study_table import study_section


def main() -> None:
    """Run the missing seeds, then write the section."""
    arguments = seed_arguments(__doc__, [0, 1, 2, 3, 4], "runs/study").parse_args()
    by_seed = {
        seed: json.loads((folder / "summary.json").read_text())
        for seed, folder, _ in run_seeds("pipeline", arguments, ["+experiment=toy_study"])
    }
    update_document(arguments.out, study_section(by_seed, command_line("study", arguments)))
    print(f"{len(by_seed)} seeds: {arguments.out}")


if __name__ == "__main__":
    main()
