"""A kernel configuration that can be compiled ahead of time, on a machine without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AotCase"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AotCase:
    """Everything that Triton's compiler needs to know about one launch.

    Attributes:
        name: says kernel and configuration.
        kernel: the `triton.jit` function.
        signature: type of each argument, e.g. `*bf16`, `i32` or `constexpr`; a tuple of types for a tuple.
        constexprs: values of the constexpr arguments.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
