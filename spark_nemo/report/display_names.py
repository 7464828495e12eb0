"""What methods, reward models and arms are called in front of people."""

from __future__ import annotations

from spark_nemo.config.designs import READS_ANSWER_KEYS, VARIANTS

METHOD_NAMES = {
    "single": "Single verification",
    "outcome_consistency": "Outcome consistency",
    "step_consistency": "Step consistency",
    "meta_critique": "Meta-critique",
    "hybrid_outcome": "Meta-critique of the outcome pick",
    "hybrid_step": "Meta-critique of the step pick",
    "reference_guided": "Reference-guided, sees the answer",
}
ARM_NAMES = {
    "base": "Before RL",
    "spark": "SPARK, no answer keys",
    "rlvr": "RLVR, with answer keys",
}
"""Arms whose keys in a summary are not folder names, and the baseline that every run is compared
with.
"""
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


def method_name(name: str) -> str:
    """Of a reward model by its folder: the labels it was trained on, and its kind where it is no
    PRM-CoT.
    """
    method, variant = _parted(name)
    return METHOD_NAMES.get(method, _words(method)) + (
        f", {VARIANT_NAMES[variant]}" if variant else ""
    )


def arm_name(name: str) -> str:
    """Of an RL arm by its key in a summary."""
    if name in ARM_NAMES:
        return ARM_NAMES[name]
    design, variant = _parted(name)
    keys = ", with answer keys" if design in READS_ANSWER_KEYS else ""
    return (
        DESIGN_NAMES.get(design, _words(design))
        + (f", {VARIANT_NAMES[variant]}" if variant else "")
        + keys
    )


def difference_name(name: str) -> str:
    """Of ``FIRST_minus_SECOND``."""
    first, minus, second = name.partition("_minus_")
    return (
        " minus ".join(SHORT_NAMES.get(arm, arm_name(arm)) for arm in (first, second))
        if minus
        else _words(name)
    )


def arm_order(names: list[str]) -> list[str]:
    """Before RL, SPARK, the other designs as they come, and what reads answer keys last of all."""

    def place(name: str) -> int:
        return {"base": 0, "spark": 1}.get(name, 3 if _parted(name)[0] in READS_ANSWER_KEYS else 2)

    return sorted(dict.fromkeys(names), key=place)


def _parted(name: str) -> tuple[str, str | None]:
    """A folder's name as design or method, and variant where it says one."""
    first, _, variant = name.rpartition("-")
    return (first, variant) if first and variant in VARIANTS else (name, None)


def _words(name: str) -> str:
    return name.replace("_", " ")
