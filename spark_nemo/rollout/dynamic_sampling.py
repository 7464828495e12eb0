"""Dynamic sampling: more prompts are started than a step needs, and groups that would train nothing
are replaced.

Source: DAPO, arXiv 2503.14476, its section 3.2. Which groups are kept depends on their content and
the prompts' order and never on which finished first, so a repeated or a resumed run keeps the same
ones: group n is looked at when all groups before it were, and the first ``prompts_per_step`` useful
ones are kept. Nothing that comes after them can have changed them, so it is aborted wherever it is;
its prompts go back and are the next step's first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial

import torch

from spark_nemo.config import RLConfig
from spark_nemo.engines.async_utils import until_idle
from spark_nemo.records import Problem
from spark_nemo.rewards import RewardBatch
from spark_nemo.rollout.advantage_estimator import compute_advantages
from spark_nemo.rollout.generator import Judged, RolloutGenerator, ScoredBatch

log = logging.getLogger(__name__)
NO_ADVANTAGE = 1e-6
"""|advantage| of rounding: the mean of equal rewards need not be exactly the reward."""

Group = list[Judged]


def prompts_at_most(config: RLConfig) -> int:
    """Prompts that one step can ask for."""
    return config.rollout.rounds * config.rollout.started(config.prompts_per_step)


async def dynamic_batch(
    session: RolloutGenerator, problems: Sequence[Problem], step: int
) -> ScoredBatch:
    """A batch of ``prompts_per_step`` useful groups of ``problems``, which are at least
    ``prompts_at_most``.

    Its metrics are those of every group that was looked at, kept or not, so that dropping does not
    flatter the reward; ``dynamic/useful_fraction`` is the kept share of them. With too few useful
    groups in ``rl.rollout.max_rounds`` rounds it holds what there is, and with none at all the
    first ``prompts_per_step``, which leave the policy as it was. Raises what
    ``RolloutGenerator.batch`` raises.
    """
    config, rounds, missing = session.config, 0, session.config.prompts_per_step
    groups: list[Group] = []
    kept: list[int] = []
    await session.refresh()
    while missing and rounds < config.rollout.rounds:
        rounds += 1
        numbers = range(len(groups), len(groups) + config.rollout.started(missing))
        starts = [
            partial(session.group, n, problems[n], step, _earlier(problems, n)) for n in numbers
        ]
        found = await first_useful(starts, lambda group: trains(session, group, step), missing)
        kept += [number for number, (_, useful) in zip(numbers, found) if useful]
        groups += [group for group, _ in found]
        missing = config.prompts_per_step - len(kept)
    for served in (session.policy, *([session.judge.service.served] if session.judge else [])):
        await until_idle(
            served.engine
        )  # what was aborted must not share a batch with what comes next
    everything = session.scored([judged for group in groups for judged in group], step)
    if missing:
        log.warning(
            "step %d: %d of %d groups have advantages after %d rounds; it trains on fewer than the %d wanted",
            step,
            len(kept),
            len(groups),
            rounds,
            config.prompts_per_step,
        )
    metrics = {
        **everything.metrics,
        "dynamic/useful_fraction": len(kept) / len(groups),
        "dynamic/groups": float(len(groups)),
        "dynamic/rounds": float(rounds),
    }
    chosen = kept or list(range(min(len(groups), config.prompts_per_step)))
    return replace(select_groups(everything, chosen), metrics=metrics, consumed=len(groups))


async def first_useful(
    starts: Sequence[Callable[[], Coroutine[None, None, Group]]],
    useful: Callable[[Group], bool],
    wanted: int,
) -> list[tuple[Group, bool]]:
    """Start all, and return the results in order, each with whether it is useful, up to the
    ``wanted``-th that is.

    The others are cancelled and have ended when this returns; what failed among them is nobody's
    loss and is logged. Raises what a result that was waited for raises.
    """
    tasks = [asyncio.create_task(start()) for start in starts]
    found: list[tuple[Group, bool]] = []
    try:
        for task in tasks:
            group = await task
            found.append((group, useful(group)))
            wanted -= found[-1][1]
            if not wanted:
                break
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends[len(found) :]:
            if isinstance(end, Exception):
                log.info("a group that was not needed had failed: %s", end)
    return found


def trains(session: RolloutGenerator, group: Group, step: int) -> bool:
    """Has any response of the group an advantage, under the configured design? Without a valid
    sample none has.
    """
    batch = session.scored(group, step, counts=False)
    advantages = compute_advantages(batch, session.config)
    rows = [advantages] if isinstance(advantages, torch.Tensor) else advantages
    return any(bool((row.abs() > NO_ADVANTAGE).any()) for row in rows)


def select_groups(batch: ScoredBatch, chosen: Sequence[int]) -> ScoredBatch:
    """The batch of these groups alone, numbered from 0 in their order; its failure rates stay those
    of the whole.
    """
    number = {group: position for position, group in enumerate(chosen)}
    kept = [i for i, rollout in enumerate(batch.rollouts) if rollout.group in number]
    rewards = RewardBatch(
        tuple(batch.rewards.rewards[i] for i in kept),
        tuple(batch.rewards.valid[i] for i in kept),
        batch.rewards.failure_rates,
    )
    return replace(
        batch,
        rewards=rewards,
        rollouts=tuple(
            replace(batch.rollouts[i], group=number[batch.rollouts[i].group]) for i in kept
        ),
        judgements=tuple(batch.judgements[i] for i in kept) if batch.judgements else (),
    )


def _earlier(problems: Sequence[Problem], number: int) -> int:
    """Groups of the same problem before this one: a step may cross the end of the data."""
    return Counter(problem.problem_id for problem in problems[:number])[problems[number].problem_id]
