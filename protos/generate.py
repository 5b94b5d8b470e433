"""Write the Python stubs of `protos/` to `retrieval/rpc/_generated`, exactly as protoc makes them.

Usage: python protos/generate.py [FOLDER]

Only messages are generated: the server and client of `retrieval.rpc` need no stub classes beside them. Stubs keep
protoc's folders (`_generated/retrieval/v1`) and its file name in the descriptor pool (`retrieval/v1/retrieval.proto`),
so that a program may hold these stubs and its own of the same proto.
"""

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
# Protobuf's own: durations and such.
WELL_KNOWN = Path(grpc_tools.__file__).with_name("_proto")
STUBS = PROTOS.parent / "retrieval" / "rpc" / "_generated"


def generate(folder: Path) -> None:
    """Generate all stubs below `folder`.

    Raises:
        RuntimeError: protoc refused a proto; it has said why on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    protos = [path.relative_to(PROTOS).as_posix() for path in sorted(PROTOS.rglob("*.proto"))]
    arguments = [
        f"--proto_path={PROTOS}",
        f"--proto_path={WELL_KNOWN}",
        f"--python_out={folder}",
        f"--pyi_out={folder}",
        *protos,
    ]
    if protoc.main(["protoc", *arguments]) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(protos)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else STUBS)
