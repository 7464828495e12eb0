"""``spark-nemo evaluate``: one line of figures for a model folder."""

from __future__ import annotations

from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.engines.client import run_async
from spark_nemo.engines.served import ServedModel
from spark_nemo.evaluation.answers import read_eval_problems
from spark_nemo.evaluation.bootstrap import Estimate
from spark_nemo.evaluation.critic import score_reward_model
from spark_nemo.evaluation.policy import evaluate_policy
from spark_nemo.grammar import prompt_set


def evaluate_problems(config: SparkConfig, model: str) -> str:
    """Accuracy on ``data.eval_problems``."""
    if not config.data.eval_problems:
        raise ConfigError("data.eval_problems is not set")
    problems = read_eval_problems(config.data.eval_problems)
    served = ServedModel.load(config.engine, model)
    result = run_async(evaluate_policy(served, problems, prompt_set(config.rl.prompt_set), config.evaluation))
    run_async(served.engine.close())
    return (f"{len(problems)} problems: sampled {_shown(result.sampled)} "
            f"(avg@{config.evaluation.samples_per_problem}, T={config.evaluation.temperature}), "
            f"greedy {_shown(result.greedy)}")


def evaluate_processbench(config: SparkConfig, model: str) -> str:
    """ProcessBench scores on ``data.processbench``; every text is saved under run.dir."""
    if not config.data.processbench:
        raise ConfigError("data.processbench is not set")
    # All trained models are called `model`; the folder above tells them apart.
    name = "-".join(Path(model).resolve().parts[-2:])
    output = Path(config.run.dir) / "evaluate" / f"{name}-processbench.json"
    score = score_reward_model(Path(model), config, output)
    return (f"F1 {score.f1:.3f}, accuracy on {score.num_error} erroneous {score.acc_error:.3f}, "
            f"on {score.num_correct} correct {score.acc_correct:.3f}, {score.num_unparsed} unparsed; texts in {output}")


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
