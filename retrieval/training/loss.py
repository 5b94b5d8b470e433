"""Next-item loss: full and sampled softmax over cosine similarities, with corrections for how negatives were drawn."""

from typing import Literal

import torch
from torch import Tensor

from retrieval.kernels.softmax_loss import softmax_loss
from retrieval.training.negatives import Negatives

__all__ = ["LogQ", "next_item_loss"]

LogQ = Literal["none", "standard", "corrected"]


def next_item_loss(
    users_TD: Tensor,
    targets: Tensor,
    negatives: Negatives,
    item_table: Tensor,
    *,
    temperature: float,
    log_q: LogQ = "none",
    weights: Tensor | None = None,
) -> Tensor:
    """Mean over T of −log( e^{s⁺} / (e^{s⁺} + Σ_r e^{s_r}) ), s = u·e/τ, item vectors e of unit length.

    A negative that equals the position's own target is left out of its sum. With the expected number R·Q of draws of
    an item, `log_q` puts in place of s

        none:       s, for negatives and positive
        standard:   s − log(R·Q), for both (Yi et al., RecSys 2019, eq. 5)
        corrected:  s − log(R·Q), for negatives only: the positive is not drawn, it is there anyway

    The corrected form has the gradient of the loss of arXiv 2507.09331, −sg(1 − p⁺)·log(e^{s⁺} / Σ_r e^{s_r − log Q}):
    the gradient of log(1 + e^x) is 1 − p⁺ times that of x, with x the log of the sum over the negatives less s⁺. Its
    value estimates the full softmax's: Σ_r e^{s_r} / (R·Q_r) has the mean Σ e^s over all items but the target. (The
    paper takes Q without the target and counts the draws that are not the target; of the same mean.)

    Args:
        users_TD: user embeddings of unit length `[T, D]`.
        targets: rows of the items that came next, int64 `[T]`.
        negatives: what to contrast with.
        item_table: unnormalised item table `[N, D]`; gradients reach only the rows named.
        temperature: τ.
        log_q: correction; the full softmax has nothing to correct.
        weights: w ≥ 0 of each position, for instance by its action, floating `[T]`: Σ w·loss / Σ w in place of the
            mean. A constant.

    Returns:
        A scalar; 0 where there are no positions, or none has weight.

    Memory is of order (T + R) × D beside the table's gradient: see `kernels.softmax_loss`.
    """
    negative_bias = positive_bias = None
    if negatives.rows is not None and log_q != "none":
        assert negatives.log_expected is not None, "drawn without telling how likely"
        negative_bias = -negatives.log_expected
        if log_q == "standard":
            assert negatives.target_log_expected is not None, "drawn without telling how likely"
            positive_bias = -negatives.target_log_expected
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    return softmax_loss(
        users_TD,
        targets,
        item_table,
        negatives.rows,
        temperature=temperature,
        # Float32's least normal number: nothing over nothing is 0.
        weights=weights / weights.sum().clamp(min=torch.finfo(torch.float32).tiny),
        negative_bias=negative_bias,
        positive_bias=positive_bias,
    )
