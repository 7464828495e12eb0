"""Checks of a mixture-of-experts policy before stage III loads a model.

Weight sync of experts is tested in tests/real_sglang/test_experts.py.
"""

import json
import shutil

import pytest

from spark_nemo.config import ConfigError
from spark_nemo.planning.preflight import check_stage3
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import ASSETS, resolve_toy

MIXTURE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 691,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, [], None),
        ({}, ["--moe-runner-backend", "triton"], None),
        ({}, ["--ep-size", "2"], "engine.policy.server_args: --ep-size spreads"),
        ({"tie_word_embeddings": True}, [], "does not tie the head"),
    ],
)
def test_stage_three_takes_a_mixture_that_can_be_pushed(tmp_path, changes, words, message):
    """SGLang supports a Qwen3-MoE policy. Unsupported storage of experts and a tied head are errors
    before any model is loaded.
    """
    for path in (ASSETS / "generator").glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE | changes))
    config = resolve_toy(
        compose_config(
            [
                "+experiment=toy",
                f"models.policy={tmp_path}",
                "engine.kind=sglang",
                "engine.policy.servers=1",
                "rl/reward=rlvr",
                "data.rl_answers=toy:rl:2000",
                "pipeline.parallel_jobs=1",
                f"engine.policy.server_args=[{','.join(words)}]",
            ]
        )
    )
    if message is None:
        check_stage3(config)
        return
    with pytest.raises(ConfigError, match=message):
        check_stage3(config)
