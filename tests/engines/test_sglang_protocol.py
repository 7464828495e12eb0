"""SGLang's JSON to our types and back, without HTTP. Replies are those of 0.5.21, shortened."""

import copy

import pytest
from engine_cases import ask

from spark_nemo.engines import EngineFailure, EngineUnavailable, FinishReason
from spark_nemo.engines.base import RequestLimits
from spark_nemo.engines.sglang.protocol import (
    generate_json,
    parse_generate_reply,
    require_finished,
    sampling_json,
    version_number,
)

REQUEST = ask((1, 2, 3), max_new_tokens=3, stop_token_ids=(9,))
REPLY = {
    "text": "ignored",
    "output_ids": [4, 5, 9],
    "meta_info": {
        "id": "r",
        "finish_reason": {"type": "stop", "matched": 9},
        "weight_version": "7",
        "output_token_logprobs": [[-0.5, 4, None], [-0.25, 5, None], [0.0, 9, None]],
        "weight_versions": [
            {"version": "6", "start": 0, "end": 2},
            {"version": "7", "start": 2, "end": 3},
        ],
    },
}


def changed(path, value):
    """``REPLY`` with the item at ``path`` replaced, or removed when ``value`` is Ellipsis."""
    reply = copy.deepcopy(REPLY)
    *way, last = path
    place = reply
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return reply


def test_reply_becomes_a_generation():
    """Ids, log-probabilities, the closing stop token, and a version for every token from SGLang's
    ranges.
    """
    generation = parse_generate_reply(REPLY, REQUEST)
    assert generation.token_ids == (4, 5, 9) and generation.logprobs == (-0.5, -0.25, 0.0)
    assert generation.weight_versions == (6, 6, 7) and generation.finish_reason is FinishReason.STOP


def test_full_length_and_abort_before_the_first_token():
    """All of max_new_tokens is LENGTH; an abort without a token needs neither versions nor
    log-probabilities.
    """
    full = changed(["meta_info", "finish_reason"], {"type": "length", "length": 3})
    assert parse_generate_reply(full, REQUEST).finish_reason is FinishReason.LENGTH
    empty = {
        "output_ids": [],
        "meta_info": {"finish_reason": {"type": "abort", "message": "Aborted"}},
    }
    assert parse_generate_reply(empty, REQUEST).finish_reason is FinishReason.ABORT


@pytest.mark.parametrize(
    "path, value, field",
    [
        (["output_ids"], ..., "output_ids is missing"),
        (["output_ids"], "45", "output_ids: expected a list"),
        (["output_ids"], [4, 5.0, 9], "output_ids: expected a list"),
        (["output_ids"], [4, 5, 9, 9], "output_ids has 4 tokens, more than max_new_tokens=3"),
        (["meta_info"], ..., "meta_info is missing"),
        (["meta_info"], [], "meta_info: expected an object, got list"),
        (["meta_info", "finish_reason"], None, "meta_info.finish_reason: expected an object"),
        (["meta_info", "finish_reason"], {"type": "tired"}, "finish_reason.type='tired'"),
        (["meta_info", "finish_reason"], {}, "finish_reason.type is missing"),
        (
            ["meta_info", "finish_reason"],
            {"type": "stop", "matched": "NaN happened"},
            "matched='NaN happened'",
        ),
        (["meta_info", "output_token_logprobs"], ..., "output_token_logprobs is missing"),
        (
            ["meta_info", "output_token_logprobs"],
            [[-0.5, 4, None]],
            "output_token_logprobs: expected one entry for",
        ),
        (
            ["meta_info", "output_token_logprobs", 1],
            [-0.25, 6, None],
            r"output_token_logprobs\[1\]",
        ),
        (["meta_info", "output_token_logprobs", 1], [None, 5, None], r"output_token_logprobs\[1\]"),
        (
            ["meta_info", "output_token_logprobs", 1],
            [float("nan"), 5, None],
            r"output_token_logprobs\[1\]",
        ),
        (["meta_info", "weight_versions"], ..., "weight_versions is missing"),
        (["meta_info", "weight_versions"], "7", "weight_versions='7'"),
        (
            ["meta_info", "weight_versions", 1, "start"],
            1,
            r"weight_versions\[1\] covers 1:3, expected to begin at 2",
        ),
        (["meta_info", "weight_versions", 1, "end"], 4, "weight_versions cover 4 of 3 tokens"),
        (
            ["meta_info", "weight_versions", 0, "version"],
            "default",
            r"weight_versions\[0\].version='default'",
        ),
    ],
)
def test_malformed_reply_fails_by_field(path, value, field):
    """A reply that does not say what it must raises and names the field; no default ever takes its
    place.
    """
    with pytest.raises(EngineFailure, match=field):
        parse_generate_reply(changed(path, value), REQUEST)


def test_fewer_tokens_than_requested_is_not_length():
    """SGLang samples 2 tokens less than fit into its context and calls that length: rejected, not
    taken as finished.
    """
    short = changed(["meta_info", "finish_reason"], {"type": "length", "length": 3})
    with pytest.raises(
        EngineFailure, match="3 of max_new_tokens=5: the server's context is smaller"
    ):
        parse_generate_reply(short, ask((1, 2), max_new_tokens=5))


def test_stop_at_a_token_that_was_not_requested_is_rejected():
    """SGLang also stops at the model's own end tokens; our engines stop at the request's only."""
    with pytest.raises(EngineFailure, match="matched=9: not a stop token"):
        parse_generate_reply(REPLY, ask((1, 2), max_new_tokens=3, stop_token_ids=(8,)))


@pytest.mark.parametrize(
    "status, kind", [(None, EngineUnavailable), (503, EngineUnavailable), (400, EngineFailure)]
)
def test_abort_tells_whose_fault_it_was(status, kind):
    """A 200 with finish reason abort: 4xx inside blames the request, anything else can be served
    again.
    """
    reply = changed(
        ["meta_info", "finish_reason"],
        {"type": "abort", "message": "Aborted", "status_code": status},
    )
    with pytest.raises(EngineFailure, match="Aborted") as caught:
        require_finished(reply)
    assert type(caught.value) is kind
    require_finished(REPLY)


def test_the_body_of_a_request():
    """Ids, our request id, log-probabilities of new tokens only; greedy is temperature 0; top_k
    only when it cuts.
    """
    body = generate_json(
        ask((5, 6), max_new_tokens=7, temperature=0.0, stop_token_ids=(2,), seed=3), "rid-1"
    )
    assert body == {
        "rid": "rid-1",
        "input_ids": [5, 6],
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
        "sampling_params": {
            "max_new_tokens": 7,
            "temperature": 0.0,
            "top_p": 1.0,
            "stop_token_ids": [2],
            "sampling_seed": 3,
        },
    }
    assert sampling_json(ask((5,), top_k=4).sampling)["top_k"] == 4


def test_without_stop_tokens_nothing_stops():
    """ignore_eos is set exactly then: it switches stop_token_ids off as well."""
    assert sampling_json(ask((5,)).sampling)["ignore_eos"] is True
    assert "ignore_eos" not in sampling_json(ask((5,), stop_token_ids=(2,)).sampling)


@pytest.mark.parametrize(
    "request_, message",
    [
        (ask((1, 61)), "prompt token id 61 is outside the vocabulary of 61"),
        (ask((1, -1)), "prompt token id -1"),
        (ask((1,), stop_token_ids=(99,)), "stop token id 99"),
        (ask(()), "prompt is empty"),
        (ask((1,) * 100, max_new_tokens=29), "prompt of 100 tokens.*129.*128"),
    ],
)
def test_limits_reject_before_anything_is_sent(request_, message):
    """Requests that SGLang would reject, cut short or die of."""
    with pytest.raises(EngineFailure, match=message):
        RequestLimits(61, 128).check(request_)
    RequestLimits(61, 128).check(ask((60,) * 100, max_new_tokens=28))


def test_versions_are_numbers_in_strings():
    """SGLang's own default, and any other text that is not a number, fails with the remedy."""
    assert version_number("12", "v") == 12
    for value in ("default", "-1", 3, None, ""):
        with pytest.raises(EngineFailure, match="--weight-version 0"):
            version_number(value, "v")
