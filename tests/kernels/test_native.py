"""The compiled part of the CPU backend: when it is built, when it is not, and that it gives the same answers."""

import logging
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from retrieval.kernels import native
from retrieval.kernels.hstu_attention import plan_attention
from tests.kernels.attention_problem import Problem
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def compiler(folder: Path, script: str) -> Path:
    file = folder / "c++"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def need_compiler() -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler")


def test_it_is_compiled_once_and_then_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiler()
    (built,) = (tmp_path / "cache" / "retrieval").iterdir()
    before = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [built] == list((tmp_path / "cache" / "retrieval").iterdir())
    assert built.stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_made_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native.library.cache_clear()
    assert native.library() is not None


def test_without_a_compiler_the_log_says_what_that_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
        assert native.library() is None
    assert [record.message for record in caplog.records] == [
        "no C++ compiler: kernels on the CPU run in torch operations, about twice as slow"
    ]


def test_a_compiler_that_fails_is_named_in_the_log_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = 'if [ "$1" = --version ]; then echo odd 1.0; exit 0; fi; echo "odd: internal error" >&2; exit 1'
    monkeypatch.setenv("CXX", str(compiler(tmp_path, script)))
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
    assert "odd: internal error" in caplog.text
    assert list((tmp_path / "cache" / "retrieval").iterdir()) == []


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIEVAL_NATIVE", "0")
    assert native.library() is None
    problem = Problem([5, 0, 3])
    plan = plan_attention(problem.offsets, problem.timestamps, problem.query_times)
    assert plan.prepared is not None
    assert plan.prepared.dtype == torch.int32


@pytest.mark.parametrize(("qk", "v"), [(1, 1), (16, 33), (25, 25), (50, 50), (67, 8)])
@pytest.mark.parametrize("window", [None, 19])
def test_widths_and_lengths_beyond_one_block_and_vector(qk: int, v: int, window: int | None) -> None:
    need_compiler()
    problem = Problem([65, 16, 17, 1, 0, 129], qk=qk, v=v, heads=3)
    options = {"window": window, "norm": None, "alpha": qk**-0.5}
    expected = problem.run(torch.float64, "reference", **options)
    for index, (a, e) in enumerate(zip(problem.run(torch.float32, "cpu", **options), expected, strict=True)):
        assert_close(a, e, "hstu_attention", "forward" if index == 0 else "backward")


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    need_compiler()
    problem = Problem([300] * 12 + [5, 700], qk=8, v=8)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(problem.run(torch.float32, "cpu"))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    need_compiler()
    alone, together = Problem([40], seed=3), Problem([40, 90, 7], seed=3)
    together.timestamps[:40], together.query_times[:40] = alone.timestamps, alone.query_times
    for mine, theirs in zip(alone.leaves[:3], together.leaves[:3], strict=True):
        theirs[:40] = mine
    for place in (3, 4):
        together.leaves[place][: len(alone.leaves[place])] = alone.leaves[place]
    outputs = [problem.run(torch.float32, "cpu", backward=False)[0][:40] for problem in (alone, together)]
    assert torch.equal(*outputs)


def test_not_a_number_is_not_lost() -> None:
    need_compiler()
    problem = Problem([6])
    problem.leaves[0][2] = torch.nan
    out = problem.run(torch.float32, "cpu", backward=False)[0]
    assert out.isnan().flatten(1).all(1).tolist() == [False, False, True, False, False, False]


def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    need_compiler()
    code = "from retrieval.kernels import native; assert native.library() is not None"
    runs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
