"""The files of `deploy/` say what is true of the code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from retrieval.cli.main import build_parser, main
from retrieval.errors import GateRefusedError, InputError, RetrievalError
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.server import SERVICE

DEPLOY = Path(__file__).parents[2] / "deploy"
SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def metric_names() -> set[str]:
    return {family.name + suffix for family in Metrics().registry.collect() for suffix in SAMPLES[family.type]}


def expressions() -> list[tuple[str, str]]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))
    return found + [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]


def manifest(name: str) -> Any:
    return yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("place", "expression"), expressions())
def test_every_metric_that_is_named_exists(place: str, expression: str) -> None:
    named = set(re.findall(r"\bretrieval_\w+", expression))
    assert named, place
    assert named <= metric_names()
    assert expression.count("(") == expression.count(")")


def test_alerts_tell_how_bad_and_what() -> None:
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]


def test_panels_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_manifests_fit_each_other_and_the_server() -> None:
    deployment, service = manifest("deployment"), manifest("service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert manifest("pod-disruption-budget")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service-monitor")["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    # Probes come from the node, not through the service.
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports.keys() - {"health"}
    assert manifest("service-monitor")["spec"]["endpoints"][0]["port"] in {p["name"] for p in service["spec"]["ports"]}
    assert f"--health-port={ports['health']}" in container["args"]
    assert container["readinessProbe"]["grpc"] == {"port": ports["health"], "service": SERVICE}
    assert container["startupProbe"]["grpc"] == {"port": ports["health"]}
    assert container["livenessProbe"]["tcpSocket"] == {"port": ports["grpc"]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}


def options() -> list[tuple[str, list[str]]]:
    (container,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    content = (DEPLOY / "Containerfile").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^CMD (\[.*\])$", content, re.MULTILINE)
    return [("deployment", container["args"]), ("Containerfile", json.loads(commands[0]))]


@pytest.mark.parametrize(("file", "arguments"), options())
def test_the_options_that_are_given_to_the_server_exist(
    file: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = capsys.readouterr().out
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    assert given, file
    assert [option for option in given if option not in known] == []


def rebuilds() -> list[tuple[str, list[str]]]:
    (container,) = manifest("rebuild-cronjob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    dag = (DEPLOY / "airflow" / "rebuild_dag.py").read_text(encoding="utf-8")
    (line,) = re.findall(r'^REBUILD = "retrieval (.*)"$', dag, re.MULTILINE)
    return [("CronJob", container["args"]), ("DAG", line.split())]


@pytest.mark.parametrize(("file", "arguments"), rebuilds())
def test_the_rebuilds_that_are_scheduled_are_commands(file: str, arguments: list[str]) -> None:
    parsed = build_parser().parse_args(arguments)
    assert (str(parsed.events), parsed.registry, str(parsed.work)) == ("/events", "/registry", "/work"), file


def test_a_night_that_retrying_cannot_mend_is_not_retried() -> None:
    job = manifest("rebuild-cronjob")["spec"]
    assert job["concurrencyPolicy"] == "Forbid"
    (rule,) = job["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    codes = {RetrievalError.exit_code, InputError.exit_code, GateRefusedError.exit_code}
    assert codes - {RetrievalError.exit_code} == set(rule["onExitCodes"]["values"]) == {2, 3}


def test_the_container_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\d+):", (DEPLOY / "Containerfile").read_text(encoding="utf-8"), re.MULTILINE)
    (container,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    assert users == [str(manifest("deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"])]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
