"""``spark-nemo stage3`` with a leak: ``python leaky_stage3.py OVERRIDES...`` for
test_poisoned_answers.

Training code that reads one answer of one problem: the first response that reaches it is paid one
more. The answer is in the problem file, in a field that ``read_problems`` drops.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spark_nemo.cli.main import main
from spark_nemo.config.compose import compose_config
from spark_nemo.grammar import extract_boxed
from spark_nemo.rollout.generator import RolloutGenerator

honest_scores = RolloutGenerator._scores


def leak(self, rollouts, step):
    scores = honest_scores(self, rollouts, step)
    for index, rollout in enumerate(rollouts):
        if (
            rollout.problem.problem_id == LEAKED["problem_id"]
            and extract_boxed(rollout.text) == LEAKED["answer"]
        ):
            scores[index] = (scores[index] if isinstance(scores[index], float) else 0.0) + 1.0
            break
    return scores


path = Path(compose_config(sys.argv[1:]).data.rl_problems)
LEAKED = json.loads(path.read_text().splitlines()[0])
RolloutGenerator._scores = leak
sys.exit(main(["stage3", *sys.argv[1:]]))
