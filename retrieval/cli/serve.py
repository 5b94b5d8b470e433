"""`retrieval serve`: answer `Retrieve` calls from a registry's live snapshot."""

import argparse
import os
from pathlib import Path

from retrieval.cli.console import OUT
from retrieval.cli.options import (
    REGISTRY_HELP,
    add_device_option,
    add_histories_option,
    opened_histories,
    pick_device,
)
from retrieval.errors import InputError

__all__ = ["READY", "add_parser"]

READY = "serving on "
"""How the line begins that says a server is ready; its address follows."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="answer Retrieve calls over gRPC",
        description="Serve a registry's live snapshot and follow it: a newly published snapshot takes over without a "
        "lost call, at once on SIGHUP. Ends on SIGTERM or SIGINT after the calls in hand.",
    )
    parser.add_argument("registry", metavar="REGISTRY", help=f"{REGISTRY_HELP}; may still be empty")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="copies of snapshots of an object store (default: in ~/.cache)"
    )
    add_histories_option(parser, "users' histories, to be asked for by id and recorded in")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=50051, help="port to listen on, 0 for a free one (default: 50051)")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="port of Prometheus metrics (default: none)")
    parser.add_argument(
        "--health-port", type=int, metavar="PORT", help="port of the health service alone, in the clear (default: none)"
    )
    parser.add_argument("--admin-port", type=int, metavar="PORT", help="port of the admin service (default: none)")
    parser.add_argument("--admin-host", default="127.0.0.1", help="address of the admin service (default: 127.0.0.1)")
    parser.add_argument("--admin-tokens", type=Path, metavar="FILE", help="bearer tokens of the admin service")
    parser.add_argument("--poll-seconds", type=float, default=5, help="time between two looks at REGISTRY (default: 5)")
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="server certificate; read again when it changes")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    parser.add_argument("--tls-client-ca", type=Path, metavar="PEM", help="take only clients with its certificates")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="bearer tokens that are taken, name:token per line")
    parser.add_argument("--insecure", action="store_true", help="let other machines connect without encryption")
    parser.add_argument("--no-reflection", dest="reflection", action="store_false", help="offer no reflection service")
    parser.add_argument("--client-capacity", type=int, metavar="N", help="calls in hand of one client (default: all)")
    parser.add_argument(
        "--drain-seconds", type=float, default=0, metavar="S", help="still take calls so long on SIGTERM (default: 0)"
    )
    parser.add_argument(
        "--recall-share", type=float, default=0, metavar="P", help="share of answers compared with exact (default: 0)"
    )
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="format of log lines")
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning"], default="info", help="debug logs each call"
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Serve until told to stop."""
    if parsed.log_format == "json":
        # Before gRPC is imported: its core writes lines of its own, of callers' faults, which no parser of JSON takes.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from retrieval.rpc.logs import set_up_logs
    from retrieval.rpc.server import ServerConfig, run_server

    admin = {"port": parsed.admin_port, "host": parsed.admin_host, "tokens": parsed.admin_tokens}
    if parsed.admin_port is None and parsed.admin_tokens is not None:
        raise InputError("--admin-tokens: there is no admin service without --admin-port")

    set_up_logs(parsed.log_format, parsed.log_level.upper())
    tls = {"cert": parsed.tls_cert, "key": parsed.tls_key, "client_ca": parsed.tls_client_ca}
    values = {
        "registry": parsed.registry,
        "cache": parsed.cache,
        "host": parsed.host,
        "port": parsed.port,
        "tls": {key: path for key, path in tls.items() if path is not None} or None,
        "tokens": parsed.tokens,
        "insecure": parsed.insecure,
        "reflection": parsed.reflection,
        "client_capacity": parsed.client_capacity,
        "recall_share": parsed.recall_share,
        "drain_seconds": parsed.drain_seconds,
        "metrics_port": parsed.metrics_port,
        "health_port": parsed.health_port,
        "admin": admin if parsed.admin_port is not None else None,
        "device": pick_device(parsed.device),
        "poll_seconds": parsed.poll_seconds,
    }
    config = ServerConfig.parse(values, "command line")

    def ready(address: str) -> None:
        OUT.print(f"{READY}{address}")
        OUT.file.flush()

    with opened_histories(parsed.histories) as histories:
        run_server(config, histories, ready)
