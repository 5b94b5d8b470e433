"""All layers for each row's last token, in C++, against plain torch in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval.kernels.hstu_last import LayerWeights, fits, hstu_last
from retrieval.kernels.hstu_last_reference import hstu_last_reference
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS
from tests.tolerances import assert_close

LENGTHS = [65, 1, 16, 130, 17, 2]


class Problem:
    """Random tokens and weights in float64."""

    def __init__(
        self, lengths: list[int], *, layers: int = 2, width: int = 10, heads: int = 2, qk: int = 5, v: int = 7
    ):
        g = torch.Generator().manual_seed(len(lengths) + 10 * layers)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.options: dict[str, Any] = {"heads": heads, "qk_dim": qk, "v_dim": v, "norm": 20.0}
        total, columns = sum(lengths), 2 * heads * (qk + v)
        self.x = normal(total, width)
        self.layers = [
            LayerWeights(
                normal(width, columns) / width**0.5,
                normal(width, heads * v) / (heads * v) ** 0.5,
                normal(width),
                normal(max(lengths) + 2),
                normal(NUM_TIME_BUCKETS),
            )
            for _ in range(layers)
        ]
        times = [torch.randint(0, 10**8, (n,), generator=g).sort().values for n in lengths]
        timestamps = torch.cat(times)
        asked = timestamps + torch.randint(0, 10**6, (total,), generator=g)
        self.where = torch.tensor([0, *lengths]).cumsum(0), timestamps, asked

    def layers_as(self, dtype: torch.dtype) -> list[LayerWeights]:
        cast: Any = [[None if x is None else x.to(dtype) for x in layer] for layer in self.layers]
        return [LayerWeights(*layer) for layer in cast]

    def fused(self) -> Tensor:
        return hstu_last(self.x.float(), self.layers_as(torch.float32), self.where, **self.options)

    def check(self) -> None:
        if not fits(self.x.float()):
            pytest.skip("no C++ compiler")
        assert_close(
            self.fused(), hstu_last_reference(self.x, self.layers, self.where, **self.options), "hstu_last", "forward"
        )


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_it_equals_the_reference_at_each_rows_last_token(layers: int) -> None:
    Problem(LENGTHS, layers=layers).check()


@pytest.mark.parametrize(
    ("width", "heads", "qk", "v"), [(50, 1, 50, 50), (1, 1, 1, 1), (67, 3, 16, 33), (16, 4, 32, 3)]
)
def test_widths_below_at_and_beyond_a_vector(width: int, heads: int, qk: int, v: int) -> None:
    Problem(LENGTHS, width=width, heads=heads, qk=qk, v=v).check()


def test_sums_may_be_divided_by_the_number_of_visible_keys() -> None:
    problem = Problem(LENGTHS)
    problem.options["norm"] = None
    problem.check()


@pytest.mark.parametrize("without", ["pos_table", "time_table"])
def test_a_bias_may_be_missing(without: str) -> None:
    problem = Problem(LENGTHS)
    absent: dict[str, Any] = {without: None}
    problem.layers = [layer._replace(**absent) for layer in problem.layers]
    problem.check()


def test_a_time_table_may_be_the_last_layers_alone() -> None:
    problem = Problem(LENGTHS)
    problem.layers[0] = problem.layers[0]._replace(time_table=None)
    problem.check()


def test_times_need_not_be_in_order() -> None:
    problem = Problem(LENGTHS)
    offsets, timestamps, asked = problem.where
    problem.where = offsets, timestamps.flip(0), asked
    problem.check()


def test_a_row_depends_neither_on_its_batch_mates_nor_on_the_number_of_threads() -> None:
    problem = Problem([700, 3, 600])
    if not fits(problem.x.float()):
        pytest.skip("no C++ compiler")
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(problem.fused())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*answers)
    _, timestamps, asked = problem.where
    problem.x, problem.where = problem.x[703:], (torch.tensor([0, 600]), timestamps[703:], asked[703:])
    assert torch.equal(problem.fused()[0], answers[0][2])


def test_no_rows_give_no_answers() -> None:
    problem = Problem([3])
    if not fits(problem.x.float()):
        pytest.skip("no C++ compiler")
    nothing = torch.empty(0, dtype=torch.int64)
    problem.x, problem.where = problem.x[:0], (torch.zeros(1, dtype=torch.int64), nothing, nothing)
    assert problem.fused().shape == (0, 10)


def test_what_does_not_fit_is_refused() -> None:
    problem = Problem([3, 4])
    offsets, timestamps, asked = problem.where
    for where, message in (
        ((torch.tensor([0, 0, 7]), timestamps, asked), "not empty"),
        ((offsets[:2], timestamps, asked), "hold 7 tokens"),
        ((offsets, timestamps[:5], asked), "times are not int64 of 7"),
    ):
        with pytest.raises(ValueError, match=message):
            hstu_last(problem.x.float(), problem.layers_as(torch.float32), where, **problem.options)
    layer = problem.layers_as(torch.float32)[0]
    for wrong, message in (
        (layer._replace(uvqk=layer.uvqk[:, 1:]), "weights are not"),
        (layer._replace(bias=layer.bias.double()), "weights are not"),
        (layer._replace(pos_table=torch.zeros(3)), "too short for a row of 4"),
        (layer._replace(time_table=torch.zeros(3)), "is not \\(129,\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            hstu_last(problem.x.float(), [wrong], problem.where, **problem.options)
    with pytest.raises(ValueError, match="not float32"):
        hstu_last(problem.x, problem.layers, problem.where, **problem.options)


def test_it_refuses_to_run_where_a_gradient_would_be_lost() -> None:
    problem = Problem([3])
    layer = problem.layers_as(torch.float32)[0]
    wanting = layer._replace(uvqk=layer.uvqk.requires_grad_())
    with pytest.raises(ValueError, match="has no gradient"):
        hstu_last(problem.x.float(), [wanting], problem.where, **problem.options)
