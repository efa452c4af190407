from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from sglang_streams import request

from rollout_workers.engines.sglang.requests import (
    WHOLE_VOCABULARY,
    abort_call,
    generate_call,
    request_name,
    sampling,
    seed_of,
    wide_window,
)

NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=12)


def test_generate_sends_ids_and_asks_for_ids() -> None:
    call = generate_call(request(temperature=0.5, seed=7), served=3)
    assert (call.method, call.path) == ("POST", "/generate")
    assert call.body == {
        "rid": "5:e1.t0",
        "input_ids": [5, 6, 7],
        "sampling_params": {
            "max_new_tokens": 16,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": -1,
            "sampling_seed": 7,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "no_stop_trim": True,
        },
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,
        "extra_key": "version 3",
    }


def test_prefixes_are_shared_only_within_a_version() -> None:
    keys = [generate_call(request(), served=version).body["extra_key"] for version in (1, 2, 1)]  # type: ignore[index]
    assert keys[0] == keys[2] != keys[1]


def test_stop_strings_and_ids() -> None:
    params = sampling(request(stop=("</a>", "\n\n"), stop_token_ids=(4, 9), top_k=5))
    assert (params["stop"], params["stop_token_ids"], params["top_k"]) == (["</a>", "\n\n"], [4, 9], 5)
    assert "stop" not in sampling(request())
    assert "stop_token_ids" not in sampling(request())


def test_filtered_requests_ask_for_log_probabilities_after_the_filters() -> None:
    for fields, top_k in (({"top_p": 0.9}, WHOLE_VOCABULARY), ({"top_p": 0.9, "top_k": 7}, 7), ({"top_k": 3}, 3)):
        body = generate_call(request(**fields), served=0).body
        assert body is not None
        assert body["return_sampling_mask"] is True
        assert body["sampling_params"]["top_k"] == top_k
    for fields in ({}, {"temperature": 0.0, "top_p": 0.9, "top_k": 7}):
        assert "return_sampling_mask" not in (generate_call(request(**fields), served=0).body or {})


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3))
def test_the_window_for_stop_strings_is_as_long_as_their_bytes_and_matches_nothing(strings: list[str]) -> None:
    pattern = wide_window(tuple(strings))
    found = re.fullmatch(r"\\uffff\{(\d+)\}", pattern)
    assert found is not None
    assert int(found.group(1)) >= max(len(string.encode()) for string in strings) + 8
    assert not re.search(pattern, "".join(strings).replace("\uffff", ""))


@given(NAMES, NAMES)
def test_aborting_a_request_aborts_no_other(one: str, other: str) -> None:
    """SGLang aborts every request whose name begins with the given one."""
    aborted = abort_call(one).body
    assert aborted == {"rid": request_name(one), "abort_all": False}
    assert request_name(other).startswith(request_name(one)) == (one == other)


@given(st.integers(-(2**70), 2**70))
def test_seeds_fit_and_small_ones_stay(seed: int) -> None:
    assert 0 <= seed_of(seed) < 2**31
    assert seed_of(seed & 0x7FFFFFFF) == seed & 0x7FFFFFFF


def test_seeds_of_more_bits_differ_by_each_of_them() -> None:
    assert len({seed_of(1 << bit) for bit in range(31)}) == 31
    assert all(seed_of(1 << bit) != seed_of(0) for bit in range(64))
