"""A generative reward model as ProcessBench critic: prompts, generations, predictions, score; every text is saved."""

from __future__ import annotations

import asyncio
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.engines.base import EngineFailure, EngineLost
from spark_nemo.engines.served import ServedModel
from spark_nemo.grammar import Variant, legal_step_text, parse_generation, prompt_set, render_solution
from spark_nemo.records import EngineError, derive_seed, outcome_kind, outcome_to_json
from spark_nemo.records.jsonl import write_json_atomic

from .processbench import (
    ProcessBenchCase,
    ProcessBenchScore,
    predict_first_error,
    read_processbench,
    score_processbench,
)


def score_reward_model(model: Path, config: SparkConfig, output: Path) -> ProcessBenchScore:
    """Judge every case of ``data.processbench`` with the PRM or PRM-CoT in ``model``; predictions go to ``output``.

    A generation that is no verdict counts as a wrong prediction, as the benchmark's rule is, and is counted by kind.
    Raises ``EngineFailure`` when the engine stopped on the way.
    """
    cases = read_processbench(config.data.processbench)
    served = ServedModel.load(config.engine, model, "verifier", output.parent / "servers")
    rows = asyncio.run(_judge_all(served, cases, config))
    score = score_processbench([case.label for case in cases], [row["prediction"] for row in rows])
    write_json_atomic(output, {
        "f1": score.f1, "acc_error": score.acc_error, "acc_correct": score.acc_correct,
        "num_error": score.num_error, "num_correct": score.num_correct, "num_unparsed": score.num_unparsed,
        "num_tokens": sum(row["num_tokens"] for row in rows), "cases": rows,
    })
    return score


async def _judge_all(served: ServedModel, cases: list[ProcessBenchCase], config: SparkConfig) -> list[dict]:
    slots = asyncio.Semaphore(2 * config.engine.slots("verifier"))
    prompts, variant = prompt_set(config.stage1.prompt_set), Variant(config.stage2.variant)

    async def judge(case: ProcessBenchCase) -> dict:
        solution = render_solution([legal_step_text(step) for step in case.steps], None)
        messages = prompts.reward(variant, case.problem, solution)
        text, num_tokens = "", 0
        async with slots:
            try:
                seed = derive_seed("critic", case.case_id)
                done = await served.complete(messages, config.stage2.eval_sampling, seed)
                text, num_tokens = done.text, len(done.generation.token_ids)
                reason = str(done.generation.finish_reason)
                outcome = parse_generation(text, reason, num_tokens, len(case.steps), variant)
            except EngineLost:
                raise
            except EngineFailure as failure:
                outcome = EngineError(str(failure))
        return {"id": case.case_id, "label": case.label, "prediction": predict_first_error(outcome), "text": text,
                "kind": outcome_kind(outcome), "outcome": outcome_to_json(outcome), "num_tokens": num_tokens}

    try:
        rows = await asyncio.gather(*(judge(case) for case in cases))
        if not (await served.engine.health()).alive:
            raise EngineFailure("the engine stopped during the reward model's evaluation: there is no score, run again")
        return rows
    finally:
        await served.engine.close()
