"""The gate's Triton kernels against the reference, in the interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.kernels.backend import Backend
from retrieval.kernels.gated_norm import gated_norm
from retrieval.kernels.gated_norm_reference import keep_mask_reference
from retrieval.kernels.hstu_attention import plan_attention
from tests.kernels.device import DEVICE
from tests.tolerances import assert_close_by_rule

pytest.importorskip("triton")

SEED = 2**62 + 12345


def run(x: Tensor, u: Tensor, dy: Tensor, *, triton: bool, p: float) -> list[Tensor]:
    x, u = (value.detach().requires_grad_() for value in (x, u))
    out = gated_norm(x, u, p=p, seed=SEED, backend="triton" if triton else "reference")
    out.backward(dy)
    assert x.grad is not None
    assert u.grad is not None
    return [out.detach(), x.grad, u.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 4), (37, 50), (9, 25), (3, 130), (5, 64)])
def test_output_and_gradients_are_as_exact_as_torch(
    rows: int, columns: int, p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    x, wide, dy = (torch.randn(rows, n, generator=g).to(DEVICE, dtype) for n in (columns, 3 * columns, columns))
    u = wide[:, columns : 2 * columns]
    expected = run(x.double(), u.double(), dy.double(), triton=False, p=p)
    plain = run(x, u, dy, triton=False, p=p)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: real(*args, **kwargs).fill_(torch.nan))
    actual = run(x, u, dy, triton=True, p=p)
    for index, values in enumerate(zip(actual, plain, expected, strict=True)):
        assert_close_by_rule(*values, "gated_norm", "backward" if index else "forward")


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -1])
@pytest.mark.parametrize("columns", [16, 50, 100])
def test_the_mask_is_that_of_the_cpu_bit_for_bit(seed: int, columns: int) -> None:
    x = torch.linspace(1, 2, columns, device=DEVICE).expand(21, columns).contiguous()
    out = gated_norm(x, torch.ones_like(x), p=0.3, seed=seed, backend="triton")
    assert torch.equal((out != 0).cpu(), torch.from_numpy(keep_mask_reference(seed, 21, columns, 0.3)))


def test_it_is_a_well_formed_torch_operation() -> None:
    x, u = (torch.randn(3, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    seed = torch.tensor(SEED, device=DEVICE)
    torch.library.opcheck(torch.ops.retrieval.gated_norm.default, (x, u, seed, 0.3, "triton"))


def test_float64_is_refused() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        gated_norm(x, x, backend="triton")


def test_an_encoder_in_training_drops_the_same_elements_on_either_backend() -> None:
    config = HSTUConfig(num_items=9, max_length=6, width=8, qk_dim=4, v_dim=5, dropout=0.4)
    times = torch.arange(9)
    row = dict.fromkeys(("items", "actions", "timestamps", "query_times"), times)
    batch = JaggedTensors(offsets=torch.tensor([0, 3, 9]), **row)
    outputs = []
    backends: tuple[Backend, ...] = ("cpu", "triton")
    for backend in backends:
        torch.manual_seed(0)
        encoder = HSTUEncoder(config, backend=backend)
        if backend == "triton":
            encoder.layers.to(DEVICE)
        # The layers alone: dropout of the input is torch's own, which differs between devices.
        x = torch.randn(9, 8)
        torch.manual_seed(1)
        device = DEVICE if backend == "triton" else torch.device("cpu")
        where = (batch.offsets, batch.timestamps.to(device), batch.query_times.to(device))
        plan = plan_attention(*where, backend=backend)
        x = x.to(device)
        for layer in encoder.layers:
            x = layer(x, plan)
        outputs.append(x.detach().cpu())
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
