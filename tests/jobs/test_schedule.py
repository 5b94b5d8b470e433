"""The scheduler runs real processes; only the times are made up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from retrieval.cli.main import main
from retrieval.errors import ConfigError, InputError
from retrieval.files import locked
from retrieval.jobs.schedule import crontab, run_on_schedule


class Times:
    """A trigger with given times."""

    def __init__(self, *times: datetime) -> None:
        self.times = times

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        return next((one for one in self.times if one >= now), None)


def writer(file: Path, seconds: float = 0.0, code: int = 0) -> list[str]:
    program = f"import time, sys; open({str(file)!r}, 'a').write('x'); time.sleep({seconds}); sys.exit({code})"
    return [sys.executable, "-c", program]


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def remember(state: Path, moment: datetime) -> None:
    state.write_text(json.dumps({"last_start": moment.isoformat()}))


def test_every_time_runs_once_and_failures_do_not_end_it(tmp_path: Path) -> None:
    lines: list[str] = []
    times = Times(soon(0.1), soon(0.8))
    command = writer(tmp_path / "runs", code=3)
    run_on_schedule(command, times, tmp_path / "state", stop=threading.Event(), report=lines.append)
    assert (tmp_path / "runs").read_text() == "xx"
    assert sum("ended with exit code 3" in line for line in lines) == 2
    assert lines[-1] == "there is no later time: done"


@pytest.mark.parametrize(("missed", "runs"), [("run", "x"), ("skip", "")])
def test_times_missed_while_it_did_not_run_are_made_up_for_by_one_run_or_skipped(
    tmp_path: Path, missed: str, runs: str
) -> None:
    remember(tmp_path / "state", soon(-86_400))
    past = [soon(-60 * minutes) for minutes in (50, 40, 30)]
    run_on_schedule(
        writer(tmp_path / "runs"),
        Times(*past),
        tmp_path / "state",
        missed=missed,  # type: ignore[arg-type]
        stop=threading.Event(),
    )
    assert (tmp_path / "runs").read_text() if runs else not (tmp_path / "runs").exists()
    if runs:
        assert (tmp_path / "runs").read_text() == runs
        assert datetime.fromisoformat(json.loads((tmp_path / "state").read_text())["last_start"]) > soon(-60)


def test_times_that_pass_during_a_run_are_made_up_for_by_one_run(tmp_path: Path) -> None:
    times = Times(soon(0.0), soon(0.3), soon(0.5), soon(0.7))
    remember(tmp_path / "state", soon(-1))
    run_on_schedule(writer(tmp_path / "runs", seconds=1.0), times, tmp_path / "state", stop=threading.Event())
    assert (tmp_path / "runs").read_text() == "xx"


def test_two_schedulers_do_not_share_a_state(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "state.lock"),
        pytest.raises(InputError, match="state: another scheduler is at work with it"),
    ):
        run_on_schedule(["true"], Times(), tmp_path / "state", stop=threading.Event())


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("[]")
    with pytest.raises(InputError, match="is not the state of a scheduler"):
        run_on_schedule(["true"], Times(), tmp_path / "state", stop=threading.Event())
    assert (tmp_path / "state").read_text() == "[]"


def test_crontab_lines() -> None:
    now = datetime(2024, 1, 3, 12, tzinfo=UTC)  # a Wednesday
    assert crontab("0 3 * * *", "UTC").get_next_fire_time(None, now) == datetime(2024, 1, 4, 3, tzinfo=UTC)
    # Paris is an hour ahead in winter.
    assert crontab("0 3 * * sun", "Europe/Paris").get_next_fire_time(None, now) == datetime(2024, 1, 7, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("line", "timezone", "sentence"),
    [
        ("0 3 * *", "UTC", "Wrong number of fields"),
        ("0 25 * * *", "UTC", "25"),
        ("0 3 * * 1-5", "UTC", "name the days of the week"),
        ("0 3 * * *", "Mars/Olympus", "Mars/Olympus"),
    ],
)
def test_what_is_no_time_is_refused(line: str, timezone: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        crontab(line, timezone)


def test_mistakes_in_the_options_of_rebuild_are_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ["schedule", "--cron", "0 3 * * *", "--state", str(tmp_path / "state")]
    assert main(schedule) == 2
    assert "what to rebuild?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*schedule, "--", "log", "--registry", "r", "--works", "w"])
    assert ended.value.code == 2
    assert not (tmp_path / "state").exists()


def test_the_command_makes_up_for_a_missed_night_and_ends_on_sigterm(tmp_path: Path) -> None:
    remember(tmp_path / "state", soon(-3 * 86_400))
    command = [sys.executable, "-m", "retrieval.cli.main", "schedule", "--cron", "0 3 * * *"]
    command += ["--state", str(tmp_path / "state"), "--", str(tmp_path / "nothing"), "--registry", str(tmp_path / "r")]
    command += ["--work", str(tmp_path / "w")]
    environment = os.environ | {"COLUMNS": "999"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stderr is not None
        lines = []
        for line in running.stderr:
            lines.append(line)
            if "next run at" in line:
                break
        time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
    text = "".join(lines)
    assert "nothing: no such file or folder" in text
    assert "ended with exit code 2" in text


def test_a_night_in_hand_gets_sigterm_and_is_waited_for(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.5); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    stop, lines = threading.Event(), list[str]()
    remember(tmp_path / "state", soon(-60))
    arguments = ([sys.executable, "-c", program], Times(soon(-1)), tmp_path / "state")
    thread = threading.Thread(target=run_on_schedule, args=arguments, kwargs={"stop": stop, "report": lines.append})
    thread.start()
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert "ended with exit code 143" in lines[-1]
