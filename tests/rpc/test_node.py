"""A client in another language, over TLS and with a token, gets what ours gets and what the service gives."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from retrieval.errors import InvalidRequestError
from retrieval.rpc.client import History, RetrievalClient
from retrieval.rpc.convert import batch_request_to, retrieve_request_to
from retrieval.rpc.requests import RetrieveRequest
from retrieval.rpc.server import running_server
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from tests.rpc.test_security import TOKEN, Authority, config
from tests.rpc.world import START, USERS, World

HERE = Path(__file__).parent / "node"
PROTO = Path(__file__).parents[2] / "protos" / "retrieval" / "v1" / "retrieval.proto"
LATER = START + 10_000_000


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Node client and its packages."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for file in HERE.iterdir():
        shutil.copy(file, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=20000"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    if installed.returncode != 0:
        pytest.skip(f"npm could not install @grpc/grpc-js: {installed.stderr.strip()[-200:]}")
    return folder


def ask(folder: Path, **given: Any) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["node", "client.cjs"],
        cwd=folder,
        input=json.dumps(given | {"proto": str(PROTO)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_three_ways_to_ask_give_one_answer(
    node: Path, world: World, service: RetrievalService, serving: ServingSnapshot, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ranker:{TOKEN}\n")
    tls = Authority(tmp_path)
    files = tls.files.model_copy(update={"client_ca": None})
    requests = [
        RetrieveRequest(user=world.history(user), k=1 + user % 9, request_time=LATER, exclude_seen=user % 2 == 0)
        for user in range(USERS)
    ]
    backwards = History(world.history(9).items[:2], [9, 5])
    wrong = RetrieveRequest(user=backwards, k=3)
    messages = [
        json_format.MessageToDict(retrieve_request_to(one), preserving_proto_field_name=True)
        for one in [*requests, wrong]
    ]
    together = json_format.MessageToDict(batch_request_to([*requests[:6], wrong]), preserving_proto_field_name=True)
    with running_server(config(world, tls=files, tokens=tokens)) as address:
        given = {"address": address, "root": tls.root.decode()}
        *answers, refused = ask(node, **given, token=TOKEN, requests=messages)
        (stranger,) = ask(node, **given, token="somebody", requests=messages[:1])
        (batch,) = ask(node, **given, token=TOKEN, method="BatchRetrieve", requests=[together])
        credentials = grpc.ssl_channel_credentials(tls.root)
        with RetrievalClient(address, 20, credentials=credentials, token=TOKEN) as client:
            for request, answer in zip(requests, answers, strict=True):
                assert isinstance(request.user, History)
                ours = client.retrieve(request.user, k=request.k, request_time=LATER, exclude_seen=request.exclude_seen)
                here = service.retrieve(serving, request)
                assert here.items == ours.items
                assert ours.scores == pytest.approx(here.scores, abs=1e-5)
                kind = "strings" if world.dataset.vocabulary.has_string_ids else "integers"
                found = answer["items"][kind]["values"]
                assert [str(item) for item in ours.items] == [str(item) for item in found]
                assert answer["scores"] == pytest.approx(ours.scores, abs=1e-5)
                assert answer["snapshot_version"] == ours.snapshot_version
            with pytest.raises(InvalidRequestError) as error:
                client.retrieve(backwards, k=3)
    *several, error_of_one = batch["results"]
    for result, alone in zip(several, answers, strict=False):
        assert result["response"]["items"] == alone["items"]
        assert result["response"]["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert len(several) == 6
    assert error_of_one["error"]["field"] == "history.timestamps[1]"
    assert error_of_one["error"]["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert refused["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert refused["details"] == str(error.value)
    assert stranger["code"] == grpc.StatusCode.UNAUTHENTICATED.value[0]
