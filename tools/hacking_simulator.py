"""Train policies against reward models with one planted weakness each, over several seeds.

Each exploit is run without the constraint that closes it and with it. Writes a section of
docs/results.md.

    python tools/hacking_simulator.py --seeds 0 1 2

Takes about twenty minutes on one core. It can be interrupted at any time: finished runs are not
repeated; delete their folder under runs/hacking to run them again. --minutes ends it after the run
that passes that time.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from studies.document_sections import update_document
from studies.exploits import BY_NAME
from studies.hacking_runs import SimulatorRun, run_simulator, simulator_config
from studies.hacking_table import ExploitRow, Outcome, hacking_section

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Return 0 when the table is written, 3 when --minutes passed before the last run."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.ERROR)
    started = time.monotonic()
    outcomes: dict[SimulatorRun, Outcome] = {}
    for seed in arguments.seeds:
        for exploit in arguments.exploits:
            for constrained in (False, True):
                run = SimulatorRun(exploit, constrained, seed)
                outcomes[run] = run_simulator(run, arguments.runs)
                figures = [f"{key} {value:.3f}" for key, value in outcomes[run].items()]
                print(f"{run.name}: {', '.join(figures)}", flush=True)
                seconds = time.monotonic() - started
                if arguments.minutes is not None and seconds > 60 * arguments.minutes:
                    print("the time is up: rerun the same command to continue")
                    return 3
    rows = [exploit_row(exploit, outcomes, arguments.seeds) for exploit in arguments.exploits]
    first = SimulatorRun(arguments.exploits[0], constrained=False, seed=arguments.seeds[0])
    rl = simulator_config(first, arguments.runs).rl
    command = " ".join(["python tools/hacking_simulator.py --seeds", *map(str, arguments.seeds)])
    section = hacking_section(
        rows, command, steps=rl.steps, responses=rl.prompts_per_step * rl.group_size
    )
    update_document(arguments.out, section)
    print(f"{len(rows)} exploits, {len(arguments.seeds)} seeds: {arguments.out}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--exploits", nargs="+", default=list(BY_NAME), choices=list(BY_NAME))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/hacking"), help="folder for the runs"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop after the run that passes this time; rerun the command to continue",
    )
    return parser.parse_args()


def exploit_row(name: str, outcomes: dict[SimulatorRun, Outcome], seeds: list[int]) -> ExploitRow:
    """Return an exploit's row of the table."""
    exploit = BY_NAME[name]
    settings = [f"`{key}={str(value).lower()}`" for key, value in exploit.closed_by.items()]
    return ExploitRow(
        name=name,
        weakness=exploit.weakness,
        constraint=", ".join(settings),
        share=exploit.share,
        without=[outcomes[SimulatorRun(name, False, seed)] for seed in seeds],
        constrained=[outcomes[SimulatorRun(name, True, seed)] for seed in seeds],
    )


if __name__ == "__main__":
    sys.exit(main())
