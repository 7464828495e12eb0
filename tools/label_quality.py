"""Sample the small world's verification data with every labelling method over several seeds and
compare the labels with the hidden truth: a section of docs/results.md.

    python tools/label_quality.py --seeds 0 1 2 3 4

Runs that are finished already are not sampled again; delete their folder under runs/labels to
repeat them.
"""

from __future__ import annotations

from studies.document_sections import update_document
from studies.label_table import label_section
from studies.seed_runs import run_seeds, seed_arguments

from spark_nemo.config import ConfigError
from spark_nemo.config.compose import compose_config
from spark_nemo.report.label_scores import label_scores
from spark_nemo.toy.resolve import oracle_for, resolve_toy


def main() -> None:
    """Run what is missing, then write the section."""
    arguments = seed_arguments(__doc__, [0, 1, 2, 3, 4], "runs/labels").parse_args()
    by_seed = {}
    for seed, folder, overrides in run_seeds("stage1", arguments, ["+experiment=toy_labels"]):
        config = resolve_toy(compose_config(overrides))
        oracle = oracle_for(config)
        if oracle is None:
            raise ConfigError(
                "label quality needs the small world's generator: only it has a hidden truth"
            )
        by_seed[seed] = label_scores(folder, config, oracle)
    command = " ".join(
        ["python tools/label_quality.py --seeds", *map(str, by_seed), *arguments.overrides]
    )
    update_document(arguments.out, label_section(by_seed, command))
    print(f"{len(by_seed)} seeds: {arguments.out}")


if __name__ == "__main__":
    main()
