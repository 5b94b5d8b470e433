"""The client on a machine that has grpcio and protobuf, and nothing else that this package needs elsewhere."""

import subprocess
import sys
import textwrap

# Everything else but the standard library is refused: also what would be imported later, by a call or by a failure.
ALONE = textwrap.dedent("""
    import asyncio, sys

    OURS = {"retrieval", "grpc", "google", "typing_extensions"}

    class Refusing:
        def find_spec(self, name, path=None, target=None):
            top = name.partition(".")[0]
            foreign = name.startswith("google.") and not name.startswith(("google.protobuf", "google._upb"))
            if foreign or top not in OURS | set(sys.stdlib_module_names):
                raise ModuleNotFoundError(f"{name} is not installed", name=name)

    sys.meta_path.insert(0, Refusing())
    from retrieval.errors import InvalidRequestError, UnknownVersionError
    from retrieval.index.filter import filter_from
    from retrieval.rpc.admin_client import AdminClient
    from retrieval.rpc.aio import AsyncRetrievalClient
    from retrieval.rpc.client import Event, History, RetrievalClient, RetrieveRequest, StoredUser

    user = History([], [])
    request = RetrieveRequest(user=user, k=3, filter=filter_from("events >= 0"))
    with RetrievalClient(sys.argv[1], timeout=20) as client:
        client.wait_until_serving(20)
        assert len(client.retrieve(user, k=3, filter="events >= 0", debug=True).items) == 3
        answer, refused = client.batch_retrieve([request, RetrieveRequest(user=user, k=0)])
        assert len(answer.items) == 3 and refused.field == "k"
        assert client.embed_users([StoredUser(3)]).width == client.serving_state().width
        try:
            client.retrieve(user, k=0)
        except InvalidRequestError as error:
            assert error.field == "k"
        else:
            raise AssertionError
    async def ask():
        async with AsyncRetrievalClient(sys.argv[1], timeout=20) as client:
            assert len((await client.retrieve(user, k=3)).items) == 3

    asyncio.run(ask())
    print(*sorted(name for name in ("numpy", "torch", "faiss", "pydantic", "pyarrow") if name in sys.modules))
""")


def test_the_client_needs_nothing_but_grpcio_and_protobuf(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, address], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
