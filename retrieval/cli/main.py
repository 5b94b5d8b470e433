"""Entry point of `retrieval`: parses arguments, runs a command, turns errors into one sentence and an exit code.

Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 a gate refused to publish, 128 + n stopped by signal n.
"""

import argparse
import sys
from collections.abc import Sequence

from retrieval import __version__
from retrieval.cli import (
    demo,
    evaluate,
    histories,
    ingest,
    publish,
    query,
    rebuild,
    schedule,
    serve,
    snapshots,
    train,
    world,
)
from retrieval.errors import RetrievalError

__all__ = ["main"]

# In the order in which a new user meets them. Command modules import torch, faiss and the like only when they run,
# so that help and usage errors are immediate.
_COMMANDS = (demo, world, ingest, train, evaluate, publish, rebuild, schedule, serve, query, histories, snapshots)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="retrieval",
        description="Candidate retrieval for a recommender: event logs in, top-K candidates out.",
        epilog="Run `retrieval COMMAND --help` for a command's options, `retrieval demo` to see the whole way.",
    )
    parser.add_argument("--version", action="version", version=f"retrieval {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except RetrievalError as error:
        print(f"retrieval: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # A disk that is full, a folder that may not be written.
        where = f"{error.filename}: " if error.filename else ""
        print(f"retrieval: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("retrieval: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        print("retrieval: faiss is not installed; install retrieval[cpu] or retrieval[gpu]", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
