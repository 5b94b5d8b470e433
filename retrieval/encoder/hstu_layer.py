"""One HSTU layer (arXiv 2402.17152, equations 1–3, in the form of its public research code)."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.softmax_attention import softmax_attention
from retrieval.kernels.gated_norm import gated_norm
from retrieval.kernels.hstu_attention import AttentionPlan, hstu_attention
from retrieval.kernels.hstu_decode import hstu_decode
from retrieval.kernels.hstu_last import LayerWeights
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS, time_bucket

__all__ = ["HSTULayer"]

_EPS = 1e-6
_INIT_STD = 0.02


class HSTULayer(nn.Module):
    """Pointwise attention with gating; for the ablation, softmax attention in its place.

        U, V, Q, K = split(SiLU(LN(x) W))
        y = x + W_o · dropout(U ⊙ LN(attention(Q, K, V))) + b

    Both layer norms are without learned scale; W has no bias.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim = config.num_heads, config.qk_dim, config.v_dim
        self.norm, self.dropout, self.attention = config.attention_norm, config.dropout, config.attention
        value, query = self.num_heads * self.v_dim, self.num_heads * self.qk_dim
        self.widths = (value, value, query, query)
        self.uvqk = nn.Parameter(torch.empty(config.width, sum(self.widths)))
        self.output = nn.Linear(value, config.width)
        self.pos_table = nn.Parameter(torch.empty(config.positions)) if config.position_bias else None
        self.time_table = nn.Parameter(torch.empty(NUM_TIME_BUCKETS)) if config.time_bias else None
        for parameter in (self.uvqk, self.pos_table, self.time_table):
            if parameter is not None:
                nn.init.normal_(parameter, std=_INIT_STD)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def weights(self) -> LayerWeights:
        """What the fused layers read."""
        return LayerWeights(self.uvqk, self.output.weight, self.output.bias, self.pos_table, self.time_table)

    def forward(self, x_TD: Tensor, plan: AttentionPlan) -> Tensor:
        """`[T, D]` → `[T, D]`."""
        normed = functional.layer_norm(x_TD, x_TD.shape[-1:], eps=_EPS)
        u, v, q, k = functional.silu(normed @ self.uvqk).split(self.widths, dim=-1)
        q, k = (x.unflatten(-1, (self.num_heads, self.qk_dim)) for x in (q, k))
        v = v.unflatten(-1, (self.num_heads, self.v_dim))
        if self.attention == "softmax":
            bias = partial(self._bias, plan) if self.pos_table is not None or self.time_table is not None else None
            attended = softmax_attention(q, k, v, plan.where[0].cpu(), causal=True, bias=bias)
        else:
            attended = hstu_attention(
                q,
                k,
                v,
                *plan.where,
                pos_table=self.pos_table,
                time_table=self.time_table,
                norm=self.norm,
                prepared=plan.prepared,
                max_length=plan.max_length,
                backend=plan.backend,
            )
        return self._gate(x_TD, u, attended.flatten(-2), plan)

    def _bias(self, plan: AttentionPlan, tokens: Tensor, real: Tensor) -> Tensor:
        """Biases `[G, L, L]` of padded rows, for softmax attention."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        bias = tokens.new_zeros(tokens.shape[0], len(place), len(place), dtype=self.uvqk.dtype)
        if self.pos_table is not None:
            bias = bias + self.pos_table[(place.unsqueeze(1) - place).abs()]
        if self.time_table is not None:
            _, timestamps, query_times = plan.where
            delta = query_times[tokens].unsqueeze(2) - timestamps[tokens].unsqueeze(1)
            bias = bias + self.time_table[time_bucket(delta * real.unsqueeze(1)).long()]
        return bias

    def last(self, x_TD: Tensor, plan: AttentionPlan) -> Tensor:
        """What `forward` gives at the last token of each row, `[B, D]`, for a fraction of its work.

        Keys and values are computed for all tokens, the query and the gate for one per row. Rows must not be empty.
        Inference only.
        """
        assert not self.training
        if self.attention == "softmax":
            return self(x_TD, plan)[(plan.where[0][1:] - 1).to(x_TD.device)]
        offsets, timestamps, query_times = plan.where
        last_B = (offsets[1:] - 1).to(x_TD.device)
        position_B = (offsets.diff() - 1).to(x_TD.device)
        normed = functional.layer_norm(x_TD, x_TD.shape[-1:], eps=_EPS)
        w_u, w_v, w_q, w_k = self.uvqk.split(self.widths, dim=-1)
        u, q = (functional.silu(normed.index_select(0, last_B) @ weight) for weight in (w_u, w_q))
        v, k = (functional.silu(normed @ weight) for weight in (w_v, w_k))
        attended = hstu_decode(
            q.view(-1, 1, self.num_heads, self.qk_dim),
            k.unflatten(-1, (self.num_heads, self.qk_dim)),
            v.unflatten(-1, (self.num_heads, self.v_dim)),
            offsets,
            timestamps,
            query_times.index_select(0, last_B).unsqueeze(1),
            position_B.unsqueeze(1),
            pos_table=self.pos_table,
            time_table=self.time_table,
            norm=self.norm,
            max_length=plan.max_length,
            backend=plan.backend,
        ).flatten(1)
        return self._gate(x_TD.index_select(0, last_B), u, attended, plan)

    def _gate(self, x: Tensor, u: Tensor, attended: Tensor, plan: AttentionPlan) -> Tensor:
        p = self.dropout if self.training else 0.0
        # Drawn on the CPU, whose generator the trainer seeds: the mask is then the same on a GPU.
        seed = torch.randint(2**62, ()).to(x.device, non_blocking=True) if p else 0
        out: Tensor = x + self.output(gated_norm(attended, u, p=p, seed=seed, backend=plan.backend))
        return out
