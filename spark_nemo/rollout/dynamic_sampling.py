"""Dynamic sampling: start more prompts than a step needs and replace groups that train nothing.

Source: DAPO, arXiv 2503.14476, section 3.2. Which groups are kept depends on their content and on
the prompts' order, never on which finished first, so a repeated or resumed run keeps the same ones:
group n is examined after all groups before it, and the first ``prompts_per_step`` useful ones are
kept. Groups behind the last kept one cannot change that choice and are aborted; their prompts are
the next step's first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial

import torch

from spark_nemo.config import RLConfig
from spark_nemo.engines.async_utils import until_idle
from spark_nemo.records import Problem, Rollout
from spark_nemo.training.advantage_estimator import compute_advantages

from .batch import RolloutBatch
from .generator import RolloutGenerator

log = logging.getLogger(__name__)
MIN_ADVANTAGE = 1e-6
"""A smaller |advantage| is rounding: the mean of equal rewards need not be exactly the reward."""

Group = list[Rollout]


def max_prompts(config: RLConfig) -> int:
    """Return the largest number of prompts that one step can start."""
    return config.rollout.filter.max_rounds * config.rollout.filter.started(config.prompts_per_step)


async def dynamic_batch(
    generator: RolloutGenerator, problems: Sequence[Problem], step: int
) -> RolloutBatch:
    """Return ``prompts_per_step`` useful groups of ``problems``, at least ``max_prompts`` many.

    The metrics are means over all examined groups, kept or not, so that dropping groups does not
    flatter the reward; ``dynamic/useful_fraction`` is the kept share. After
    ``rl.rollout.filter.max_rounds`` rounds the batch holds the useful groups found so far. Without
    any, it holds the first ``prompts_per_step`` groups, which leave the policy unchanged. Raises
    what ``RolloutGenerator.generate_batch`` raises.
    """
    config = generator.config
    groups: list[Group] = []
    kept: list[int] = []
    rounds = 0
    missing = config.prompts_per_step
    await generator.refresh()
    while missing and rounds < config.rollout.filter.max_rounds:
        rounds += 1
        numbers = range(len(groups), len(groups) + config.rollout.filter.started(missing))
        starts = [
            partial(
                generator.generate_group,
                number,
                problems[number],
                step,
                _earlier_groups(problems, number),
            )
            for number in numbers
        ]
        found = await first_useful(
            starts, lambda group: has_advantage(generator, group, step), missing
        )
        for number, (group, useful) in zip(numbers, found):
            groups.append(group)
            if useful:
                kept.append(number)
        missing = config.prompts_per_step - len(kept)

    # Aborted requests must not share an engine batch with the requests of the next step.
    await until_idle(generator.policy.engine)
    if generator.judge is not None:
        await until_idle(generator.judge.service.served.engine)

    examined = generator.score([rollout for group in groups for rollout in group], step)
    if missing:
        log.warning(
            "step %d: %d of %d groups have advantages after %d rounds; "
            "it trains on fewer than the %d wanted",
            step,
            len(kept),
            len(groups),
            rounds,
            config.prompts_per_step,
        )
    chosen = kept or list(range(min(len(groups), config.prompts_per_step)))
    batch = select_groups(examined, chosen)
    batch.metrics["dynamic/useful_fraction"] = len(kept) / len(groups)
    batch.metrics["dynamic/groups"] = float(len(groups))
    batch.metrics["dynamic/rounds"] = float(rounds)
    batch.consumed = len(groups)
    return batch


async def first_useful(
    starts: Sequence[Callable[[], Coroutine[None, None, Group]]],
    useful: Callable[[Group], bool],
    wanted: int,
) -> list[tuple[Group, bool]]:
    """Start all groups and return the first ones, in order, up to the ``wanted``-th useful one.

    Each comes with whether it is useful. The other groups are cancelled and have ended on return; a
    failure among them is logged only. Raises what an awaited group raises.
    """
    tasks = [asyncio.create_task(start()) for start in starts]
    found: list[tuple[Group, bool]] = []
    num_useful = 0
    try:
        for task in tasks:
            group = await task
            is_useful = useful(group)
            found.append((group, is_useful))
            num_useful += is_useful
            if num_useful == wanted:
                break
    finally:
        for task in tasks:
            task.cancel()
        # Wait for the cancelled tasks: they would otherwise go on sending requests to the engines.
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends[len(found) :]:
            if isinstance(end, Exception):
                log.info("a group that was not needed had failed: %s", end)
    return found


def has_advantage(generator: RolloutGenerator, group: Group, step: int) -> bool:
    """True if any response of the group has an advantage; never without a valid sample."""
    # The batch is scored again as a whole, and its failures are counted there.
    batch = generator.score(group, step, count_failures=False)
    advantages = compute_advantages(batch.rollouts, generator.config)
    rows = [advantages] if isinstance(advantages, torch.Tensor) else advantages
    return any(bool((row.abs() > MIN_ADVANTAGE).any()) for row in rows)


def select_groups(batch: RolloutBatch, chosen: Sequence[int]) -> RolloutBatch:
    """Return the batch of these groups alone, renumbered from 0 in their order."""
    new_number = {group: position for position, group in enumerate(chosen)}
    kept = [
        replace(rollout, group=new_number[rollout.group])
        for rollout in batch.rollouts
        if rollout.group in new_number
    ]
    return RolloutBatch(kept, dict(batch.metrics))


def _earlier_groups(problems: Sequence[Problem], number: int) -> int:
    """Count the same problem before this one: a step may cross the end of the data."""
    problem_id = problems[number].problem_id
    return sum(problem.problem_id == problem_id for problem in problems[:number])
