"""A made-up run for the report's tests: no number here was measured."""

import math


def figure(value, width=0.03):
    return {"value": value, "low": value - width, "high": value + width}


def curve(top, seed, reward_top):
    points = []
    for step in range(0, 101):
        rise = 1 - math.exp(-step / 28)
        wiggle = 0.018 * math.sin(step * 1.7 + seed) + 0.012 * math.sin(step * 0.61 * seed)
        points.append(
            {
                "step": step,
                "reward": 0.32 + (reward_top - 0.32) * rise + wiggle,
                "true_accuracy": 0.31 + (top - 0.31) * rise + wiggle / 3
                if step % 10 == 0
                else None,
                "failure_rates": {
                    "parse_failure": 0.02 * (1 - rise) + 0.004,
                    "truncated": 0.01 * (1 - rise),
                },
                "entropy": 0.9 - 0.55 * rise + wiggle,
                "mismatch": 0.0031 + 0.0004 * math.sin(step + seed),
            }
        )
    return points


def example_summary(seed=0, shift=0.0):
    scores = {
        "single": 0.612 + shift,
        "outcome_consistency": 0.648,
        "step_consistency": 0.702 + shift,
    }
    return {
        "title": "Made-up run for looking at the page",
        "seeds": [seed],
        "environment": {"python": "3.11.9", "torch": "2.9.0", "device": "2 CPU cores"},
        "commands": ["spark-nemo pipeline --config toy run.seed=0"],
        "stage1": {
            "problems": 400,
            "solutions": 3200,
            "verifications": 51200,
            "failure_rates": {"parse_failure": 0.021, "truncated": 0.004},
            "label_quality": {
                "single": {
                    "share_kept": 0.975,
                    "step_accuracy": figure(0.861, 0.012),
                    "first_error_accuracy": figure(0.702, 0.018),
                    "dropped": {"vote_0_parse_failure": 80},
                },
                "outcome_consistency": {
                    "share_kept": 0.941,
                    "step_accuracy": figure(0.893, 0.01),
                    "first_error_accuracy": figure(0.764, 0.017),
                    "dropped": {"tie": 189},
                },
                "step_consistency": {
                    "share_kept": 0.862,
                    "step_accuracy": figure(0.968, 0.007),
                    "first_error_accuracy": figure(0.931, 0.011),
                    "dropped": {"no_match": 300, "tie": 142},
                },
            },
        },
        "stage2": {
            "cases": 1000,
            "f1": scores,
            "f1_gain_interval": [0.048 + shift, 0.131 + shift],
            "methods": {
                name: {
                    "acc_error": figure(f1 - 0.05),
                    "acc_correct": figure(f1 + 0.06),
                    "f1": figure(f1),
                    "unparsed": 12,
                }
                for name, f1 in scores.items()
            },
        },
        "stage3": {
            "problems": 200,
            "samples_per_problem": 4,
            "accuracy": {"base": 0.312, "spark": 0.638 + shift, "rlvr": 0.655},
            "accuracy_intervals": {
                "base": [0.268, 0.355],
                "spark": [0.589, 0.684],
                "rlvr": [0.611, 0.702],
            },
            "greedy": {
                "base": figure(0.345, 0.065),
                "spark": figure(0.67, 0.06),
                "rlvr": figure(0.69, 0.06),
            },
            "differences": {
                "spark_minus_base": figure(0.326, 0.05),
                "spark_minus_rlvr": figure(-0.017, 0.04),
            },
            "curves": {"spark": curve(0.638, 1, 0.79), "rlvr": curve(0.655, 2, 0.68)},
            "solutions": [
                {
                    "question": "Start with 7. Add 5, then times 3, then minus 4.",
                    "rl_variant": "spark",
                    "verdict": True,
                    "truly_correct": True,
                    "reward": 1.0,
                    "steps": [
                        {"text": "7+5=12", "correct": True, "truly_correct": True},
                        {"text": "12*3=36", "correct": True, "truly_correct": True},
                        {"text": "36-4=32", "correct": True, "truly_correct": True},
                    ],
                },
                {
                    "question": "Start with 9. Times 4, then minus 8.",
                    "rl_variant": "spark",
                    "verdict": False,
                    "truly_correct": False,
                    "reward": 0.0,
                    "steps": [
                        {"text": "9*4=35", "correct": False, "truly_correct": False},
                        {"text": "35-8=27", "correct": True, "truly_correct": True},
                    ],
                },
                {
                    "question": "Start with 6. Add 9, then times 2, then add 1.",
                    "rl_variant": "spark",
                    "verdict": True,
                    "truly_correct": False,
                    "reward": 1.0,
                    "steps": [
                        {"text": "6+9=15", "correct": True, "truly_correct": True},
                        {"text": "15*2=32", "correct": True, "truly_correct": False},
                        {"text": "32+1=33", "correct": True, "truly_correct": True},
                    ],
                },
                {
                    "question": "Start with 2. Add 2.",
                    "rl_variant": "spark",
                    "failure": "truncated",
                    "truly_correct": True,
                    "steps": [{"text": "2+2=4"}],
                },
            ],
        },
        "seconds": {"stage1": 310.0, "stage2": 1260.5, "stage3": 5900.0},
        "tokens": {"stage1": 2_411_000, "stage3": 9_870_000},
    }
