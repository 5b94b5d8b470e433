"""Yesterday's index is built again while the catalogue is much the same."""

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.index.choice import AutoIndex
from retrieval.index.spec import IndexSpec
from retrieval.jobs.index_choice import Chosen, built_index

AUTO = AutoIndex(recall=0.9, depth=10)
# The rule decides alone: what is chosen of so few items is exact search.
GOOD = IndexSpec(factory="IVF8,Flat", search={"nprobe": 8})
POOR = IndexSpec(factory="IVF8,Flat", search={"nprobe": 1})


def unit(count: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(count).standard_normal((count, 8)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("items", "spec", "auto", "why"),
    [
        (400, GOOD, AUTO, r"kept: recall@10 1\.0000, \+0% items"),
        (480, GOOD, AUTO, r"kept: .*\+20% items"),
        (512, GOOD, AUTO, r"chosen tonight: \+28% items"),
        (290, GOOD, AUTO, r"chosen tonight: -28% items"),
        (400, POOR, AUTO, r"chosen tonight: IVF8,Flat.* reaches recall@10 0\.\d+ only"),
        (400, GOOD, AutoIndex(recall=0.95, depth=10), r"chosen tonight: auto .*0\.95.* before it was auto .*0\.9"),
        (400, GOOD, AUTO.model_copy(update={"max_bytes": 10**5}), "chosen tonight: auto"),
    ],
)
def test_a_choice_is_kept_until_the_catalogue_has_changed_enough(
    tmp_path: Path, items: int, spec: IndexSpec, auto: AutoIndex, why: str
) -> None:
    before = Chosen(auto=AUTO, spec=spec, items=400)
    built = built_index(unit(items), unit(50), auto, tmp_path, before=before)
    assert built.chosen is not None
    assert built.spec == built.chosen.spec
    assert re.match(why, built.why), built.why
    if built.why.startswith("kept"):
        assert (built.chosen, built.table) == (before, ())
    else:
        assert built.chosen == Chosen(auto=auto, spec=IndexSpec(), items=items)
        again = built_index(unit(items), unit(50), auto, tmp_path, before=before)
        assert (again.chosen, again.why) == (built.chosen, built.why), "a rerun builds the same index"


def test_a_choice_that_does_not_fit_any_more_is_made_again(tmp_path: Path) -> None:
    auto = AUTO.model_copy(update={"max_bytes": 14_000})
    before = Chosen(auto=auto, spec=GOOD, items=400)
    built = built_index(unit(400), unit(50), auto, tmp_path, before=before)
    assert "does not fit into 14000 bytes" in built.why
