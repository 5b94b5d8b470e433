"""Context, main series and auxiliary series as one sequence: rule by rule."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.data.sequences import gather_histories, gather_training
from retrieval.types import EventColumns, JaggedBatch, SideRows

# Kinds 1 and 2 are context, 3 and 4 auxiliary.
AGE, SEX, REGION, DEVICE = 1, 2, 3, 4
WEIGHTS = np.array([0, 2.5, 0], np.float32)
SideEvent = tuple[int, int, int]


def columns(events: Sequence[tuple[int, int, int]]) -> EventColumns:
    items, actions, times = np.array(events, np.int64).reshape(-1, 3).T
    return EventColumns(items=items.astype(np.int32), actions=actions.astype(np.uint8), timestamps=times)


def beside(context: Sequence[Sequence[int]], *rows: Sequence[SideEvent], kinds: int = 4) -> SideRows:
    flat = np.array([event for row in rows for event in row], np.int64).reshape(-1, 3)
    ends = np.cumsum([len(row) for row in rows])
    return SideRows(
        num_kinds=kinds,
        context=np.array(context, np.int64),
        kinds=flat[:, 0],
        values=flat[:, 1],
        timestamps=flat[:, 2],
        starts=np.concatenate([[0], ends[:-1]]).astype(np.int64),
        ends=ends.astype(np.int64),
    )


def one(events: Sequence[tuple[int, int, int]], side: SideRows, time: int, max_length: int = 50) -> JaggedBatch:
    return gather_histories(
        columns(events), np.zeros(1, np.int64), np.array([len(events)]), np.array([time]), max_length, side
    )


def tokens(batch: JaggedBatch) -> list[tuple[int, int, int, int]]:
    assert batch.kinds is not None
    return list(
        zip(batch.kinds.tolist(), batch.items.tolist(), batch.actions.tolist(), batch.timestamps.tolist(), strict=True)
    )


def test_context_stands_in_front_and_series_are_merged_by_time() -> None:
    batch = one([(10, 1, 100), (11, 2, 120)], beside([[5, 1]], [(REGION, 7, 100), (DEVICE, 2, 110)]), 200)
    assert tokens(batch) == [
        (AGE, 5, 0, 100),
        (SEX, 1, 0, 100),
        (0, 10, 1, 100),
        (REGION, 7, 0, 100),
        (DEVICE, 2, 0, 110),
        (0, 11, 2, 120),
    ]
    assert batch.query_times.tolist() == [100, 100, 100, 110, 120, 200]
    assert batch.query_actions is not None
    assert batch.query_actions.tolist() == [0, 1, 0, 0, 2, 0]


def test_of_a_run_of_equal_values_the_first_event_is_kept() -> None:
    region = [(REGION, value, 10 * place) for place, value in enumerate([7, 7, 8, 8, 8, 7])]
    device = [(DEVICE, 7, 5), (DEVICE, 7, 45)]
    found = tokens(one([], beside([[0, 0]], sorted(region + device, key=lambda event: event[2])), 99))
    assert found[2:] == [(REGION, 7, 0, 0), (DEVICE, 7, 0, 5), (REGION, 8, 0, 20), (REGION, 7, 0, 50)]


def test_runs_do_not_reach_over_users() -> None:
    side = beside([[0, 0], [0, 0]], [(REGION, 7, 10)], [(REGION, 7, 10)])
    nobody = np.zeros(2, np.int64)
    batch = gather_histories(columns([]), nobody, nobody, np.array([20, 20]), 50, side)
    assert batch.lengths.tolist() == [3, 3]


def test_at_equal_times_an_engagement_comes_before_what_is_recorded_with_it() -> None:
    batch = one([(10, 1, 100), (11, 1, 100)], beside([[0, 0]], [(DEVICE, 1, 100), (REGION, 2, 100)]), 100)
    assert [kind for kind, *_ in tokens(batch)] == [AGE, SEX, 0, 0, REGION, DEVICE]


def test_a_user_without_events_has_context_at_the_time_of_the_request() -> None:
    batch = one([], beside([[3, 0]], []), 77)
    assert tokens(batch) == [(AGE, 3, 0, 77), (SEX, 0, 0, 77)]
    assert batch.query_times.tolist() == [77, 77]


def test_what_a_window_cuts_off_leaves_the_last_value_of_each_series() -> None:
    """Nine tokens: four set aside, five for the latest of the merged sequence."""
    events = [(item, 1, 100 + 10 * item) for item in range(7)]
    series = [(REGION, 1, 95), (REGION, 2, 99), (DEVICE, 1, 105), (REGION, 3, 155)]
    found = tokens(one(events, beside([[1, 1]], series), 200, max_length=9))
    assert found == [
        (AGE, 1, 0, 99),
        (SEX, 1, 0, 99),
        (REGION, 2, 0, 99),
        (DEVICE, 1, 0, 105),
        (0, 3, 1, 130),
        (0, 4, 1, 140),
        (0, 5, 1, 150),
        (REGION, 3, 0, 155),
        (0, 6, 1, 160),
    ]


def test_only_what_stands_right_before_a_positive_event_is_asked() -> None:
    events = [(10, 1, 100), (11, 2, 110), (12, 1, 120), (13, 1, 130)]
    side = beside([[1, 1]], [(REGION, 1, 100), (REGION, 2, 125)])
    batch = gather_training(columns(events), np.array([0]), np.array([4]), WEIGHTS, 50, side)
    assert tokens(batch.inputs) == [
        (AGE, 1, 0, 100),
        (SEX, 1, 0, 100),
        (0, 10, 1, 100),
        (REGION, 1, 0, 100),
        (0, 11, 2, 110),
        (0, 12, 1, 120),
        (REGION, 2, 0, 125),
    ]
    # The region after 10 is asked for 11, which is not positive; 12 is followed by a region, which is only read.
    assert batch.weights.tolist() == [0, 2.5, 0, 0, 2.5, 0, 2.5]
    assert batch.targets[batch.weights > 0].tolist() == [10, 12, 13]
    assert batch.inputs.query_actions is not None
    assert batch.inputs.query_actions[batch.weights > 0].tolist() == [1, 1, 1]


def test_the_first_event_of_a_cut_window_is_not_asked_for() -> None:
    """A server asks context alone only of users who have no events at all."""
    events, starts, ends = (
        columns([(item, 1, 100 + item) for item in range(6)] * 2),
        np.array([0, 6]),
        np.array([3, 12]),
    )
    side = beside([[1, 1], [1, 1]], [(REGION, 1, 50)], [(REGION, 1, 50)])
    batch = gather_training(events, starts, ends, WEIGHTS, 4 + 3, side)
    assert batch.inputs.kinds is not None
    assert batch.inputs.kinds.tolist() == [AGE, SEX, REGION, 0, 0, AGE, SEX, REGION, 0, 0, 0]
    assert batch.weights.tolist() == [0, 0, 2.5, 2.5, 2.5, 0, 0, 0, 2.5, 2.5, 2.5]


def test_without_loss_on_kinds_even_where_events_have_no_action() -> None:
    """Code 0 is positive in a dataset without actions, and is what tokens of other kinds have, too."""
    side = beside([[1, 1]], [(REGION, 1, 100)])
    batch = gather_training(
        columns([(4, 0, 90), (5, 0, 110)]), np.array([0]), np.array([2]), np.ones(1, np.float32), 50, side
    )
    assert batch.weights.tolist() == [0, 1, 0, 1]
    assert batch.targets[batch.weights > 0].tolist() == [4, 5]


HISTORIES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 6)), max_size=8),
        st.lists(st.tuples(st.integers(REGION, DEVICE), st.integers(0, 2), st.integers(0, 6)), max_size=8),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(HISTORIES, st.integers(5, 14))
def test_the_sequence_is_what_its_definition_says(
    users: list[tuple[list[tuple[int, int, int]], list[SideEvent]]], max_length: int
) -> None:
    """Beside a plain definition, row by row and token by token."""
    users = [tuple(sorted(part, key=lambda event: event[2]) for part in user) for user in users]  # type: ignore[misc]
    flat = [event for events, _ in users for event in events]
    ends = np.cumsum([len(events) for events, _ in users])
    starts = ends - [len(events) for events, _ in users]
    side = beside([[place, 1] for place in range(len(users))], *(series for _, series in users))
    batch = gather_histories(columns(flat), starts, ends, np.full(len(users), 9), max_length, side)
    for place, (events, series) in enumerate(users):
        expected = [(time, 0, (0, item, action, time)) for item, action, time in events]
        for kind in (REGION, DEVICE):
            before = None
            for _, value, time in (event for event in series if event[0] == kind):
                if value != before:
                    expected.append((time, kind, (kind, value, 0, time)))
                before = value
        merged = [token for _, _, token in sorted(expected, key=lambda one: one[:2])]
        cut, kept = merged[: -(max_length - 4)], merged[-(max_length - 4) :]
        last = {token[0]: at for at, token in enumerate(cut) if token[0]}
        body = [cut[at] for at in sorted(last.values())] + kept
        time = body[0][3] if body else 9
        part = slice(int(batch.offsets[place]), int(batch.offsets[place + 1]))
        assert tokens(batch)[part] == [(AGE, place, 0, time), (SEX, 1, 0, time), *body]
        assert batch.query_times[part].tolist() == [time, *([token[3] for token in body]), 9]


@settings(max_examples=100, deadline=None)
@given(HISTORIES, st.integers(5, 14))
def test_serving_sees_token_for_token_what_training_saw(
    users: list[tuple[list[tuple[int, int, int]], list[SideEvent]]], max_length: int
) -> None:
    """The last position of a training row is the request at the last event; other users share the batch or do not."""
    users = [user for user in users if len(user[0]) >= 2]
    if not users:
        return
    users = [tuple(sorted(part, key=lambda event: event[2]) for part in user) for user in users]  # type: ignore[misc]
    flat = columns([event for events, _ in users for event in events])
    ends = np.cumsum([len(events) for events, _ in users])
    starts = ends - [len(events) for events, _ in users]
    known = [[event for event in series if event[2] < events[-1][2]] for events, series in users]
    context = [[place, 1] for place in range(len(users))]
    trained = gather_training(flat, starts, ends, WEIGHTS, max_length, beside(context, *known)).inputs
    for place, (events, _) in enumerate(users):
        served = one(events[:-1], beside([context[place]], known[place]), events[-1][2], max_length)
        part = slice(int(trained.offsets[place]), int(trained.offsets[place + 1]))
        assert tokens(trained)[part] == tokens(served)
        assert trained.query_times[part].tolist() == served.query_times.tolist()


@pytest.mark.parametrize("max_length", [1, 3, 50])
def test_without_kinds_nothing_is_added(max_length: int) -> None:
    events = columns([(4, 1, 90), (5, 2, 110), (6, 1, 120)])
    batch = gather_histories(events, np.array([0]), np.array([3]), np.array([130]), max_length)
    assert batch.kinds is None
    assert batch.items.tolist() == [4, 5, 6][-max_length:]
