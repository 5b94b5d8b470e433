"""Measured launches: found again by device and shape, and never a reason to fail."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernel_cases import attention_case
from benchmarks.tune_kernels import candidates, tune
from retrieval.kernels import launch
from retrieval.kernels.backend import interpreting
from retrieval.kernels.launch import LaunchConfig

CPU = torch.device("cpu")
KEY = "forward qk8 v8 bytes4"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch.table.cache_clear()
    yield
    launch.table.cache_clear()


def write(content: str) -> None:
    launch.table_path().parent.mkdir()
    launch.table_path().write_text(content)


def test_a_saved_configuration_is_found_by_its_shape_alone() -> None:
    launch.table(CPU)[KEY] = LaunchConfig(32, 16, 4, 1)
    launch.save_table(CPU)
    launch.table.cache_clear()
    assert launch.tuned("forward", CPU, 8, 8, 4) == LaunchConfig(32, 16, 4, 1)
    assert launch.tuned("forward", CPU, 8, 8, 2) is None
    assert launch.tuned("keys", CPU, 8, 8, 4) is None


def test_saving_keeps_what_other_devices_have() -> None:
    write(json.dumps({"another": {KEY: [16, 16, 4, 1]}}))
    launch.save_table(CPU)
    assert json.loads(launch.table_path().read_text())["another"] == {KEY: [16, 16, 4, 1]}


@pytest.mark.parametrize("content", ["{", "[]", '{"NAME": {"KEY": [48, 16, 4, 1]}}', '{"NAME": {"KEY": [16, 16]}}'])
def test_a_file_that_cannot_be_used_means_defaults_and_a_warning(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(content.replace("NAME", launch.device_name(CPU)).replace("KEY", KEY))
    assert launch.tuned("forward", CPU, 8, 8, 4) is None
    assert "launched by their defaults" in caplog.text


@pytest.mark.skipif(not interpreting(), reason="times kernels in the interpreter")
@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "distances"])
def test_tuning_keeps_the_fastest_that_gives_the_same_answer(
    kernel: launch.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.kernel_cases._ours", lambda _: "triton")
    case = attention_case("full", 20, 40, 8, True, torch.float32, CPU)
    slow, fast = LaunchConfig(16, 16, 4, 2), LaunchConfig(16, 16, 4, 1)
    key = launch.shape_key(kernel, 8, 8, 4)
    # The clock: a millisecond for the fast one, two for all else.
    monkeypatch.setattr(
        "benchmarks.tune_kernels.timed", lambda *_: (0.0, 1.0 if launch.table(CPU).get(key) == fast else 2.0, 0.0)
    )
    assert tune(kernel, case, 8, CPU, [slow, fast, slow]) == (2.0, 1.0)
    assert launch.table(CPU) == {key: fast}


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "distances"])
def test_the_list_of_candidates_is_bounded(kernel: launch.Kernel) -> None:
    for width in (8, 64, 256):
        assert 2 <= len(list(candidates(kernel, width))) <= 60
