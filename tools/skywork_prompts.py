"""Write the questions of a Skywork-OR1 Parquet file as the JSONL that stages I to III read.

    python tools/skywork_prompts.py skywork_math_8k.parquet data/spark/skywork_8k.jsonl

The answers in the file are not read.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from spark_nemo.records.problems import read_verl_problems
from spark_nemo.records.rows import DataFileError
from spark_nemo.utils.files import write_text_atomic


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 when the file cannot be used; one line on stderr gives the reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parquet", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    try:
        problems = read_verl_problems(arguments.parquet)
    except DataFileError as error:
        print(f"skywork_prompts: error: {error}", file=sys.stderr)
        return 2
    lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems]
    write_text_atomic(arguments.out, "".join(lines))
    print(f"{len(problems)} problems in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
