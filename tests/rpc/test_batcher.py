import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from retrieval.rpc.batcher import Batcher
from retrieval.rpc.errors import DeadlineError, OverloadedError


class Gate:
    """A run that doubles numbers, held up until the gate is opened, and remembers its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, jobs: list[int]) -> Sequence[int]:
        self.batches.append(list(jobs))
        assert self.open.wait(10)
        if 13 in jobs:
            raise ValueError("13 brings bad luck")
        return [2 * job for job in jobs]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_what_waits_while_the_worker_is_busy_is_run_together_in_order() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=4, capacity=100)
        first = asyncio.create_task(batcher.submit(0))
        await until(lambda: gate.batches)
        rest = [asyncio.create_task(batcher.submit(number)) for number in range(1, 8)]
        await asyncio.sleep(0.01)
        gate.open.set()
        assert await asyncio.gather(first, *rest) == [0, 2, 4, 6, 8, 10, 12, 14]
        assert gate.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
        batcher.close()

    run(scenario())


def test_calls_that_come_in_one_turn_of_the_loop_after_the_other_share_a_batch() -> None:
    async def scenario() -> None:
        gate = Gate()
        gate.open.set()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=4, capacity=100)
        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(batcher.submit(number)))
            await asyncio.sleep(0)
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
        assert gate.batches == [[0, 1, 2, 3]]
        batcher.close()

    run(scenario())


def test_a_cancelled_job_never_runs_and_leaves_the_queue_at_once() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=4, capacity=100)
        tasks = [asyncio.create_task(batcher.submit(0))]
        await until(lambda: gate.batches)
        tasks += [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0.01)
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert batcher.waiting == 2
        gate.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answer for answer in answers if not isinstance(answer, BaseException)] == [0, 2, 6]
        assert tasks[2].cancelled()
        assert gate.batches == [[0], [1, 3]]
        batcher.close()

    run(scenario())


def test_a_job_that_is_cancelled_in_the_moment_when_its_batch_starts_never_runs() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=4, capacity=100)
        gate.open.set()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (1, 2)]
        # Both jobs wait, and the start of their batch is the event loop's next step.
        await asyncio.sleep(0)
        tasks[0].cancel()
        assert await tasks[1] == 4
        assert gate.batches == [[2]]
        batcher.close()

    run(scenario())


def test_a_job_whose_deadline_passes_while_it_waits_never_runs() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=4, capacity=100)
        now = asyncio.get_running_loop().time()
        first = asyncio.create_task(batcher.submit(0, now + 0.001))
        await until(lambda: gate.batches)
        late = asyncio.create_task(batcher.submit(1, now + 0.02))
        in_time = asyncio.create_task(batcher.submit(2, now + 100))
        await asyncio.sleep(0.05)
        gate.open.set()
        # The first had begun before its deadline passed; its caller may still want the answer.
        assert await first == 0
        with pytest.raises(DeadlineError):
            await late
        assert await in_time == 4
        assert gate.batches == [[0], [2]]
        batcher.close()

    run(scenario())


def test_a_job_that_fails_does_not_fail_its_batch_mates() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=8, capacity=100)
        gate.open.set()
        answers = await asyncio.gather(*map(batcher.submit, (1, 13, 3)), return_exceptions=True)
        assert (answers[0], answers[2]) == (2, 6)
        assert isinstance(answers[1], ValueError)
        assert await batcher.submit(4) == 8
        batcher.close()

    run(scenario())


def test_slots_beyond_the_capacity_are_refused_and_come_back() -> None:
    batcher: Batcher[int, int] = Batcher(Gate(), max_batch=1, capacity=2)
    with batcher.slot():
        with batcher.slot(), pytest.raises(OverloadedError, match="2 calls are in hand"), batcher.slot():
            pass
        with batcher.slot():
            pass
    batcher.close()


def test_clients_take_turns() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=3, capacity=100)
        tasks = [asyncio.create_task(batcher.submit(0))]
        await until(lambda: gate.batches)
        tasks += [asyncio.create_task(batcher.submit(number, client="greedy")) for number in range(1, 6)]
        tasks += [asyncio.create_task(batcher.submit(number, client="modest")) for number in (21, 22)]
        await asyncio.sleep(0.01)
        gate.open.set()
        await asyncio.gather(*tasks)
        assert gate.batches == [[0], [1, 21, 2], [22, 3, 4], [5]]
        batcher.close()

    run(scenario())


def test_one_client_may_not_take_every_slot() -> None:
    batcher: Batcher[int, int] = Batcher(Gate(), max_batch=1, capacity=3, client_capacity=1)
    with batcher.slot("a"):
        with pytest.raises(OverloadedError, match="1 calls of a are in hand"), batcher.slot("a"):
            pass
        with batcher.slot("b"):
            assert batcher.in_hand == 2
    with batcher.slot("a"):
        assert batcher.in_hand == 1
    batcher.close()


def test_a_job_that_cannot_start_before_its_deadline_is_refused_at_once_and_told_when_to_return() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, max_batch=2, capacity=100)
        batcher._batch_seconds = 50.0
        tasks = [asyncio.create_task(batcher.submit(0))]
        await until(lambda: gate.batches)
        now = asyncio.get_running_loop().time()
        tasks += [asyncio.create_task(batcher.submit(number, client="greedy")) for number in range(1, 10)]
        await asyncio.sleep(0)
        # One batch runs and four and a half wait: 250 s for the greedy one. Others take their turn in the first.
        with pytest.raises(OverloadedError, match="after the deadline") as refusal:
            await batcher.submit(10, now + 200, "greedy")
        assert refusal.value.retry_seconds == pytest.approx(250, abs=1)
        tasks.append(asyncio.create_task(batcher.submit(11, now + 200, "modest")))
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(*tasks)
        # An idle worker takes everything: only a batch that runs can tell that batches have become fast.
        batcher._batch_seconds = 50.0
        assert await batcher.submit(12, asyncio.get_running_loop().time() + 5) == 24
        batcher.close()

    run(scenario())


def test_a_batch_is_begun_and_ended_on_the_loop_and_run_on_the_worker() -> None:
    async def scenario() -> None:
        threads: dict[str, set[str]] = {"begin": set(), "run": set(), "end": set()}

        def begin(jobs: list[int]) -> list[str | Exception]:
            threads["begin"].add(threading.current_thread().name)
            return [ValueError("13 brings bad luck") if job == 13 else str(job) for job in jobs]

        def work(jobs: list[str]) -> list[int | Exception]:
            threads["run"].add(threading.current_thread().name)
            assert "13" not in jobs
            return [KeyError(job) if job == "4" else 2 * int(job) for job in jobs]

        def end(jobs: list[str], found: Sequence[int | Exception]) -> list[str | Exception]:
            threads["end"].add(threading.current_thread().name)
            return [
                one if isinstance(one, Exception) else f"{job}+{job}={one}"
                for job, one in zip(jobs, found, strict=True)
            ]

        batcher: Batcher[int, str] = Batcher(work, begin=begin, end=end, max_batch=8, capacity=100)
        answers = await asyncio.gather(*map(batcher.submit, (3, 13, 4, 5)), return_exceptions=True)
        assert [answers[0], answers[3]] == ["3+3=6", "5+5=10"]
        assert [type(answers[1]), type(answers[2])] == [ValueError, KeyError]
        here = {threading.current_thread().name}
        assert threads["begin"] == threads["end"] == here
        assert threads["run"].isdisjoint(here)
        # A batch of which nothing is left does not hold up the next one.
        with pytest.raises(ValueError, match="bad luck"):
            await batcher.submit(13)
        assert await batcher.submit(6) == "6+6=12"
        batcher.close()

    run(scenario())


@pytest.mark.parametrize("part", ["begin", "end"])
def test_a_batch_that_cannot_be_begun_or_ended_fails_and_the_next_one_is_run(part: str) -> None:
    def breaks(jobs: list[int], found: Sequence[int] | None = None) -> Sequence[int]:
        if 13 in jobs:
            raise ValueError("13 brings bad luck")
        return found if found is not None else jobs

    async def scenario() -> None:
        begin, end = (breaks if part == one else None for one in ("begin", "end"))
        batcher: Batcher[int, int] = Batcher(
            lambda jobs: [2 * job for job in jobs], begin=begin, end=end, max_batch=2, capacity=100
        )
        answers = await asyncio.gather(*map(batcher.submit, (1, 13, 2, 3)), return_exceptions=True)
        assert [type(answer) for answer in answers[:2]] == [ValueError, ValueError]
        assert answers[2:] == [4, 6]
        batcher.close()

    run(scenario())
