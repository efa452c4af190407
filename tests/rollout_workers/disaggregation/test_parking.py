from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_workers.disaggregation.parking import ParkingLot

SESSIONS = st.sampled_from("abcde")
ACTIONS = st.one_of(
    st.tuples(st.just("park"), SESSIONS, st.integers(0, 60), st.booleans()),
    st.tuples(st.just("take"), SESSIONS, st.just(0), st.just(False)),
    st.tuples(st.just("drop"), SESSIONS, st.just(0), st.just(False)),
    st.tuples(st.just("hold"), SESSIONS, st.just(0), st.booleans()),
)


@given(st.integers(0, 100), st.lists(ACTIONS, max_size=80))
def test_the_budget_holds_and_the_one_unused_longest_goes_first(
    budget: int, actions: list[tuple[str, str, int, bool]]
) -> None:
    lot: ParkingLot[int] = ParkingLot(budget)
    model: dict[str, tuple[int, int, bool]] = {}  # in order of parking: payload, bytes, held
    for number, (action, session, nbytes, held) in enumerate(actions):
        if action == "park":
            fits = sum(b for s, (_, b, h) in model.items() if h and s != session) + nbytes <= budget
            assert lot.park(session, number, nbytes, held=held) is fits
            if fits:
                model.pop(session, None)
                while sum(b for _, b, _ in model.values()) + nbytes > budget:
                    del model[next(s for s, (_, _, h) in model.items() if not h)]
                model[session] = (number, nbytes, held)
        elif action == "take":
            assert lot.take(session) == model.pop(session, (None, 0, False))[0]
        elif action == "drop":
            lot.drop(session)
            model.pop(session, None)
        else:
            lot.hold(session, held)
            if session in model:
                model[session] = (*model[session][:2], held)
        assert lot.used == sum(b for _, b, _ in model.values()) <= budget
        assert len(lot) == len(model)
        assert all(lot.look(s) == payload for s, (payload, _, _) in model.items())


def test_hits_and_evictions_are_counted() -> None:
    lot: ParkingLot[str] = ParkingLot(10)
    lot.park("a", "x", 6)
    lot.park("b", "y", 6)
    assert "a" not in lot
    assert lot.take("b") == "y"
    assert lot.take("b") is None
    assert (lot.parks, lot.hits, lot.evictions) == (2, 1, 1)
    lot.park("a", "x", 6)
    lot.drop_where(lambda payload: payload == "x")
    assert (len(lot), lot.used, lot.evictions) == (0, 0, 1)
