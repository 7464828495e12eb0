"""Compare labels and reward models round by round on the toy task, over several seeds.

Runs stages I and II in rounds, where each round's reward model verifies in the next, and writes a
section of docs/results.md.

    python tools/rounds.py --seeds 0 1 2 --rounds 3

Finished runs are not repeated; delete their folder under runs/rounds to run them again.
"""

from __future__ import annotations

import json

from studies.document_sections import update_document
from studies.round_table import round_section
from studies.seed_runs import command_line, run_seeds, seed_arguments

METHOD = "step_consistency"


def main() -> None:
    """Run the missing seeds, then write the section."""
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
    command = command_line("rounds", arguments, f"--rounds {arguments.rounds}")
    update_document(arguments.out, round_section(by_seed, command))
    print(f"{len(by_seed)} seeds: {arguments.out}")


if __name__ == "__main__":
    main()
