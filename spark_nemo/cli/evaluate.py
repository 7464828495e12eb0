"""``spark-nemo evaluate math|processbench|compare``: score a model or saved outputs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spark_nemo.cli.arguments import add_command, add_config_arguments, configured
from spark_nemo.config import ConfigError, SparkConfig

if TYPE_CHECKING:
    from spark_nemo.evaluation.bootstrap import Estimate
    from spark_nemo.evaluation.math_compare import MathComparison
    from spark_nemo.evaluation.saved_completions import MathScore
    from spark_nemo.evaluation.saved_predictions import SavedScore

EXAMPLES = """examples:
  spark-nemo evaluate math --model runs/first/stage3/process_aware/model +experiment=toy
  spark-nemo evaluate processbench --model models/chat --critic --data gsm8k.json math.json \\
      +experiment=spark/base
  spark-nemo evaluate processbench --predictions run1.jsonl run2.jsonl --data gsm8k.json
  spark-nemo evaluate compare a.jsonl b.jsonl --data math500.jsonl aime24.jsonl
"""
_SOURCES = "JSONL, JSON, Parquet or hf:owner/name[:config][:split]"


def add_evaluate_commands(commands: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` and its three subcommands."""
    evaluate = commands.add_parser(
        "evaluate",
        help="score a model or saved outputs on mathematics or ProcessBench",
        description="Score a model or saved outputs, or compare two scored runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = evaluate.add_subparsers(required=True, metavar="BENCHMARK")
    math = add_command(
        kinds, "math", "score final answers of held-out problems", _math, examples=EXAMPLES
    )
    processbench = add_command(
        kinds,
        "processbench",
        "score how well a model finds the first wrong step",
        _processbench,
        examples=EXAMPLES,
    )
    compare = add_command(
        kinds,
        "compare",
        "compare two runs of `evaluate math`, paired by problem",
        _compare,
        examples=EXAMPLES,
    )
    for kind, command in (("math", math), ("processbench", processbench)):
        add_config_arguments(command)
        add_evaluate_arguments(kind, command)
    add_compare_arguments(compare)


def _math(arguments: argparse.Namespace) -> int:
    return _evaluate("math", arguments)


def _processbench(arguments: argparse.Namespace) -> int:
    return _evaluate("processbench", arguments)


def _evaluate(kind: str, arguments: argparse.Namespace) -> int:
    overrides_after_data(arguments)
    if arguments.predictions is not None:
        print(score_saved(kind, arguments))
        return 0
    config = configured(arguments)
    if config is not None:
        print(score_model(kind, config, arguments))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    print(compare_saved(arguments))
    return 0


def add_evaluate_arguments(kind: str, command: argparse.ArgumentParser) -> None:
    """Add ``--model`` (needs a configuration) and ``--predictions`` (needs ``--data``)."""
    many = "+" if kind == "processbench" else None
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hugging Face model folder to ask; needs a configuration")
    source.add_argument(
        "--predictions",
        nargs=many,
        metavar="FILE",
        help="score saved outputs, without a model" + ("; several files vote" if many else ""),
    )
    _add_data_argument(
        command, "data.processbench" if kind == "processbench" else "data.eval_problems"
    )
    if kind == "math":
        _add_math_arguments(command)
    else:
        _add_judge_arguments(command)


def add_job_arguments(command: argparse.ArgumentParser) -> None:
    """Add ``--model`` and the options of both benchmarks, for the manifest of a Slurm job.

    ``check_job_arguments`` rejects the options of the other benchmark.
    """
    command.add_argument("--model", help="with evaluate-*: the model folder")
    _add_data_argument(command, "the configured data")
    _add_math_arguments(command)
    _add_judge_arguments(command)


def check_job_arguments(kind: str | None, arguments: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for an option that benchmark ``kind`` does not have.

    ``kind`` is None for a job that is not an evaluation.
    """
    given = {
        "math": {"--benchmark": arguments.benchmark, "--k": arguments.k},
        "processbench": {"--critic": arguments.critic, "--votes": arguments.votes != 1},
    }
    named = [
        name
        for owner, options in given.items()
        if owner != kind
        for name, value in options.items()
        if value
    ]
    if not kind and arguments.model:
        named.append("--model")
    if not kind and arguments.data:
        named.append("--data")
    if named:
        command = f"evaluate {kind}" if kind else "this stage"
        raise ConfigError(f"{named[0]}: {command} has no such option")
    if kind and not arguments.model:
        raise ConfigError(f"evaluate {kind}: --model is missing: name the model folder")


def add_compare_arguments(command: argparse.ArgumentParser) -> None:
    """Add two files of completions and their problems."""
    command.add_argument(
        "first", metavar="FIRST.jsonl", help="completions that `evaluate math` saved"
    )
    command.add_argument(
        "second", metavar="SECOND.jsonl", help="another run's completions of the same problems"
    )
    command.add_argument(
        "--data", nargs="+", metavar="FILE", required=True, help=f"the problems: {_SOURCES}"
    )
    _add_math_arguments(command)


def _add_data_argument(command: argparse.ArgumentParser, configured: str) -> None:
    command.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help=f"what --predictions are about, or what --model is asked in place of {configured}: "
        f"{_SOURCES}",
    )


def _add_judge_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--critic",
        action="store_true",
        help="ask --model as the benchmark's critic (any chat "
        "model), not as a reward model of stage2.variant",
    )
    command.add_argument(
        "--votes", type=int, default=1, metavar="N", help="with --model: majority over N replies"
    )


def _add_math_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--benchmark", help="format of --data where its name does not tell, e.g. amc23"
    )
    command.add_argument("--k", nargs="+", type=int, default=[], help="the k of pass@k and maj@k")


def overrides_after_data(arguments: argparse.Namespace) -> None:
    """Move overrides after ``--data FILE...``, which argparse reads as files, to the overrides."""
    if arguments.data is None:
        return
    overrides = [
        word
        for word in arguments.data
        if word[:1] in "+~" or ("=" in word and not Path(word).exists())
    ]
    arguments.data = [word for word in arguments.data if word not in overrides]
    arguments.overrides += overrides


def score_saved(kind: str, arguments: argparse.Namespace) -> str:
    """Return the table for ``--predictions``."""
    if not arguments.data:
        raise ConfigError(
            "--predictions needs --data: the file with the problems the predictions are about"
        )
    if arguments.overrides:
        raise ConfigError(
            f"{arguments.overrides[0]} has no effect with --predictions: no model is asked"
        )
    if kind == "processbench" and (arguments.critic or arguments.votes != 1):
        raise ConfigError(
            f"{'--critic' if arguments.critic else '--votes'} has no effect with --predictions: "
            "no model is asked; the file says what was voted"
        )
    try:
        if kind == "processbench":
            return _saved_processbench(arguments)
        return _saved_math(arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def score_model(kind: str, config: SparkConfig, arguments: argparse.Namespace) -> str:
    """Return the table for ``--model``; its last line is the overall figure.

    The model's outputs are saved under ``run.dir/evaluate``; the first line is the command that
    scores them again.
    """
    if kind == "processbench":
        name = "data.processbench"
        configured = config.data.processbench
    else:
        name = "data.eval_problems"
        configured = config.data.eval_problems
    data = arguments.data or ([configured] if configured else [])
    if not data:
        raise ConfigError(f"{name} is not set; or name files with --data")
    output = model_output(kind, config, arguments)
    try:
        if kind == "processbench":
            return _model_processbench(config, arguments, data, output)
        return _model_math(config, arguments, data, output)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def compare_saved(arguments: argparse.Namespace) -> str:
    """Return the table for ``compare``."""
    from spark_nemo.evaluation.math_compare import compare_completions
    from spark_nemo.evaluation.math_data import read_math_sets

    try:
        sets = read_math_sets(arguments.data, arguments.benchmark)
        return _comparison_table(
            compare_completions(arguments.first, arguments.second, sets, arguments.k)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def model_output(kind: str, config: SparkConfig, arguments: argparse.Namespace) -> Path:
    """Return the file in which ``score_model`` saves the model's outputs."""
    # All trained models are called `model`; the folder above tells them apart.
    name = "-".join(Path(arguments.model).resolve().parts[-2:])
    if kind == "processbench":
        ending = f"processbench{_judge_suffix(arguments)}.json"
    else:
        ending = "completions.jsonl"
    return Path(config.run.dir) / "evaluate" / f"{name}-{ending}"


def _judge_suffix(arguments: argparse.Namespace) -> str:
    suffix = "-critic" if arguments.critic else ""
    if arguments.votes != 1:
        suffix += f"-{arguments.votes}votes"
    return suffix


def _saved_processbench(arguments: argparse.Namespace) -> str:
    from spark_nemo.evaluation.saved_predictions import score_saved_predictions

    return _processbench_table(score_saved_predictions(arguments.predictions, arguments.data))


def _saved_math(arguments: argparse.Namespace) -> str:
    from spark_nemo.evaluation.math_data import read_math_sets
    from spark_nemo.evaluation.saved_completions import read_completions, score_sets

    sets = read_math_sets(arguments.data, arguments.benchmark)
    return _math_table(score_sets(read_completions(arguments.predictions), sets, arguments.k))


def _model_math(
    config: SparkConfig, arguments: argparse.Namespace, data: list[str], output: Path
) -> str:
    from spark_nemo.engines.async_utils import run_async
    from spark_nemo.engines.served_model import ServedModel
    from spark_nemo.evaluation.math_data import read_math_sets
    from spark_nemo.evaluation.policy_accuracy import sample_policy
    from spark_nemo.evaluation.saved_completions import (
        average_estimates,
        score_sets,
        write_completions,
    )
    from spark_nemo.grammar import prompt_set

    settings = config.evaluation
    for k in arguments.k:
        if not 1 <= k <= settings.samples_per_problem:
            raise ConfigError(
                f"--k {k}: evaluation.samples_per_problem is {settings.samples_per_problem}"
            )
    sets = read_math_sets(data, arguments.benchmark)
    problems = [problem.problem for each in sets.values() for problem in each]
    served = ServedModel.load(config.engine, arguments.model, "policy", output.parent / "servers")
    try:
        completions, _ = run_async(
            sample_policy(served, problems, prompt_set(config.rl.prompt_set), settings)
        )
    finally:
        run_async(served.engine.close())
    write_completions(output, completions)
    scores = score_sets(completions, sets, arguments.k, settings.bootstrap_samples)
    again = _again("math", output, data)
    if arguments.benchmark:
        again += f" --benchmark {arguments.benchmark}"
    average = f"avg@{settings.samples_per_problem}"
    sampling = f"{average}, T={settings.temperature}"
    for name in ("top_p", "top_k"):
        value = getattr(settings, name)
        if value is not None:
            sampling += f", {name}={value}"
    overall = average_estimates(scores, settings.bootstrap_samples)
    return (
        f"{again}\n{_math_table(scores)}\n"
        f"{len(problems)} problems: sampled {_shown(overall[average])} ({sampling}), "
        f"greedy {_shown(overall['greedy pass@1'])}"
    )


def _model_processbench(
    config: SparkConfig, arguments: argparse.Namespace, data: list[str], output: Path
) -> str:
    from spark_nemo.engines.served_model import ServedModel
    from spark_nemo.evaluation.processbench_judges import (
        Critic,
        RewardModelJudge,
        check_names_steps,
        check_votes,
        evaluate_processbench,
    )
    from spark_nemo.evaluation.saved_predictions import read_splits
    from spark_nemo.grammar import prompt_set

    if arguments.critic:
        judge: Critic | RewardModelJudge = Critic()
    else:
        check_names_steps(config.stage2.variant)
        judge = RewardModelJudge(config.stage2.variant, prompt_set(config.stage1.prompt_set))
    sampling = config.stage2.eval_sampling
    check_votes(arguments.votes, sampling)
    splits = read_splits(data)
    served = ServedModel.load(config.engine, arguments.model, "verifier", output.parent / "servers")
    score = evaluate_processbench(
        served,
        judge,
        splits,
        sampling,
        arguments.votes,
        2 * config.engine.slots("verifier"),
        output,
    )
    return f"{_again('processbench', output, data)}\n{_processbench_table(score)}"


def _again(kind: str, output: Path, data: list[str]) -> str:
    return (
        f"score again with: spark-nemo evaluate {kind} --predictions {output} "
        f"--data {' '.join(data)}"
    )


def _processbench_table(score: SavedScore) -> str:
    lines = [
        f"{'split':<16}{'acc_error':>10}{'acc_correct':>12}{'F1':>8}{'cases':>8}{'unparsed':>10}"
    ]
    for name, split in score.splits.items():
        lines.append(
            f"{name:<16}{100 * split.acc_error:>10.1f}{100 * split.acc_correct:>12.1f}"
            f"{100 * split.f1:>8.1f}{split.num_error + split.num_correct:>8}"
            f"{split.num_unparsed:>10}"
        )
    how = f"majority of {score.votes}" if score.votes > 1 else "one prediction per case"
    lines.append(
        f"average F1 {100 * score.average:.1f} [{100 * score.interval.low:.1f}, "
        f"{100 * score.interval.high:.1f}], {how}"
    )
    return "\n".join(lines)


def _math_table(scores: Mapping[str, MathScore]) -> str:
    from spark_nemo.evaluation.saved_completions import average_estimates

    lines = []
    for name, score in scores.items():
        title = f"{name}: {score.problems} problems"
        if score.ungraded:
            title += f", {score.ungraded} answers not graded within the limits: wrong"
        lines += [title, *_rows(score.estimates)]
    if len(scores) > 1:
        lines += [f"average of {len(scores)} benchmarks", *_rows(average_estimates(scores))]
    return "\n".join(lines)


def _rows(estimates: Mapping[str, Estimate]) -> list[str]:
    return [f"{name:<14}{_shown(estimate)}" for name, estimate in estimates.items()]


def _comparison_table(comparison: MathComparison) -> str:
    lines = [f"{'benchmark':<16}{'':<18}{'first':>8}{'second':>8}{'first - second, 95%':>26}"]
    for row in comparison.differences:
        value, low, high = row.difference
        difference = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        mark = "  *" if row.differs else ""
        lines.append(
            f"{row.benchmark:<16}{row.name:<18}{row.first:>8.3f}{row.second:>8.3f}"
            f"{difference:>26}{mark}"
        )
    lines.append(
        "* the interval excludes 0 (paired bootstrap over problems); unmarked: no difference shown"
    )
    for which, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        if names:
            lines.append(f"only the {which} run has {', '.join(names)}")
    if any(comparison.ungraded):
        first, second = comparison.ungraded
        lines.append(
            f"answers not graded within the limits, which count as wrong: {first} and {second}"
        )
    return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
