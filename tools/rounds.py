"""Run the small world's stages I and II in rounds, where each round's reward model verifies in the
next, over several seeds, and compare labels and reward models round by round: a section of
docs/results.md.

    python tools/rounds.py --seeds 0 1 2 --rounds 3

Runs that are finished already are not run again; delete their folder under runs/rounds to repeat
them.
"""

from __future__ import annotations

import json

from studies.document_sections import update_document
from studies.round_table import round_section
from studies.seed_runs import run_seeds, seed_arguments

METHOD = "step_consistency"


def main() -> None:
    """Run what is missing, then write the section."""
    parser = seed_arguments(__doc__, [0, 1, 2], "runs/rounds")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    overrides = [
        "+experiment=toy",
        f"pipeline.rounds={arguments.rounds}",
        f"pipeline.label_methods=[{METHOD}]",
        "pipeline.rewards=[]",
        "pipeline.rl_answers=null",
    ]
    by_seed = {
        seed: json.loads((folder / "summary.json").read_text())
        for seed, folder, _ in run_seeds("pipeline", arguments, overrides)
    }
    command = " ".join(
        [
            "python tools/rounds.py --seeds",
            *map(str, by_seed),
            f"--rounds {arguments.rounds}",
            *arguments.overrides,
        ]
    )
    update_document(arguments.out, round_section(by_seed, command))
    print(f"{len(by_seed)} seeds: {arguments.out}")


if __name__ == "__main__":
    main()
