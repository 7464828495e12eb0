"""The report page, its data model and the results table, from a made-up run."""

import copy
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from example_summary import example_summary
from hypothesis import given, settings
from hypothesis import strategies as st
from studies.results_document import results_markdown

from spark_nemo.report import (
    SummaryError,
    read_summary,
    report_page,
    to_plain,
    write_report,
)
from spark_nemo.report.charts import (
    Bar,
    Series,
    Style,
    interval_chart,
    line_chart,
    running_mean,
    ticks,
)
from spark_nemo.report.student_interval import mean_and_half_width

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collect a page's visible text and attributes; check that its elements are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], "", [], set()
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += " " + " ".join(data.split())


def without(*parts):
    summary = example_summary()
    for part in parts:
        del summary[part]
    return summary


def test_the_page_is_readable_offline_and_without_script():
    """The page has no script, link, image, font or other address; every element is closed."""
    page = report_page(example_summary())
    parsed = Page(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "video"}
    assert not any(
        name in ("src", "href", "srcset") or name.startswith("on") for name, _ in parsed.attributes
    )
    assert "http" not in page and "url(" not in page and "@import" not in page


def test_the_headline_figures_are_those_of_the_summary():
    """Label quality, F1 with its gain, and accuracy next to both other variants, with intervals."""
    text = Page(report_page(example_summary())).text
    for shown in (
        "96.8 % 95% interval 96.1 to 97.5",
        "70.2 95% interval 67.2 to 73.2",
        "+9.0 [+4.8, +13.1]",
        "63.8 % 95% interval 58.9 to 68.4",
        "Before RL 31.2%",
        "RLVR, with answer keys 65.5%",
    ):
        assert shown in text, shown


def test_a_stage_that_was_not_run_is_left_out_and_not_zero():
    """A run with stage I only has one headline and nothing about other stages."""
    text = Page(report_page(without("stage2", "stage3", "seconds", "tokens"))).text
    assert "Stage I " in text and "Stage II" not in text and "F1" not in text and "RLVR" not in text
    summary = without("stage1", "stage2", "seconds", "tokens")
    for field in ("greedy", "differences", "curves", "solutions", "accuracy_intervals"):
        del summary["stage3"][field]
    text = Page(report_page(summary)).text
    assert (
        "no interval computed" in text and "Training reward" not in text and "Stage I " not in text
    )
    assert "Cost" not in Page(report_page({"title": "nothing yet"})).text


def test_missing_curves_and_labels_are_left_out():
    """A curve without entropy has no entropy chart; a method that kept nothing has no accuracy."""
    summary = example_summary()
    for point in summary["stage3"]["curves"]["spark"] + summary["stage3"]["curves"]["rlvr"]:
        point["entropy"] = point["mismatch"] = None
    summary["stage1"]["label_quality"]["single"] |= {
        "step_accuracy": None,
        "first_error_accuracy": None,
    }
    text = Page(report_page(summary)).text
    assert "Entropy of the policy" not in text and "Failed verifications" in text
    assert "not known" in text
    summary["stage1"]["label_quality"] = {}
    assert "Labels from" not in Page(report_page(summary)).text


def test_steps_have_a_symbol_and_a_label_in_addition_to_the_colour():
    """Steps are judged correct, incorrect or not at all, with a warning at wrong judgements."""
    page = report_page(example_summary())
    text = Page(page).text
    assert "✓ 9*4" not in text and "✗ 9*4=35" in text and "– 2+2=4" in text
    assert "✓ 15*2=32 ! in truth incorrect" in text
    assert page.count('aria-label="judged incorrect"') == 1
    assert "no verdict: truncated" in text


def test_all_text_is_escaped():
    """Markup in any string of the summary is shown as text and does not open an element."""
    evil = "<script>alert('x')</script>\"' onload=\"&amp;"

    def poison(value):
        if isinstance(value, str):
            return evil if value not in ("spark", "rlvr") else value
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return [poison(item) for item in value] if isinstance(value, list) else value

    summary = poison(example_summary())
    summary["stage1"]["failure_rates"][evil] = 0.5
    summary["stage1"]["label_quality"][evil] = copy.deepcopy(
        summary["stage1"]["label_quality"]["single"]
    )
    summary["stage3"]["accuracy"][evil] = 0.5
    summary["stage3"]["curves"][evil] = copy.deepcopy(summary["stage3"]["curves"]["spark"])
    summary["seconds"][evil] = 1.0
    parsed = Page(report_page(summary))
    assert "script" not in parsed.tags
    assert not any(name == "onload" for name, _ in parsed.attributes)
    assert evil in parsed.text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@settings(max_examples=30, deadline=None)
def test_any_solution_text_gives_a_well_formed_page(text):
    """Any text of a policy is shown as text."""
    summary = without("stage1", "stage2")
    summary["stage3"]["curves"] = {}
    summary["stage3"]["solutions"] = [
        {"question": text, "steps": [{"text": text, "correct": False}]}
    ]
    Page(report_page(summary))


def test_the_written_summary_reads_back_equal(tmp_path):
    """summary.json holds the same run, with the keys that other tools read."""
    path = write_report(tmp_path / "run", example_summary())
    assert path.name == "report.html" and path.read_text().startswith("<!doctype html>")
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert read_summary(stored) == read_summary(example_summary())
    assert to_plain(read_summary(stored)) == stored
    assert set(stored["stage2"]["f1"]) == {"single", "outcome_consistency", "step_consistency"}
    assert len(stored["stage2"]["f1_gain_interval"]) == 2
    assert set(stored["stage3"]["accuracy"]) == {"base", "spark", "rlvr"}


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("title",), None, "summary.title: must be a string"),
        (("stage1", "problems"), 4.5, "summary.stage1.problems: must be an integer"),
        (
            ("stage1", "failure_rates", "truncated"),
            float("nan"),
            "failure_rates.truncated: must be a finite number",
        ),
        (("stage2", "f1", "single"), 0.5, "'f1' must repeat"),
        (("stage2", "f1_gain_interval"), [0.1], "must be a list of 2"),
        (("stage2", "metods"), {}, "summary.stage2.metods: no such field"),
        (("stage3", "accuracy_intervals", "spark"), "wide", "must be a list"),
        (("stage3", "accuracy_intervals", "sparc"), [0, 1], "names ['sparc']"),
        (("stage3", "greedy", "base", "high"), None, "needs both"),
        (
            ("stage3", "solutions", 0, "steps", 0, "correct"),
            1,
            "solutions[0].steps[0].correct: must be true or false",
        ),
        (("stage3", "curves", "spark", 1, "step"), 0, "steps must increase"),
    ],
)
def test_an_invalid_summary_is_rejected_and_nothing_is_written(tmp_path, place, value, message):
    """The field is named, and no partial report appears."""
    summary = example_summary()
    target = summary
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(SummaryError) as caught:
        write_report(tmp_path / "run", summary)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_charts_survive_thin_data():
    """One point, a constant line, equal bars, no interval: valid SVG without NaN."""
    style = Style("#000", "square")
    for chart in (
        line_chart([Series("a", style, [(0, 0.5)])], "x", "y", "d"),
        line_chart(
            [Series("a", style, [(0, 0.0), (5, 0.0)]), Series("b", style, [(1, None), (2, 0)])],
            "x",
            "y",
            "d",
        ),
        interval_chart([Bar("a", style, 1.0), Bar("b", style, 1.0)], "x", "d", (None, 1.0)),
        interval_chart([Bar("a", style, 0.0, 0.0, 0.0)], "x", "d"),
    ):
        ElementTree.fromstring(chart)
        assert "nan" not in chart and "inf" not in chart


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_ticks_span_the_range_with_a_few_round_numbers(low, width):
    """The first tick is at most the lowest value, the last at least the highest; 2 to 8 ticks."""
    marks = ticks(low, low + width)
    slack = (marks[1] - marks[0]) * 1e-6 + 1e-9
    assert marks[0] <= low + slack and marks[-1] >= low + width - slack
    assert 2 <= len(marks) <= 8


def test_the_running_mean_keeps_constants_and_length():
    """It smooths and does not shift."""
    assert running_mean([2.0] * 7, 5) == [2.0] * 7
    assert running_mean([0, 3, 0, 3], 3) == pytest.approx([1.5, 1, 2, 1.5])


def test_the_results_table_has_a_row_per_seed_and_the_mean():
    """F1, gain, accuracy and seconds; the interval over three seeds is Student's."""
    text = results_markdown(
        [example_summary(0), example_summary(1, 0.01), example_summary(2, -0.01)]
    )
    assert "| 1 | 62.2 | 64.8 | 71.2 | +9.0 [+5.8, +14.1] |" in text
    assert "| **mean of 3** | 61.2 ± 2.5 |" in text
    assert "spark-nemo pipeline" in text and "does not show" in text
    assert not re.search(r"nan|None", text)
    with pytest.raises(SummaryError, match="same seeds"):
        results_markdown([example_summary(0), example_summary(0)])
    with pytest.raises(SummaryError, match="at least one"):
        results_markdown([])


def test_a_stage_that_no_run_has_is_a_dash():
    """A single run has no interval over seeds; stages that were not run are not numbers."""
    text = results_markdown([without("stage3", "commands")])
    assert "| 0 | – | – | – |" in text and "±" not in text
    assert "did not record the commands" in text


def test_the_interval_over_seeds_is_students():
    """The values 1, 2, 3 have mean 2 and standard deviation 1, so 4.303 / sqrt(3)."""
    assert mean_and_half_width([1, 2, 3]) == pytest.approx((2, 4.303 / 3**0.5))
    assert mean_and_half_width([5]) == (5, None)


@pytest.mark.parametrize(
    "seeds, quantile", [(31, 2.0423), (32, 2.0395), (41, 2.0211), (121, 1.9799), (10_001, 1.9602)]
)
def test_the_interval_over_many_seeds_is_students_too(seeds, quantile):
    """Printed tables' two-sided 95% quantiles for one degree of freedom fewer: the normal's 1.96
    would make the interval of 32 seeds 4% too narrow.
    """
    values = [0.0] * (seeds // 2) + [1.0] * (seeds - seeds // 2)
    mean = sum(values) / seeds
    error = (sum((value - mean) ** 2 for value in values) / (seeds - 1) / seeds) ** 0.5
    assert mean_and_half_width(values)[1] == pytest.approx(quantile * error, rel=2e-4)
