from __future__ import annotations

import json

from env_pool.noise import draw_noise, drop_field


def test_noise_is_a_function_of_seed_and_step_with_the_given_shares() -> None:
    shares = {"timeout": 0.1, "error": 0.2, "missing_field": 0.3}
    drawn = [draw_noise(shares, seed, step) for seed in range(200) for step in range(20)]
    assert drawn == [draw_noise(shares, seed, step) for seed in range(200) for step in range(20)]
    for kind, share in shares.items():
        assert abs(drawn.count(kind) / len(drawn) - share) < 0.03


def test_without_shares_nothing_is_disturbed() -> None:
    assert draw_noise({}, 0, 0) is None
    assert draw_noise({"error": 0.0}, 0, 0) is None


def test_one_field_goes_missing() -> None:
    assert len(json.loads(drop_field('{"a": 1, "b": 2}', 0, 0))) == 1
    assert len(json.loads(drop_field("[1, 2, 3]", 0, 0))) == 2
    assert len(drop_field("anna lamp late 3", 0, 0).split()) == 3
    assert drop_field("ok", 0, 0) == "ok"
