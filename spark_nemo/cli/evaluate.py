"""``spark-nemo evaluate math|processbench``: score a model, or outputs that were saved before."""

from __future__ import annotations

import argparse
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.evaluation.bootstrap import Estimate


def add_evaluate_arguments(kind: str, command: argparse.ArgumentParser) -> None:
    """``--model`` with a configuration, or ``--predictions`` with ``--data``."""
    many = "+" if kind == "processbench" else None
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hugging Face model folder to ask; needs a configuration")
    source.add_argument("--predictions", nargs=many, metavar="FILE", help="score saved outputs, without a model" + (
        "; several files vote" if many else ""))
    command.add_argument("--data", nargs=many, metavar="FILE", help="what --predictions are about")
    if kind == "math":
        command.add_argument("--benchmark", help="format of --data where its name does not tell, e.g. amc23")
        command.add_argument("--k", nargs="+", type=int, default=[], help="the k of pass@k and maj@k")


def score_saved(kind: str, arguments: argparse.Namespace) -> str:
    """The table for ``--predictions``."""
    if not arguments.data:
        raise ConfigError("--predictions needs --data: the file with the problems the predictions are about")
    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]} has no effect with --predictions: no model is asked")
    try:
        return (_saved_processbench if kind == "processbench" else _saved_math)(arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def score_model(kind: str, config: SparkConfig, arguments: argparse.Namespace) -> str:
    """One line for ``--model``; what it said is saved under ``run.dir/evaluate``."""
    if arguments.data:
        raise ConfigError("--data has no effect with --model: set data.eval_problems or data.processbench")
    score = _model_processbench if kind == "processbench" else _model_math
    return score(config, arguments.model, model_output(kind, config, arguments.model))


def model_output(kind: str, config: SparkConfig, model: str) -> Path:
    """Where ``score_model`` saves what the model said."""
    # All trained models are called `model`; the folder above tells them apart.
    name = "-".join(Path(model).resolve().parts[-2:])
    ending = "processbench.json" if kind == "processbench" else "completions.jsonl"
    return Path(config.run.dir) / "evaluate" / f"{name}-{ending}"


def _saved_processbench(arguments: argparse.Namespace) -> str:
    from spark_nemo.evaluation.predictions import score_saved_predictions

    score = score_saved_predictions(arguments.predictions, arguments.data)
    lines = [f"{'split':<16}{'acc_error':>10}{'acc_correct':>12}{'F1':>8}{'cases':>8}{'unparsed':>10}"]
    for name, split in score.splits.items():
        lines.append(f"{name:<16}{100 * split.acc_error:>10.1f}{100 * split.acc_correct:>12.1f}{100 * split.f1:>8.1f}"
                     f"{split.num_error + split.num_correct:>8}{split.num_unparsed:>10}")
    how = f"majority of {score.votes}" if score.votes > 1 else "one prediction per case"
    return "\n".join([*lines, f"average F1 {100 * score.average:.1f} [{100 * score.interval.low:.1f}, "
                              f"{100 * score.interval.high:.1f}], {how}"])


def _saved_math(arguments: argparse.Namespace) -> str:
    from spark_nemo.evaluation.completions import read_completions, score_completions
    from spark_nemo.evaluation.math_data import read_math

    problems = read_math(arguments.data, arguments.benchmark)
    score = score_completions(read_completions(arguments.predictions), problems, arguments.k)
    return "\n".join([f"{score.problems} problems", *(
        f"{name:<14}{_shown(estimate)}" for name, estimate in score.estimates.items())])


def _model_math(config: SparkConfig, model: str, output: Path) -> str:
    from spark_nemo.engines.client import run_async
    from spark_nemo.engines.served import ServedModel
    from spark_nemo.evaluation.completions import write_completions
    from spark_nemo.evaluation.math_data import read_math
    from spark_nemo.evaluation.policy import evaluate_policy
    from spark_nemo.grammar import prompt_set

    if not config.data.eval_problems:
        raise ConfigError("data.eval_problems is not set")
    problems = read_math(config.data.eval_problems)
    served = ServedModel.load(config.engine, model, "policy", output.parent / "servers")
    try:
        result = run_async(evaluate_policy(served, problems, prompt_set(config.rl.prompt_set), config.evaluation))
    finally:
        run_async(served.engine.close())
    write_completions(output, result.completions)
    return (f"{len(problems)} problems: sampled {_shown(result.sampled)} "
            f"(avg@{config.evaluation.samples_per_problem}, T={config.evaluation.temperature}), "
            f"greedy {_shown(result.greedy)}; score again with: spark-nemo evaluate math --predictions {output} "
            f"--data {config.data.eval_problems}")


def _model_processbench(config: SparkConfig, model: str, output: Path) -> str:
    from spark_nemo.evaluation.critic import score_reward_model

    if not config.data.processbench:
        raise ConfigError("data.processbench is not set")
    score = score_reward_model(Path(model), config, output)
    return (f"F1 {score.f1:.3f}, accuracy on {score.num_error} erroneous {score.acc_error:.3f}, "
            f"on {score.num_correct} correct {score.acc_correct:.3f}, {score.num_unparsed} unparsed; score again with: "
            f"spark-nemo evaluate processbench --predictions {output} --data {config.data.processbench}")


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
