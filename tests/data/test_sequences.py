import numpy as np
import pytest

from retrieval.data.sequences import gather_histories, gather_training
from retrieval.types import EventColumns

# Two users end to end: events 0–4 and 5–6.
EVENTS = EventColumns(
    items=np.array([10, 11, 12, 13, 14, 20, 21], np.int32),
    actions=np.array([1, 2, 1, 2, 1, 1, 1], np.uint8),
    timestamps=np.array([100, 110, 120, 130, 140, 500, 505], np.int64),
)
STARTS, ENDS = np.array([0, 5]), np.array([5, 7])
WEIGHTS = np.array([0, 2.5, 0], np.float32)


def test_histories_are_cut_to_the_last_events_and_asked_at_the_next_events_time() -> None:
    batch = gather_histories(EVENTS, STARTS, ENDS, np.array([200, 600]), max_length=3)
    assert batch.offsets.tolist() == [0, 3, 5]
    assert batch.items.tolist() == [12, 13, 14, 20, 21]
    assert batch.actions.tolist() == [1, 2, 1, 1, 1]
    assert batch.timestamps.tolist() == [120, 130, 140, 500, 505]
    assert batch.query_times.tolist() == [130, 140, 200, 505, 600]


def test_a_request_before_the_last_event_counts_as_made_at_that_event() -> None:
    batch = gather_histories(EVENTS, STARTS, ENDS, np.array([1, 600]), max_length=9)
    assert batch.query_times[4] == 140


def test_empty_histories_give_empty_rows() -> None:
    batch = gather_histories(EVENTS, np.array([0, 5, 7]), np.array([0, 7, 7]), np.array([9, 600, 9]), max_length=9)
    assert batch.offsets.tolist() == [0, 0, 2, 2]
    assert batch.query_times.tolist() == [505, 600]


def test_a_training_batch_asks_for_each_next_item_at_its_own_time() -> None:
    batch = gather_training(EVENTS, STARTS, ENDS, WEIGHTS, max_length=3)
    assert batch.inputs.items.tolist() == [11, 12, 13, 20]
    assert batch.targets.tolist() == [12, 13, 14, 21]
    assert batch.inputs.query_times.tolist() == [120, 130, 140, 505]
    assert batch.weights.tolist() == [2.5, 0, 2.5, 2.5]


def test_no_input_is_its_own_target_nor_later() -> None:
    """Each token's target is the event after it: a model that copies what it reads finds nothing."""
    items = EventColumns(items=np.arange(7, dtype=np.int32), actions=EVENTS.actions, timestamps=EVENTS.timestamps)
    batch = gather_training(items, STARTS, ENDS, WEIGHTS, max_length=50)
    assert (batch.targets == batch.inputs.items + 1).all()
    for start, end in zip(batch.inputs.offsets[:-1], batch.inputs.offsets[1:], strict=True):
        assert batch.inputs.items[start:end].max() < batch.targets[end - 1]


@pytest.mark.parametrize("max_length", [1, 2, 3, 50])
def test_serving_sees_token_for_token_what_training_saw(max_length: int) -> None:
    """The last training position of a user is the query of that user at the moment of the target."""
    trained = gather_training(EVENTS, STARTS, ENDS, WEIGHTS, max_length).inputs
    served = gather_histories(EVENTS, STARTS, ENDS - 1, EVENTS.timestamps[ENDS - 1], max_length)
    for field in ("offsets", "items", "actions", "timestamps", "query_times"):
        np.testing.assert_array_equal(getattr(trained, field), getattr(served, field))
