"""Every numerical tolerance of the test suite, with its reason.

Keys are (operation, dtype, direction). Values are the largest accepted |result − reference| relative to the largest
|reference|.
"""

import torch
from torch import Tensor

TOLERANCES: dict[tuple[str, torch.dtype, str], float] = {
    # Same arithmetic in another order of summation, at most 200 terms: a few units in the last place.
    ("hstu_attention", torch.float64, "forward"): 1e-13,
    ("hstu_attention", torch.float64, "backward"): 1e-12,
    # Against a float64 reference: float32 products summed over up to 200 keys.
    ("hstu_attention", torch.float32, "forward"): 2e-6,
    ("hstu_attention", torch.float32, "backward"): 5e-6,
    # A whole encoder run with other batch-mates: other shapes, so other blocking in the matrix products.
    ("embedding", torch.float32, "forward"): 2e-5,
}


def assert_close(actual: Tensor, expected: Tensor, operation: str, direction: str) -> None:
    """Compare by the table; the scale is the reference's largest magnitude."""
    bound = TOLERANCES[operation, actual.dtype, direction] * max(float(expected.abs().max()), 1e-30)
    error = float((actual.double() - expected.double()).abs().max())
    assert error <= bound, f"{operation} {direction}: error {error:.3g} exceeds {bound:.3g}"
