"""``spark-nemo plan`` from a checkout: python tools/plan.py --help."""

from __future__ import annotations

import sys

from spark_nemo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
