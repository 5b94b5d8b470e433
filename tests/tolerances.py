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
    # A row's mean and variance summed in another order; a gradient cancels two means, so loses a digit more.
    ("gated_norm", torch.float64, "forward"): 1e-13,
    ("gated_norm", torch.float64, "backward"): 1e-12,
    ("gated_norm", torch.float32, "forward"): 2e-6,
    ("gated_norm", torch.float32, "backward"): 1e-5,
    # As hstu_attention: up to a few hundred keys in another order of summation.
    ("hstu_decode", torch.float64, "forward"): 1e-13,
    ("hstu_decode", torch.float32, "forward"): 2e-6,
    # Up to five layers on top of each other, each with attention as above and three layer norms' worth of rounding.
    ("hstu_last", torch.float32, "forward"): 1e-5,
    # Sums over the negatives in another order, logits up to 1/τ = 20 (1000 in float64), whose rounding is a relative
    # error of their exponentials; the gradient of the table also goes through the norm of its rows.
    ("softmax_loss", torch.float64, "forward"): 1e-12,
    ("softmax_loss", torch.float64, "backward"): 5e-12,
    ("softmax_loss", torch.float32, "forward"): 2e-6,
    ("softmax_loss", torch.float32, "backward"): 2e-5,
    # A whole encoder run with other batch-mates: other shapes, so other blocking in the matrix products.
    ("embedding", torch.float32, "forward"): 2e-5,
}


def assert_close(actual: Tensor, expected: Tensor, operation: str, direction: str) -> None:
    """Compare by the table; the scale is the reference's largest magnitude."""
    bound = TOLERANCES[operation, actual.dtype, direction] * max(float(expected.abs().max()), 1e-30)
    error = float((actual.double() - expected.double()).abs().max())
    assert error <= bound, f"{operation} {direction}: error {error:.3g} exceeds {bound:.3g}"


# A kernel's error as a multiple of that of plain torch in the same dtype, both against high precision; the rule of
# FBGEMM and NVIDIA's recsys-examples.
RULE = {"forward": 2.0, "backward": 5.0}


def assert_close_by_rule(actual: Tensor, same_dtype: Tensor, exact: Tensor, operation: str, direction: str) -> None:
    """Bound max|actual − exact| by a multiple of max|same_dtype − exact|.

    One rounding of the largest element always counts as torch's error: on small inputs torch can be exact by luck.
    """
    assert actual.dtype == same_dtype.dtype
    if not exact.numel():
        assert actual.shape == exact.shape
        return
    exact = exact.double().to(actual.device)
    unit = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    bound = RULE[direction] * max(float((same_dtype.to(exact.device).double() - exact).abs().max()), unit)
    error = float((actual.double() - exact).abs().max())
    assert error <= bound, f"{operation} {direction}: error {error:.3g} exceeds {bound:.3g}"
