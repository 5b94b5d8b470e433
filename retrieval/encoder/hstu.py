"""The HSTU user encoder."""

from torch import Tensor, nn

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu_layer import HSTULayer
from retrieval.encoder.protocol import UserEncoder, normalize
from retrieval.kernels.backend import Backend
from retrieval.kernels.hstu_attention import AttentionPlan, plan_attention
from retrieval.kernels.hstu_last import fits, hstu_last

__all__ = ["HSTUEncoder"]


class HSTUEncoder(UserEncoder):
    """Histories in, one embedding per token out (arXiv 2402.17152).

        x_0 = dropout((E_kind[id] + A[action] + Q[action asked for]) · √D + P[position])
        x_{l+1} = layer_l(x_l);  u = x_L / |x_L|

    u at a token is the user's embedding just after that event, for a request at the token's query time. Candidates
    are scored by u·e with e the normalised row of the same item table E.
    """

    def __init__(self, config: HSTUConfig, *, backend: Backend = "auto") -> None:
        super().__init__(config)
        # Which kernels run is a matter of the machine, not of the model: it is not saved with the weights.
        self.backend: Backend = backend
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))

    def _encode(self, x_TD: Tensor, tokens: JaggedTensors) -> Tensor:
        plan = self._plan(tokens, len(self.layers))
        for layer in self.layers:
            x_TD = layer(x_TD, plan)
        return normalize(x_TD)

    def last(self, batch: JaggedTensors) -> Tensor:
        """User embeddings of unit length after each row's last token, `[B, D]`: what serving asks for.

        Equal to `forward` at those tokens up to rounding; the last layer computes one query per row. On a CPU with the
        compiled kernels all layers are one call. Rows must not be empty. Evaluation mode and no gradient.
        """
        if self.config.layout == "interleaved":
            batch, _ = batch.interleaved()
        x = self._embed(self._look_up(batch), batch)
        config = self.config
        assert isinstance(config, HSTUConfig)
        if self.backend == "auto" and config.attention == "pointwise" and fits(x):
            layers = [layer.weights for layer in self.layers if isinstance(layer, HSTULayer)]
            where = batch.offsets, batch.timestamps, batch.query_times
            shape = {"heads": config.num_heads, "qk_dim": config.qk_dim, "v_dim": config.v_dim}
            return normalize(hstu_last(x, layers, where, norm=config.attention_norm, **shape))
        plan = self._plan(batch, len(self.layers) - 1)
        for layer in self.layers[:-1]:
            x = layer(x, plan)
        final = self.layers[-1]
        assert isinstance(final, HSTULayer)
        return normalize(final.last(x, plan))

    def _plan(self, batch: JaggedTensors, full_layers: int) -> AttentionPlan:
        """Prepare what that many layers of attention between all tokens share."""
        config = self.config
        assert isinstance(config, HSTUConfig)
        time_bias = config.time_bias and config.attention == "pointwise" and full_layers > 0
        where = (batch.offsets, batch.timestamps, batch.query_times)
        return plan_attention(*where, time_bias=time_bias, backend=self.backend)
