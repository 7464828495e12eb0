"""Compare the labels of every label method with the toy task's hidden truth, over several seeds.

    python tools/label_quality.py --seeds 0 1 2 3 4

Writes a section of docs/results.md. Finished runs are not sampled again; delete their folder under
runs/labels to repeat them.
"""

from __future__ import annotations

from studies.document_sections import update_document
from studies.label_table import label_section
from studies.seed_runs import command_line, run_seeds, seed_arguments

from spark_nemo.config import ConfigError
from spark_nemo.report.label_scores import label_scores
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import oracle_for, resolve_toy


def main() -> None:
    """Run the missing seeds, then write the section."""
    arguments = seed_arguments(__doc__, [0, 1, 2, 3, 4], "runs/labels").parse_args()
    by_seed = {}
    for seed, folder, overrides in run_seeds("stage1", arguments, ["+experiment=toy_labels"]):
        config = resolve_toy(compose_config(overrides))
        oracle = oracle_for(config)
        if oracle is None:
            raise ConfigError(
                f"models.generator={config.models.generator}: label quality needs the toy task's "
                "generator, because only the toy task has true step labels"
            )
        by_seed[seed] = label_scores(folder, config, oracle)
    section = label_section(by_seed, command_line("label_quality", arguments))
    update_document(arguments.out, section)
    print(f"{len(by_seed)} seeds: {arguments.out}")


if __name__ == "__main__":
    main()
