"""`retrieval serve`: answer `Retrieve` calls from a registry's live snapshot."""

import argparse
import logging
from pathlib import Path

from retrieval.cli.console import OUT
from retrieval.cli.options import add_device_option, pick_device

__all__ = ["READY", "add_parser"]

READY = "serving on "
"""How the line begins that says a server is ready; its address follows."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="answer Retrieve calls over gRPC",
        description="Serve a registry's live snapshot and follow it: a newly published snapshot takes over without a "
        "lost call. Ends on SIGTERM or SIGINT after the calls in hand.",
    )
    parser.add_argument("registry", type=Path, metavar="REGISTRY", help="folder of snapshots; may still be empty")
    parser.add_argument("--histories", type=Path, metavar="DATASET", help="dataset whose users can be asked for by id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=50051, help="port to listen on, 0 for a free one (default: 50051)")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="port of Prometheus metrics (default: none)")
    parser.add_argument("--poll-seconds", type=float, default=5, help="time between two looks at REGISTRY (default: 5)")
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Serve until told to stop."""
    from retrieval.histories.dataset import DatasetHistories
    from retrieval.rpc.server import ServerConfig, run_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    values = {
        "registry": parsed.registry,
        "host": parsed.host,
        "port": parsed.port,
        "metrics_port": parsed.metrics_port,
        "device": pick_device(parsed.device),
        "poll_seconds": parsed.poll_seconds,
    }
    config = ServerConfig.parse(values, "command line")
    histories = DatasetHistories(parsed.histories) if parsed.histories is not None else None

    def ready(address: str) -> None:
        OUT.print(f"{READY}{address}")
        OUT.file.flush()

    run_server(config, histories, ready)
