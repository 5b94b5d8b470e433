"""`hstu_decode` row by row in plain torch."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.time_bucket import time_bucket_reference

__all__ = ["hstu_decode_reference"]


def hstu_decode_reference(
    q_BMHD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times_BM: Tensor,
    query_positions_BM: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    *,
    norm: float | None,
    alpha: float,
) -> Tensor:
    """As `hstu_decode.hstu_decode`; any floating dtype, computed in it."""
    outs = []
    ends = offsets.tolist()
    for row, (start, end) in enumerate(pairwise(ends)):
        distance_ML = query_positions_BM[row].unsqueeze(1) - torch.arange(end - start, device=q_BMHD.device)
        visible_ML = distance_ML >= 0
        q_HMD, k_HLD, v_HLV = (x.transpose(0, 1) for x in (q_BMHD[row], k_THD[start:end], v_THV[start:end]))
        scores_HML = alpha * (q_HMD @ k_HLD.mT)
        if pos_table is not None:
            scores_HML = scores_HML + pos_table[distance_ML.clamp(min=0)]
        if time_table is not None:
            delta_ML = query_times_BM[row].unsqueeze(1) - timestamps[start:end]
            scores_HML = scores_HML + time_table[time_bucket_reference(delta_ML).long()]
        count_M1 = visible_ML.sum(1, keepdim=True).clamp(min=1) if norm is None else norm
        attention_HML = torch.where(visible_ML, functional.silu(scores_HML), 0) / count_M1
        outs.append((attention_HML @ v_HLV).transpose(0, 1))
    return torch.stack(outs) if outs else q_BMHD.new_zeros(*q_BMHD.shape[:3], v_THV.shape[2])
