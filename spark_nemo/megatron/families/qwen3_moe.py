"""Qwen3-MoE: Qwen3's attention, and a router with experts in every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .decoder import HF, MG, attention, embedding, output
from .parts import Experts
from .table import GATE_UP, ONLY, REPLICATED, SPLIT_COLUMNS, Family, Rule, Table

if TYPE_CHECKING:
    from ..model_shape import ModelShape


def _table(shape: ModelShape) -> Table:
    H, experts = shape.hidden_size, shape.experts
    assert experts is not None
    hf, mg = f"{HF}mlp.experts.{{e}}.", f"{MG}mlp.experts."

    def linear(which: str) -> tuple[str, str]:
        return f"{mg}local_experts.{{e}}.linear_{which}.weight", f"{mg}linear_{which}.weight{{e}}"

    # No linear layer follows the norm directly here, so Transformer Engine does not fuse it.
    mixture = [
        Rule(
            (f"{MG}pre_mlp_layernorm.weight",),
            {f"{HF}post_attention_layernorm.weight": (H,)},
            REPLICATED,
        ),
        Rule((f"{MG}mlp.router.weight",), {f"{HF}mlp.gate.weight": (experts.count, H)}, REPLICATED),
        Rule(
            linear("fc1"),
            {
                f"{hf}gate_proj.weight": (experts.ffn_size, H),
                f"{hf}up_proj.weight": (experts.ffn_size, H),
            },
            GATE_UP,
            per_expert=True,
        ),
        Rule(
            linear("fc2"),
            {f"{hf}down_proj.weight": (H, experts.ffn_size)},
            SPLIT_COLUMNS,
            per_expert=True,
        ),
    ]
    return Table(embedding(shape), [*attention(shape), *mixture], output(shape))


def _experts(config: Mapping[str, Any], get: Callable[[str], Any]) -> Experts:
    # transformers 5 writes num_local_experts, 4 and the hub num_experts.
    count = get(
        "num_local_experts" if config.get("num_local_experts") is not None else "num_experts"
    )
    return Experts(
        count, get("num_experts_per_tok"), get("moe_intermediate_size"), get("norm_topk_prob")
    )


# A layer without experts between the others would need a second table.
QWEN3_MOE = Family(
    "qwen3_moe",
    _table,
    qk_norm=True,
    experts=_experts,
    only={**ONLY, "decoder_sparse_step": 1, "mlp_only_layers": []},
)
