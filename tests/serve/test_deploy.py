"""What deploys the server asks for what it has: its flags, its probes, its port, no root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from whisper_moe.cli import app
from whisper_moe.serve.guard import OPEN

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def flags() -> set[str]:
    return set(re.findall(r"--[\w-]+", CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output))


def test_a_container_starts_the_server_as_nobody_in_particular() -> None:
    text = (DEPLOY / "Containerfile").read_text("utf-8")
    (entry,) = re.findall(r"ENTRYPOINT \[(.*)\]", text)
    assert set(re.findall(r"--[\w-]+", entry)) <= flags()
    assert re.findall(r"^USER (\d+)$", text, re.M) == ["10001"] and "HEALTHCHECK" in text and "/healthz" in text
    copied = re.findall(r"^COPY (?!--from)(?:\$\{MODEL\} )?(.*)$", text, re.M)
    assert all((DEPLOY.parent / name).exists() for line in copied for name in line.split()[:-1])


def test_compose_keeps_the_keys_out_of_the_image() -> None:
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"].values()
    assert {part for part in service["command"] if part.startswith("--")} <= flags()
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_kubernetes_asks_the_probes_that_need_no_key_and_waits_for_what_was_taken() -> None:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")))
    deployment, service, scaler = documents
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert set(probes.values()) <= OPEN and probes["livenessProbe"] == "/healthz"
    assert {part for part in container["args"] if part.startswith("--")} <= flags()
    assert pod["spec"]["terminationGracePeriodSeconds"] > 60 and container["resources"]["limits"]["memory"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["spec"]["securityContext"]["runAsNonRoot"]
