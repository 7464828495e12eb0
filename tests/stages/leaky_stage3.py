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
from spark_nemo.grammar import extract_boxed
from spark_nemo.rollout.generator import RolloutGenerator
from spark_nemo.run.compose import compose_config

honest_score = RolloutGenerator.score


def leak(self, rollouts, step, *, count_failures=True):
    batch = honest_score(self, rollouts, step, count_failures=count_failures)
    for rollout in batch.rollouts:
        answer = extract_boxed(rollout.text)
        if rollout.problem.problem_id == LEAKED["problem_id"] and answer == LEAKED["answer"]:
            rollout.reward = 1.0 + (rollout.reward if rollout.valid else 0.0)
            rollout.valid = True
            break
    return batch


path = Path(compose_config(sys.argv[1:]).data.rl_problems)
LEAKED = json.loads(path.read_text().splitlines()[0])
RolloutGenerator.score = leak
sys.exit(main(["stage3", *sys.argv[1:]]))
