"""A generative reward model on ProcessBench-format cases: prompts, generations, predictions, score;
texts are saved.

A PRM or PRM-CoT is a ProcessBench critic. An ORM is not, and has a score and a file of its own.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import Variant, parse_verifier_output, prompt_set
from spark_nemo.records import EngineError, outcome_from_json, outcome_kind, outcome_to_json
from spark_nemo.utils.files import write_json_atomic

from .processbench import (
    ProcessBenchCase,
    ProcessBenchScore,
    predict_first_error,
    read_processbench,
    score_processbench,
)
from .processbench_judges import RewardModelJudge, ask_all, check_names_steps
from .whole_solution_score import WholeSolutionScore, final_verdict, score_whole_solutions


def score_prm(model: Path, config: SparkConfig, output: Path) -> ProcessBenchScore:
    """Judge every case of ``data.processbench`` with the PRM or PRM-CoT in ``model``; predictions
    go to ``output``.

    A generation that is no verdict counts as a wrong prediction, as the benchmark's rule is, and is
    counted by kind. Raises ``EngineFailure`` when the engine stopped on the way, ``ConfigError``
    for an ORM.
    """
    check_names_steps(config.stage2.variant)
    cases, rows = _judged(model, config, output)
    for row in rows:
        row["prediction"] = predict_first_error(outcome_from_json(row["outcome"]))
    score = score_processbench([case.label for case in cases], [row["prediction"] for row in rows])
    write_json_atomic(
        output,
        {
            "f1": score.f1,
            "acc_error": score.acc_error,
            "acc_correct": score.acc_correct,
            "num_error": score.num_error,
            "num_correct": score.num_correct,
            "num_unparsed": score.num_unparsed,
            "num_tokens": sum(row["num_tokens"] for row in rows),
            "cases": rows,
        },
    )
    return score


def score_orm(model: Path, config: SparkConfig, output: Path) -> WholeSolutionScore:
    """Ask the ORM in ``model`` about every case of ``data.processbench``; what it said goes to
    ``output``.

    A generation that is no verdict counts as wrong and is counted. Raises ``EngineFailure`` like
    the other.
    """
    cases, rows = _judged(model, config, output)
    score = score_whole_solutions(
        [case.label for case in cases],
        [final_verdict(outcome_from_json(row["outcome"])) for row in rows],
    )
    write_json_atomic(
        output,
        {
            "verdict_harmonic_mean": score.verdict_harmonic_mean,
            "verdict_acc_error": score.verdict_acc_error,
            "verdict_acc_correct": score.verdict_acc_correct,
            "num_error": score.num_error,
            "num_correct": score.num_correct,
            "num_unparsed": score.num_unparsed,
            "num_tokens": sum(row["num_tokens"] for row in rows),
            "cases": rows,
        },
    )
    return score


def _judged(
    model: Path, config: SparkConfig, output: Path
) -> tuple[list[ProcessBenchCase], list[dict]]:
    cases = read_processbench(config.data.processbench)
    served = ServedModel.load(config.engine, model, "verifier", output.parent / "servers")
    return cases, asyncio.run(_judge_all(served, cases, config))


async def _judge_all(
    served: ServedModel, cases: list[ProcessBenchCase], config: SparkConfig
) -> list[dict]:
    variant = Variant(config.stage2.variant)
    judge = RewardModelJudge(variant, prompt_set(config.stage1.prompt_set))
    try:
        replies = await ask_all(
            served,
            cases,
            judge.messages,
            config.stage2.eval_sampling,
            1,
            2 * config.engine.slots("verifier"),
        )
    finally:
        await served.engine.close()
    rows = []
    for case, [reply] in zip(cases, replies):
        if reply.finish_reason is None:
            outcome = EngineError(reply.error)
        else:
            outcome = parse_verifier_output(
                reply.text, reply.finish_reason, reply.num_tokens, len(case.steps), variant
            )
        rows.append(
            {
                "id": case.case_id,
                "label": case.label,
                "text": reply.text,
                "kind": outcome_kind(outcome),
                "outcome": outcome_to_json(outcome),
                "num_tokens": reply.num_tokens,
            }
        )
    return rows
