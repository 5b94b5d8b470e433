"""Learning rates against values worked out by hand."""

import pytest

from retrieval.training.schedule import Schedule, learning_rate_at


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 2.0, 3.0, 3.0, 3.0, 3.0]),
        ("linear", [1.0, 2.0, 3.0, 2.25, 1.5, 0.75]),
        ("cosine", [1.0, 2.0, 3.0, 2.5606602, 1.5, 0.4393398]),
    ],
)
def test_the_rate_rises_then_falls(schedule: Schedule, expected: list[float]) -> None:
    assert [learning_rate_at(step, 6, 3.0, schedule, 2) for step in range(6)] == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert [learning_rate_at(step, 2, 1.0, "cosine", 9) for step in range(2)] == pytest.approx([0.1, 0.2])
