"""Models that preflight rejects because no engine serves them or weight sync does not support them.

The tests start no engine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.planning.dry_run import dry_run
from spark_nemo.planning.preflight import check_stage1, check_stage2, check_stage3
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import ASSETS, resolve_toy

SERVERS = (
    "engine.kind=sglang",
    "engine.policy.servers=1",
    "engine.verifier.servers=1",
    "pipeline.parallel_jobs=1",
)


def model(folder: Path, **changes: object) -> str:
    """The shipped verifier's folder, its config.json changed: the weights are not looked at."""
    shutil.copytree(ASSETS / "verifier", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def small(tmp_path: Path, *overrides: str) -> SparkConfig:
    return resolve_toy(
        compose_config(
            [
                "+experiment=toy",
                f"run.dir={tmp_path}/run",
                "data.stage1_problems=toy:stage1:4",
                "data.rl_problems=toy:rl:4",
                "data.eval_problems=toy:eval:4",
                "data.processbench=toy:processbench:12",
                "rl.prompts_per_step=4",
                f"rl.reward.model={ASSETS / 'verifier'}",
                *(["rl/reward/heldout=verifier"] if "heldout" in "".join(overrides) else []),
                *overrides,
            ]
        )
    )


@pytest.mark.parametrize(
    ("check", "field"),
    [
        (check_stage1, "models.generator"),
        (check_stage1, "models.verifier"),
        (check_stage2, "models.reward_base"),
        (check_stage3, "models.policy"),
        (check_stage3, "rl.reward.model"),
        (check_stage3, "rl.reward.heldout.model"),
    ],
)
def test_the_embedded_engine_refuses_another_family(tmp_path: Path, check, field: str) -> None:
    """Whatever the stage asks, also what it trains first: the error names the field and the engine
    to choose. The same models pass with servers.
    """
    other = model(tmp_path / "qwen3", model_type="qwen3", head_dim=32)
    with pytest.raises(
        ConfigError, match=rf"^{field}: .*serves qwen2 only.*use engine.kind=sglang"
    ):
        check(small(tmp_path, f"{field}={other}"))
    check(small(tmp_path, f"{field}={other}", *SERVERS))


def test_a_policy_that_weight_sync_does_not_support_is_rejected(tmp_path: Path) -> None:
    """By stage III and by its dry run; as stage I's generator or as reward model it is served."""
    other = model(
        tmp_path / "moe",
        model_type="qwen3_moe",
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    why = "^models.policy: .*does not tie the head.*stage III cannot train it"
    config = small(tmp_path, f"models.policy={other}", *SERVERS)
    with pytest.raises(ConfigError, match=why):
        check_stage3(config)
    with pytest.raises(ConfigError, match=why):
        dry_run(config, "stage3")
    check_stage1(small(tmp_path, f"models.generator={other}", *SERVERS))
    check_stage3(small(tmp_path, f"rl.reward.model={other}", *SERVERS))
