"""The files in deploy/, as far as a machine without Slurm, Kubernetes and a cloud can tell."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import axes, room
from harness.record import Store

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
# The fields of KubeRay's v1 types, https://docs.ray.io/en/master/kuberay/references/api.html (1.7), without those of
# pods, which are Kubernetes' own.
FIELDS = {
    "RayJobSpec": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
    "submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources "
    "entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend",
    "RayClusterSpec": "authOptions headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling "
    "autoscalerOptions headServiceAnnotations suspend managedBy gcsFaultToleranceOptions",
    "HeadGroupSpec": "serviceType headService enableIngress rayStartParams template",
    "WorkerGroupSpec": "groupName replicas minReplicas maxReplicas idleTimeoutSeconds numOfHosts rayStartParams "
    "template scaleStrategy suspend",
}
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# Stand-ins for Slurm on one node: they drop Slurm's options and run what is asked for.
SLURM = {
    "sbatch": """
export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 SLURM_CPUS_PER_TASK=2
exec bash "$@"
""",
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
if [ "$1" = hostname ]; then echo 127.0.0.1; else exec "$@"; fi
""",
    "scontrol": """
if [ "$1" = show ]; then echo "$3"; else echo "$@" >> "$SLURM_LOG"; fi
""",
}
CARD = """
methods = ["fedavg"]
seeds = 6
[base]
clients = 4
rounds = 300
net = "mlp"
local = { epochs = 1, batch = 32, lr = 0.1 }
[execution]
mlflow = false
parallel = 1
"""


def test_ray_takes_the_cluster_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schema and the checks of `ray up` itself; and there is room for a trial from the start."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    whole = util.fillout_defaults(config) | {"cluster_synced_files": []}
    util.validate_config(whole)
    with pytest.raises(Exception, match="max_worker"):  # the check does look
        util.validate_config({**whole, "max_worker": 1})
    kinds = config["available_node_types"].values()
    nodes = [kind["resources"] for kind in kinds for _ in range(kind.get("min_workers", 0))]
    room.check_room(axes.load_sweep("fashion").execution, nodes)
    options = config["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    path = next(o.partition("RAY_AUTH_TOKEN_PATH=")[2] for o in options if "RAY_AUTH_TOKEN_PATH" in o)
    assert path in config["file_mounts"]
    assert not any("0.0.0.0" in command for command in config["head_start_ray_commands"])


def parts(job: Any) -> list[tuple[str, dict[str, Any]]]:
    """The parts of a RayJob by the names of their types."""
    cluster = job["spec"]["rayClusterSpec"]
    return [
        ("RayJobSpec", job["spec"]),
        ("RayClusterSpec", cluster),
        ("HeadGroupSpec", cluster["headGroupSpec"]),
        *(("WorkerGroupSpec", group) for group in cluster["workerGroupSpecs"]),
    ]


def amount(text: str) -> float:
    return float(text[:-2]) * UNITS[text[-2:]] if text[-2:] in UNITS else float(text)


def test_the_rayjob_has_the_fields_of_kuberay() -> None:
    volume, job = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"]["name"]
    for kind, part in parts(job):
        assert set(part) <= set(FIELDS[kind].split()), kind
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert spec["shutdownAfterJobFinishes"] or "ttlSecondsAfterFinished" not in spec  # the one needs the other
    version = tuple(map(int, cluster["rayVersion"].split(".")))
    assert cluster["authOptions"] == {"mode": "token"} and version >= (2, 52, 0)  # the first with tokens
    for _, group in parts(job)[2:]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert container["name"] and container["image"].endswith(":0.1.0")
            wanted, most = (container["resources"][side] for side in ("requests", "limits"))
            assert wanted.keys() == most.keys() >= {"cpu", "memory"}
            assert all(amount(wanted[key]) <= amount(most[key]) for key in wanted)
        mounted = [m["name"] for c in group["template"]["spec"]["containers"] for m in c.get("volumeMounts", ())]
        assert mounted == [v["name"] for v in group["template"]["spec"].get("volumes", ())]
    head = cluster["headGroupSpec"]["template"]["spec"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in head["volumes"]]
    assert claims == [volume["metadata"]["name"]]


def test_the_rayjob_has_room_for_its_sweep() -> None:
    """The card of its entrypoint fits the workers that are there from the start, and is written to the volume."""
    _, job = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    command, sweep, card, *more = job["spec"]["entrypoint"].split()
    settings = [word for word in more if "=" in word]
    planned = axes.load_sweep(card, settings)
    assert (command, sweep) == ("fedstill", "sweep")
    assert planned.execution.address == "auto"
    nodes = [
        {"CPU": float(container["resources"]["limits"]["cpu"])}
        for group in cluster["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
        for _ in range(group["minReplicas"])
    ]
    room.check_room(planned.execution, nodes)
    mount = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"]
    assert more[more.index("--results") + 1].startswith(f"{mount}/")


def test_the_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)
    if (lint := shutil.which("shellcheck")) is not None:
        subprocess.run([lint, "--severity=warning", DEPLOY / "slurm.sh"], check=True)
    done = subprocess.run(["bash", DEPLOY / "slurm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
    words = (DEPLOY / "slurm.sh").read_text()
    assert "#SBATCH --signal=B:USR1@" in words and "#SBATCH --requeue" in words


def listening(port: int) -> bool:
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
@pytest.mark.cluster
def test_a_slurm_job_is_requeued_and_goes_on(tmp_path: Path) -> None:
    """On an "allocation" of this machine: ended before its time limit it asks to be put back, and leaves no Ray;
    put back it runs what is missing, and what was there stays as it was.
    """
    tools, results = tmp_path / "bin", tmp_path / "results"
    tools.mkdir()
    for name, text in SLURM.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}")
    (tools / "fedstill").write_text(f'#!/bin/bash\nexec {sys.executable} -m harness.cli "$@"\n')
    for file in tools.iterdir():
        file.chmod(0o755)
    (tmp_path / "tiny.toml").write_text(CARD)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "MLFLOW_"))}
    environment["PATH"] = f"{tools}:{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"PYTHONPATH": str(ROOT), "SLURM_LOG": str(tmp_path / "slurm.log")}
    words = ["sbatch", DEPLOY / "slurm.sh", "tiny.toml", "--results", results]

    def job(out: str) -> subprocess.Popen[bytes]:
        with (tmp_path / out).open("wb") as log:
            return subprocess.Popen(
                words, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended() -> list[Path]:
        return sorted((results / "trials").glob("*.parquet"))

    first = job("first.log")
    deadline = time.monotonic() + 200
    while not ended() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.2)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(120) == 0, (tmp_path / "first.log").read_text()
    assert (tmp_path / "slurm.log").read_text() == "requeue 4711\n"
    assert not listening(20000 + 4711) and not Path("/tmp/ray-4711").exists()
    before = {path: path.stat().st_mtime_ns for path in ended()}
    assert 1 <= len(before) < 6
    second = job("second.log")
    assert second.wait(250) == 0, (tmp_path / "second.log").read_text()
    assert f"{len(before)} already there" in (tmp_path / "second.log").read_text()
    assert {row["status"] for row in Store(results, writable=False).rows("trials")} == {"done"}
    assert len(ended()) == 6 and before.items() <= {p: p.stat().st_mtime_ns for p in ended()}.items()
    assert (tmp_path / "slurm.log").read_text() == "requeue 4711\n"
