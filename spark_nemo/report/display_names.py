"""Names of label methods, reward models and RL variants as readers of a report see them."""

from __future__ import annotations

from collections.abc import Iterable

from spark_nemo.config.designs import reads_answer_keys
from spark_nemo.config.reward import VARIANTS

METHOD_NAMES = {
    "single": "Single verification",
    "outcome_consistency": "Outcome consistency",
    "step_consistency": "Step consistency",
    "meta_critique": "Meta-critique",
    "hybrid_outcome": "Meta-critique of the outcome pick",
    "hybrid_step": "Meta-critique of the step pick",
    "reference_guided": "Reference-guided, sees the answer",
}
RL_VARIANT_NAMES = {
    "base": "Before RL",
    "spark": "SPARK, no answer keys",
    "rlvr": "RLVR, with answer keys",
}
"""Summary keys that are not folder names, and the baseline that every run is compared with."""
SHORT_NAMES = {"base": "before RL", "spark": "SPARK", "rlvr": "RLVR"}
VARIANT_NAMES = {"prm_cot": "PRM-CoT", "prm": "PRM", "orm": "ORM"}
DESIGN_NAMES = {
    "process_aware": "Process-aware",
    "step_average": "Step average",
    "step_augmented": "Step-augmented",
    "selective": "Selective advantage",
    "selective_half": "Selective advantage, halved",
    "global_step": "Global step reward",
    "global_step_penalty": "Global step reward with step penalty",
    "min_form": "Min-form (PURE)",
    "prefix": "Prefix (VPPO)",
    "capo": "CAPO",
    "majority": "Majority vote",
    "random": "Random reward",
}


def method_name(folder: str) -> str:
    """Name a reward model by its labels, and by its kind unless it is a PRM-CoT."""
    method, variant = split_folder(folder)
    name = METHOD_NAMES.get(method, words(method))
    return f"{name}, {VARIANT_NAMES[variant]}" if variant else name


def rl_variant_name(key: str) -> str:
    """Name an RL variant by its key in a summary."""
    if key in RL_VARIANT_NAMES:
        return RL_VARIANT_NAMES[key]
    design, variant = split_folder(key)
    name = DESIGN_NAMES.get(design, words(design))
    if variant:
        name += f", {VARIANT_NAMES[variant]}"
    if reads_answer_keys(design):
        name += ", with answer keys"
    return name


def difference_name(key: str) -> str:
    """Name a difference by its key in a summary, ``FIRST_minus_SECOND``."""
    first, minus, second = key.partition("_minus_")
    if not minus:
        return words(key)
    return f"{_short_name(first)} minus {_short_name(second)}"


def ordered_rl_variants(keys: Iterable[str]) -> list[str]:
    """Sort keys: before RL, SPARK, the other designs in order, last those that read answer keys."""

    def rank(key: str) -> int:
        if key == "base":
            return 0
        if key == "spark":
            return 1
        return 3 if reads_answer_keys(split_folder(key)[0]) else 2

    return sorted(dict.fromkeys(keys), key=rank)


def split_folder(name: str) -> tuple[str, str | None]:
    """Split a folder's name into label method or reward design, and kind of reward model."""
    first, _, variant = name.rpartition("-")
    if first and variant in VARIANTS:
        return first, variant
    return name, None


def words(name: str) -> str:
    """Write an identifier as words."""
    return name.replace("_", " ")


def _short_name(key: str) -> str:
    return SHORT_NAMES.get(key, rl_variant_name(key))
