"""Score a generative reward model on ProcessBench-format cases, and save its texts.

A PRM or PRM-CoT gets the ProcessBench score. An ORM names no step and has a score and a file of
its own.
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
    """Predict the first error of every case of ``data.processbench`` with a PRM or PRM-CoT.

    Writes the predictions to ``output``. A generation without a verdict is a wrong prediction, as
    in the benchmark, and is counted by kind. Raises ``EngineFailure`` when the engine stops on the
    way, and ``ConfigError`` for an ORM.
    """
    check_names_steps(config.stage2.variant)
    cases, rows = _judged_cases(model, config, output)
    for row in rows:
        row["prediction"] = predict_first_error(outcome_from_json(row["outcome"]))
    score = score_processbench([case.label for case in cases], [row["prediction"] for row in rows])
    _write_scores(output, score.as_json(), rows)
    return score


def score_orm(model: Path, config: SparkConfig, output: Path) -> WholeSolutionScore:
    """Ask an ORM about every case of ``data.processbench``, and write its verdicts to ``output``.

    A generation without a verdict counts as wrong, and is counted by kind. Raises
    ``EngineFailure`` when the engine stops on the way.
    """
    cases, rows = _judged_cases(model, config, output)
    verdicts = [final_verdict(outcome_from_json(row["outcome"])) for row in rows]
    score = score_whole_solutions([case.label for case in cases], verdicts)
    _write_scores(output, score.as_json(), rows)
    return score


def _judged_cases(
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
            votes=1,
            in_flight=2 * config.engine.slots("verifier"),
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


def _write_scores(output: Path, figures: dict[str, float], rows: list[dict]) -> None:
    num_tokens = sum(row["num_tokens"] for row in rows)
    write_json_atomic(output, figures | {"num_tokens": num_tokens, "cases": rows})
