"""Every Triton kernel compiles for GPUs that are not here, without spills and within their shared memory."""

import importlib.util
from pathlib import Path

import pytest

import retrieval.kernels
from tests.kernels.aot import SHARED_LIMIT, compile_module

MODULES = sorted(path.stem for path in Path(retrieval.kernels.__path__[0]).glob("*_triton.py"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("chip", SHARED_LIMIT)
@pytest.mark.parametrize("module", MODULES)
def test_default_configurations_compile_without_spills(module: str, chip: str) -> None:
    found = compile_module(f"retrieval.kernels.{module}", chip)
    assert found, "the module offers no cases"
    for one in found:
        print(f"{chip} {one.name}: {one.registers} registers, {one.spilled} B spilled, {one.shared} B shared")
    assert not [one for one in found if one.spilled], "spills"
    assert not [one for one in found if one.shared > SHARED_LIMIT[chip]], "too much shared memory"
