"""The label quality section, and the sections of one document by several tools."""

from __future__ import annotations

import pytest
from example_summary import example_summary
from studies.document_sections import keep_sections, marked, put_section
from studies.label_table import label_section
from studies.round_table import round_section

from spark_nemo.report import report_page
from spark_nemo.report.summary import Figure, LabelScores, SummaryError


def scores(right, kept=0.9, tokens=600.0):
    return LabelScores(kept, Figure(right), Figure(right - 0.1), {}, {}, tokens, tokens / kept)


def test_the_table_has_means_over_seeds_with_student_intervals():
    """0.8 and 0.9 have mean 85.0 and half-width 12.706 * 7.07 / sqrt 2 = 63.5; one seed has no
    interval.
    """
    section = label_section({0: {"single": scores(0.8)}, 1: {"single": scores(0.9)}}, "python tool")
    assert (
        "| Single verification | 85.0 ± 63.5 | 75.0 ± 63.5 | 90.0 ± 0.0 | 600.0 ± 0.0 | 666.7 ± 0.0 |"
        in section
    )
    assert "over 2 seeds" in section and "python tool" in section
    assert "| 80.0 | 70.0 | 90.0 | 600.0 | 666.7 |" in label_section(
        {0: {"single": scores(0.8)}}, "x"
    )


def test_a_method_that_labelled_nothing_has_a_dash():
    """An accuracy over nothing is missing, not zero."""
    section = label_section({0: {"single": LabelScores(0.0, tokens_per_solution=600.0)}}, "x")
    assert "| Single verification | – | – | 0.0 | 600.0 | – |" in section


def test_seeds_must_have_the_same_methods():
    """A mean over different methods would be meaningless."""
    with pytest.raises(SummaryError, match="different methods"):
        label_section({0: {"single": scores(0.8)}, 1: {"step_consistency": scores(0.8)}}, "x")


def test_the_section_is_replaced_in_place_and_survives_a_rewrite_of_the_rest():
    """Both tools write one file: each leaves the other's section as it was."""
    first, second = (label_section({0: {"single": scores(right)}}, "x") for right in (0.8, 0.9))
    document = put_section("# Results\n\nfirst run\n", first)
    assert put_section(document, second) == document.replace(first, second)
    rewritten = keep_sections(document, "# Results\n\nsecond run\n")
    assert rewritten == f"# Results\n\nsecond run\n\n{first}\n"
    assert keep_sections("# Results\n", "# New\n") == "# New\n"


def test_sections_of_other_names_are_left_alone():
    """A section is found by its whole name, also when another name begins like it."""
    first, second = marked("rounds", "one"), marked("rounds of another kind", "two")
    document = put_section(put_section("# Results\n", first), second)
    changed = put_section(document, marked("rounds", "three"))
    assert (
        second in changed and first not in changed and changed.index("three") < changed.index("two")
    )
    assert keep_sections(changed, "# New\n").endswith(second + "\n")


def test_rounds_are_compared_round_by_round():
    """Means over seeds by round; runs with different numbers of rounds are rejected."""

    def summary(*f1):
        return {
            "title": "run",
            "rounds": [
                {
                    "number": number,
                    "f1": {"value": value},
                    "labels": {"share_kept": 0.9, "step_accuracy": {"value": value}},
                }
                for number, value in enumerate(f1, start=1)
            ],
        }

    section = round_section({0: summary(0.5, 0.6), 1: summary(0.7, 0.6)}, "python tool")
    assert (
        "| 1 | 60.0 ± 127.1 | – | 90.0 ± 0.0 | 60.0 ± 127.1 |" in section
        and "| 2 | 60.0 ± 0.0 |" in section
    )
    with pytest.raises(SummaryError, match="same number of rounds"):
        round_section({0: summary(0.5, 0.6), 1: summary(0.7)}, "x")


def test_the_page_shows_what_filters_removed_and_what_labels_cost():
    """Rules that removed labels have rows, and answers shown to the baseline are stated."""
    summary = example_summary()
    page = report_page(summary)
    assert "Labels removed before training" not in page and "No answer key was read." in page
    quality = summary["stage1"]["label_quality"]
    quality["single"]["removed"] = {"unbalanced": 1234}
    quality["single"]["tokens_per_label"] = 4321.0
    summary["stage1"]["answers_shown_to_baseline"] = True
    page = report_page(summary).replace("\n", " ")
    assert (
        "Labels removed before training" in page
        and "more labels of one verdict than of the other" in page
    )
    assert "1\N{NARROW NO-BREAK SPACE}234" in page and "4\N{NARROW NO-BREAK SPACE}321" in page
    assert "above labels.max_per_verdict" not in page
    assert (
        "reference-guided baseline, and for nothing else" in page
        and "No answer key was read." not in page
    )
