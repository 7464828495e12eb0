"""Train policies against reward models with one planted weakness each, without the constraint that
closes it and with it, over several seeds: a section of docs/results.md.

    python tools/hacking_simulator.py --seeds 0 1 2

About twenty minutes on one core. Arms that are finished are not run again, so that it can be
interrupted at any time; delete their folder under runs/hacking to repeat them. --minutes ends it
after the arm that passes that time.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from studies.document_sections import update_document
from studies.exploits import BY_NAME
from studies.hacking_runs import SimulatorRun, arm_config, run_arm
from studies.hacking_table import ExploitRow, hacking_section

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """0 with the table written, 3 when time ran out before the last arm."""
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
        "--minutes", type=float, default=None, help="stop after this time; the same command goes on"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    started, outcomes = time.monotonic(), {}
    for arm in [
        SimulatorRun(name, constrained, seed)
        for seed in arguments.seeds
        for name in arguments.exploits
        for constrained in (False, True)
    ]:
        outcomes[arm] = run_arm(arm, arguments.runs)
        print(
            f"{arm.name}: "
            + ", ".join(f"{key} {value:.3f}" for key, value in outcomes[arm].items()),
            flush=True,
        )
        if arguments.minutes is not None and time.monotonic() - started > 60 * arguments.minutes:
            print("time is over: the same command goes on")
            return 3
    rows = []
    for name in arguments.exploits:
        exploit = BY_NAME[name]
        without, constrained = (
            [outcomes[SimulatorRun(name, on, seed)] for seed in arguments.seeds]
            for on in (False, True)
        )
        settings = ", ".join(
            f"`{key}={str(value).lower()}`" for key, value in exploit.closed_by.items()
        )
        rows.append(ExploitRow(name, exploit.says, settings, exploit.share, without, constrained))
    rl = arm_config(
        SimulatorRun(arguments.exploits[0], False, arguments.seeds[0]), arguments.runs
    ).rl
    command = " ".join(["python tools/hacking_simulator.py --seeds", *map(str, arguments.seeds)])
    update_document(
        arguments.out,
        hacking_section(
            rows, command, steps=rl.steps, responses=rl.prompts_per_step * rl.group_size
        ),
    )
    print(f"{len(rows)} exploits, {len(arguments.seeds)} seeds: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
