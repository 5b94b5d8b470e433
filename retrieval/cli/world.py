"""`retrieval world`: generate a synthetic event log whose best possible recall is known."""

import argparse
from pathlib import Path

from retrieval.cli.console import OUT, progress

__all__ = ["add_parser"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("world", help="generate a synthetic event log to try things on", description=__doc__)
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--size",
        choices=("nano", "small", "large"),
        default="small",
        help="15 k, 200 k or 10 M events (default: small)",
    )
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal worlds (default: 0)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Generate."""
    from retrieval.data import synthetic

    config = {"nano": synthetic.nano, "small": synthetic.small, "large": synthetic.large}[parsed.size](seed=parsed.seed)
    with progress("world") as update:
        world = synthetic.generate_world(config, parsed.out, lambda done, total: update(done, total, "users"))
    OUT.print(f"{world.events:,} events in {world.events_folder}, item metadata in {world.items_file}")
    OUT.print(f"positive actions: {','.join(synthetic.POSITIVE_ACTIONS)}")
