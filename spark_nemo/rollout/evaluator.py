"""True accuracy of the policy on held-out problems, at the steps between training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.evaluation.accuracy import problem_rates
from spark_nemo.evaluation.answers import EvalProblem
from spark_nemo.evaluation.policy_accuracy import PolicyAccuracy, evaluate_policy
from spark_nemo.megatron.process_groups import only_on_main_rank

from .manager import RolloutManager
from .reward_hacking_monitor import HACKING
from .samples import rewrite_rows

EVALUATIONS = "evaluations.jsonl"


class Evaluator:
    """Evaluates the policy that the rollout engines serve. Every rank has one."""

    def __init__(
        self,
        config: SparkConfig,
        rollouts: RolloutManager,
        problems: Sequence[EvalProblem],
        folder: Path,
    ) -> None:
        self._config = config
        self._rollouts = rollouts
        self._problems = problems
        self._folder = folder

    def run(self, step: int) -> PolicyAccuracy | None:
        """Evaluate and write a row of evaluations.jsonl; None off the main rank. Collective."""
        return only_on_main_rank(lambda: run_async(self._run(step)))

    async def _run(self, step: int) -> PolicyAccuracy:
        worker = self._rollouts.worker
        assert worker is not None, "only the main rank evaluates"
        accuracy = await evaluate_policy(
            worker.engines.policy,
            self._problems,
            worker.generator.prompts,
            self._config.evaluation,
        )
        row = {
            "step": step,
            "sampled": accuracy.sampled._asdict(),
            "greedy": accuracy.greedy._asdict(),
            "num_tokens": accuracy.num_tokens,
            "rates": problem_rates(accuracy.samples),
        }
        rewrite_rows(self._folder / EVALUATIONS, step, [row])
        probes = await worker.monitor.probe([each.problem for each in self._problems], step)
        if probes:
            rewrite_rows(self._folder / HACKING, step, probes)
        return accuracy
