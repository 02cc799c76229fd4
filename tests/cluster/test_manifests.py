"""The manifests: they have the shapes that their readers ask for, agree with pyproject.toml, and
hold no secrets.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
MANIFESTS = ("aws.yaml", "gcp.yaml", "kuberay-rayjob.yaml", "slurm.sh", "Dockerfile")
RAY_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.fixture(params=["aws", "gcp"])
def launcher(request):
    """A manifest for `ray up`, as a document."""
    return yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text())


@pytest.fixture
def rayjob():
    return yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())


@pytest.fixture
def dockerfile():
    """Instructions of the Dockerfile as (word, rest), with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [
        tuple(line.split(maxsplit=1))
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def pinned_ray() -> str:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = [requirement for requirement in requirements if requirement.startswith("ray[")]
    return pin.partition("==")[2].removesuffix(".*")


def test_launcher_files_have_rays_shape(launcher):
    jsonschema.validate(launcher, RAY_SCHEMA)
    types = launcher["available_node_types"]
    assert launcher["head_node_type"] in types
    assert sum(node.get("max_workers", 0) for node in types.values()) <= launcher["max_workers"]
    assert all(node.get("min_workers", 0) <= node.get("max_workers", 0) for node in types.values())


def test_launcher_heads_do_no_work_and_gpus_scale(launcher):
    types = launcher["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] == 0 < types["gpu"]["max_workers"]
    if launcher["provider"]["type"] == "gcp":  # AWS instance types are looked up; these are not
        assert types["gpu"]["resources"]["GPU"] > 0 and types["cpu"]["resources"]["CPU"] > 0
        assert types["gpu_spot"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    else:
        assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    spot, plain = types["gpu_spot"]["node_config"], types["gpu"]["node_config"]
    machine = "InstanceType" if "InstanceType" in plain else "machineType"
    assert spot[machine] == plain[machine]


def test_launcher_containers_have_memory_to_share_and_a_token(launcher):
    docker = launcher["docker"]
    assert docker["image"] == "${ONETOMANY_IMAGE}"
    assert any(option.startswith("--shm-size=") for option in docker["head_run_options"])
    assert any(option.startswith("--shm-size=") for option in docker["worker_run_options"])
    assert "-e RAY_AUTH_MODE=token" in docker["run_options"]
    assert launcher["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    head = " ".join(launcher["head_start_ray_commands"])
    assert (
        "--dashboard-host=127.0.0.1" in head
        and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    )
    assert launcher["setup_commands"] == []  # Ray's default would install another Ray


# The part of KubeRay's RayJob that we use, closed against misspelt fields. The full CRD (v1.7.0)
# accepts the file too.
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^\d+(m|Mi|Gi)?$"},
}
CONTAINER = {
    "type": "object",
    "required": ["name", "image", "resources", "volumeMounts"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        "image": {"type": "string"},
        "ports": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["containerPort"],
                "additionalProperties": False,
                "properties": {
                    "containerPort": {"type": "integer"},
                    "name": {"type": "string", "maxLength": 15},
                },
            },
        },
        "env": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "value"],
                "additionalProperties": False,
                "properties": {"name": {"type": "string"}, "value": {"type": "string"}},
            },
        },
        "envFrom": {"type": "array", "items": {"type": "object", "required": ["secretRef"]}},
        "resources": {
            "type": "object",
            "required": ["limits", "requests"],
            "additionalProperties": False,
            "properties": {"limits": QUANTITIES, "requests": QUANTITIES},
        },
        "volumeMounts": {
            "type": "array",
            "items": {"type": "object", "required": ["name", "mountPath"]},
        },
    },
}
TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers", "volumes"],
            "additionalProperties": False,
            "properties": {
                "restartPolicy": {"enum": ["Never"]},
                "securityContext": {"type": "object"},
                "tolerations": {"type": "array"},
                "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            },
        }
    },
}
START = {"type": "object", "additionalProperties": {"type": "string"}}
WORKERS = {
    "type": "object",
    "required": ["groupName", "minReplicas", "maxReplicas", "template"],
    "additionalProperties": False,
    "properties": {
        **{
            name: {"type": "integer", "minimum": 0}
            for name in ("replicas", "minReplicas", "maxReplicas")
        },
        "groupName": {"type": "string"},
        "rayStartParams": START,
        "template": TEMPLATE,
    },
}
RAYJOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
                "backoffLimit": {"type": "integer", "minimum": 0},
                "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                        "authOptions": {"const": {"mode": "token"}},
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "autoscalerOptions": {"type": "object"},
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["rayStartParams", "template"],
                            "additionalProperties": False,
                            "properties": {"rayStartParams": START, "template": TEMPLATE},
                        },
                        "workerGroupSpecs": {"type": "array", "minItems": 1, "items": WORKERS},
                    },
                },
            },
        },
    },
}


def test_the_rayjob_has_kuberays_shape(rayjob):
    jsonschema.validate(rayjob, RAYJOB)


def test_the_rayjob_keeps_work_off_the_head_and_gives_workers_gpus(rayjob):
    spec = rayjob["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    pods = [spec["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    assert {pod["containers"][0]["image"] for pod in pods} == {"${ONETOMANY_IMAGE}"}
    for pod in pods:
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        shared, memory = volume["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"]
        assert int(shared.removesuffix("Gi")) < int(memory.removesuffix("Gi")) / 2
        assert (
            pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        )
    assert int(pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    words = shlex.split(rayjob["spec"]["entrypoint"])
    assert words[:2] == ["onetomany", "run"] and "auto" in words


def test_the_rayjob_declares_the_workers_that_it_may_have(rayjob):
    """The autoscaler's settings lie in another container: a job reads them from this variable
    (train/node_types.py).
    """
    spec = rayjob["spec"]["rayClusterSpec"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    (declared,) = [
        json.loads(one["value"]) for one in head["env"] if one["name"] == "ONETOMANY_NODE_TYPES"
    ]
    (workers,) = spec["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    resources = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])}
    assert declared == {
        workers["groupName"]: {"resources": resources, "max_workers": workers["maxReplicas"]}
    }


def test_ray_has_one_version(rayjob):
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"].startswith(pinned_ray() + ".")
    assert ray.__version__.startswith(pinned_ray() + ".")
    for name in MANIFESTS:
        for version in re.findall(
            r"\bRay (\d+\.\d+)\b|ray==(\d+\.\d+)", (CLUSTER / name).read_text()
        ):
            assert pinned_ray() in version, name


def test_the_image_is_locked_and_its_user_is_nobody_special(dockerfile):
    install = next(
        rest for word, rest in dockerfile if word == "RUN" and "requirements.lock" in rest
    )
    assert "uv pip install" in install and "--require-hashes" in install
    assert [rest for word, rest in dockerfile if word == "USER"] == ["ray"]
    assert any(
        "useradd" in rest and "--uid 1000" in rest for word, rest in dockerfile if word == "RUN"
    )
    # `ray up` reads it
    assert any("HOME=/home/ray" in rest for word, rest in dockerfile if word == "ENV")


def test_the_base_of_the_image_has_a_full_version_and_can_be_given_a_digest(dockerfile):
    arguments = dict(rest.split("=", 1) for word, rest in dockerfile if word == "ARG")
    assert (
        re.fullmatch(r"python:3\.12\.\d+-slim-[a-z]+", arguments["BASE"])
        and arguments["BASE_DIGEST"] == ""
    )
    assert ("FROM", "${BASE}${BASE_DIGEST:+@${BASE_DIGEST}}") in dockerfile


def test_what_builds_the_image_and_the_package_is_pinned(dockerfile):
    """uv by version, the same in the image and in CI; hatchling by its hash, since no build fetches
    it.
    """
    continuous = (ROOT / ".ci" / "run").read_text()
    installs = [line for line in continuous.splitlines() if "pip install" in line]
    in_ci = re.findall(r"pip install --quiet uv==([\d.]+)$", continuous, re.MULTILINE)
    image = "\n".join(rest for word, rest in dockerfile if word == "RUN")
    assert re.findall(r'"uv==(\d+\.\d+\.\d+)"', image) == in_ci and len(in_ci) == 1
    for line in [
        line for line in [*installs, *image.splitlines()] if re.search(r"(-e|--editable) \.", line)
    ]:
        assert "--no-build-isolation" in line and "--no-deps" in line
    assert image.count("--editable .") == 1 and sum(" -e ." in line for line in installs) == 1


def test_the_image_asks_for_gpus(dockerfile):
    """Without these NVIDIA's container runtime gives a plain image none."""
    variables = dict(
        pair.split("=", 1) for word, rest in dockerfile if word == "ENV" for pair in rest.split()
    )
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(variables["NVIDIA_DRIVER_CAPABILITIES"].split(",")) >= {"compute", "utility"}


@pytest.mark.parametrize(
    "name",
    ["requirements.lock", "pyproject.toml", "README.md", "LICENSE", "pipeline", "cluster", "jobs"],
)
def test_the_image_copies_what_exists(dockerfile, name):
    copies = [shlex.split(rest) for word, rest in dockerfile if word == "COPY"]
    sources = [word for copy in copies for word in copy[:-1] if not word.startswith("--")]
    assert name in sources and len(sources) == 7
    assert (ROOT / name).exists(), f"the Dockerfile copies {name}"


@pytest.mark.parametrize("name", [*MANIFESTS, "README.md", "submit.py", "local.py", "package.py"])
def test_nothing_names_a_registry_a_secret_or_this_machine(name):
    text = (CLUSTER / name).read_text()
    hosts = r"pypi(?!rc)|pythonhosted|(docker|ghcr|quay|gcr)\.io|amazonaws\.com|index-url|https?://(?!head|localhost|127|\{)"
    assert not re.search(hosts, text.replace("https?://", "")), name
    assert not re.search(r"AKIA|-----BEGIN|/work/|/root/", text), name


def test_slurm_script_is_sound_bash():
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(CLUSTER / "slurm.sh")], check=True)


FAKE_PYTHON = """#!/bin/bash
case "$*" in
    "-c "*) exec {python} "$@" ;;
    "-P -m ray.scripts.scripts symmetric-run "*)
        echo "ray: $*"; cat "$RAY_AUTH_TOKEN_PATH" > "$SEEN/token"; stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$SEEN/mode"
        [[ ${{RAY_FAILS:-}} ]] && exit 0
        while [[ $1 != -- ]]; do shift; done
        shift; "$@" ;;
    *) printf 'job: %s\\n' "$*"; exit 3 ;;
esac
"""
FAKE_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sh with stand-ins for Slurm's commands and for Python."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    fakes = {
        "python": FAKE_PYTHON.format(python=sys.executable),
        "srun": FAKE_SRUN,
        "scontrol": "#!/bin/bash\nprintf 'node7\\nnode8\\n'\n",
    }
    for name, text in fakes.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "ONETOMANY_PYTHON": str(tmp_path / "bin" / "python"),
            "SLURM_SUBMIT_DIR": str(tmp_path / "home"),
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "64",
            "SLURM_GPUS_ON_NODE": "4",
            "SEEN": str(tmp_path),
            **environment,
        }
        script = ["bash", str(CLUSTER / "slurm.sh"), *arguments]
        return subprocess.run(script, env=env, capture_output=True, text=True, check=False)

    return run


def test_slurm_passes_the_job_on_and_its_exit_code_back(slurm, tmp_path):
    ended = slurm("jobs/vision/vision.yaml", "--set", "name=a b", "--set", "storage=/shared/it's")
    assert ended.returncode == 3, ended.stderr
    ray_line, job_line = ended.stdout.splitlines()
    assert (
        "symmetric-run --address node7:11234 --min-nodes 2 --num-cpus 64 --num-gpus 4 -- "
        in ray_line
    )
    assert job_line == (
        "job: -P -m pipeline.cli run jobs/vision/vision.yaml --set name=a b --set "
        "storage=/shared/it's --address auto"
    )
    assert len((tmp_path / "token").read_text()) == 64
    assert (tmp_path / "mode").read_text().strip() == "600"
    assert list((tmp_path / "home").iterdir()) == []  # the token is gone


def test_slurm_does_not_take_a_ray_that_never_started_for_success(slurm):
    ended = slurm("jobs/vision/vision.yaml", RAY_FAILS="1")
    assert ended.returncode == 1
    assert "the job did not start" in ended.stderr
    assert slurm().returncode == 2
