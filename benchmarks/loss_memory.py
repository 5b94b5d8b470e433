"""How much memory each form of the loss needs, forward and backward, beside its inputs and their gradients.

    python -m benchmarks.loss_memory [--quick]

Each case runs in a process of its own on the CPU, with one thread; its peak is the growth of the resident set over
what it was when the inputs and two tensors of their shapes (for the gradients) were there. A case that passes its bound
fails the run: 16 MB of steps' logits and vectors, eight tensors [tokens × width], eight [contrasts × width] and two
[items × width], all float32; no product of tokens and contrasts. Beside it stands what one tensor of all logits would
need, [tokens × contrasts], and for negatives of a position's own one of their vectors, [tokens × negatives × width].
"""

import argparse
import resource
import subprocess
import sys

import torch
from torch.nn import functional

from retrieval.training.loss import next_item_loss
from retrieval.training.negatives import Negatives

_WIDTH = 50
# Form, tokens, items, negatives.
_CASES = [
    ("full", 14_000, 3_883, 0),
    ("full", 14_000, 27_278, 0),
    ("full", 2_000, 100_000, 0),
    ("shared", 14_000, 3_883, 512),
    ("shared", 14_000, 27_278, 4_096),
    ("shared", 14_000, 1_000_000, 4_096),
    ("own", 14_000, 3_883, 128),
    ("own", 14_000, 27_278, 512),
]
_QUICK = [("full", 14_000, 3_883, 0), ("shared", 14_000, 3_883, 4_096), ("own", 14_000, 3_883, 128)]


def peak(form: str, tokens: int, items: int, count: int) -> int:
    """Bytes by which the process grows over its inputs and their gradients."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    users = functional.normalize(torch.randn(tokens, _WIDTH, generator=g), dim=1).requires_grad_()
    table = torch.randn(items, _WIDTH, generator=g).requires_grad_()
    targets = torch.randint(items, (tokens,), generator=g)
    shape = {"full": None, "shared": (count,), "own": (tokens, count)}[form]
    rows = None if shape is None else torch.randint(items, shape, generator=g)
    warm = users.detach()[:64].clone().requires_grad_(), table.detach()[:64].clone().requires_grad_()
    small = None if rows is None else rows[:64] % 64
    next_item_loss(warm[0], targets[:64] % 64, Negatives(rows=small), warm[1], temperature=0.05).backward()
    users.grad, table.grad = torch.ones_like(users), torch.ones_like(table)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    next_item_loss(users, targets, Negatives(rows=rows), table, temperature=0.05).backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a form holds what it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        form, *sizes = given.case
        print(peak(form, *map(int, sizes)))
        return 0
    print(f"{'form':8}{'tokens':>8}{'items':>11}{'negatives':>11}", end="")
    print(f"{'peak MB':>10}{'bound MB':>10}{'logits MB':>11}{'vectors MB':>12}")
    failed = False
    for form, tokens, items, count in _QUICK if given.quick else _CASES:
        command = [sys.executable, "-m", "benchmarks.loss_memory", "--case", form, *map(str, (tokens, items, count))]
        used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e6
        contrasts = count if form == "shared" else items
        bound = 16 + 4 * _WIDTH * (8 * tokens + 8 * contrasts + 2 * items) / 1e6
        logits = 4 * tokens * (count or items) / 1e6
        vectors = f"{logits * _WIDTH:12.0f}" if form == "own" else ""
        print(f"{form:8}{tokens:8}{items:11}{count:11}{used:10.0f}{bound:10.0f}{logits:11.0f}{vectors}", flush=True)
        failed |= used > bound
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
