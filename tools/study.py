"""Run the paper's comparisons on the small world over several seeds: a section of docs/results.md.

    python tools/study.py --seeds 0 1 2 3 4

One pipeline a seed (conf/experiment/toy_study.yaml). Parts that are finished already are not run
again; delete a seed's folder under runs/study to repeat it.
"""

from __future__ import annotations

import json

from studies.document_sections import update_document
from studies.seed_runs import run_seeds, seed_arguments
from studies.study_table import study_section


def main() -> None:
    """Run what is missing, then write the section."""
    arguments = seed_arguments(__doc__, [0, 1, 2, 3, 4], "runs/study").parse_args()
    by_seed = {
        seed: json.loads((folder / "summary.json").read_text())
        for seed, folder, _ in run_seeds("pipeline", arguments, ["+experiment=toy_study"])
    }
    command = " ".join(["python tools/study.py --seeds", *map(str, by_seed), *arguments.overrides])
    update_document(arguments.out, study_section(by_seed, command))
    print(f"{len(by_seed)} seeds: {arguments.out}")


if __name__ == "__main__":
    main()
