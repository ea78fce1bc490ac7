"""The manifests of cluster/: their form, and that they agree with each other, the package and the jobs.

What they describe is not run here. Ray's own validation is asked wherever it has one.
"""

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
HOME = "/mnt/retro_ray"
SOURCES = "/home/ray/retro_ray"
JOB_FILES = ["rayjob-index.yaml", "rayjob-train.yaml"]


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def cluster_specs() -> dict[str, dict]:
    """The specs that describe pods: of the cluster for jobs and of the cluster that serves."""
    return {
        "raycluster.yaml": load(KUBERAY / "raycluster.yaml")["spec"],
        "rayservice.yaml": load(KUBERAY / "rayservice.yaml")["spec"]["rayClusterConfig"],
    }


def pod_groups(spec: dict) -> dict[str, dict]:
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def all_pods() -> dict[str, dict]:
    """Every pod spec, by file and group."""
    return {
        f"{file} {name}": group["template"]["spec"]
        for file, spec in cluster_specs().items()
        for name, group in pod_groups(spec).items()
    }


def shard_resource() -> str:
    source = (ROOT / "retro_ray/retrieval/shard_actor.py").read_text()
    (name,) = re.findall(r'^SHARD_RESOURCE = "(\w+)"$', source, re.MULTILINE)
    return name


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match, f"constraints.txt does not pin {package}"
    return match[1]


def readme_commands() -> list[str]:
    """The commands of cluster/README.md's `sh` blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (CLUSTER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def job_commands() -> list[tuple[str, list[str]]]:
    """(path of the job as written, its arguments) of every RayJob and README line that runs one."""
    commands = [load(KUBERAY / file)["spec"]["entrypoint"] for file in JOB_FILES] + readme_commands()
    found = []
    for command in commands:
        words = shlex.split(command, comments=True)
        for i, word in enumerate(words):
            if re.fullmatch(r"(.*/)?jobs/\w+\.py", word):
                found.append((word, words[i + 1 :]))
    return found


@functools.cache
def help_text(job: str) -> str:
    wide = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    run = subprocess.run(
        [sys.executable, ROOT / "jobs" / job, "--help"], capture_output=True, text=True, env=wide, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# Kubernetes


@pytest.mark.parametrize(
    ("file", "api_version", "kind"),
    [
        ("storage.yaml", "v1", "PersistentVolumeClaim"),
        ("raycluster.yaml", "ray.io/v1", "RayCluster"),
        ("rayjob-index.yaml", "ray.io/v1", "RayJob"),
        ("rayjob-train.yaml", "ray.io/v1", "RayJob"),
        ("rayservice.yaml", "ray.io/v1", "RayService"),
    ],
)
def test_kuberay_manifest_has_its_kind(file: str, api_version: str, kind: str) -> None:
    manifest = load(KUBERAY / file)
    assert (manifest["apiVersion"], manifest["kind"]) == (api_version, kind)


def test_kuberay_names_are_short_and_differ() -> None:
    names = [load(path)["metadata"]["name"] for path in KUBERAY.glob("*.yaml")]
    # A RayCluster and a RayService of one name would both own the Service NAME-head-svc.
    assert len(set(names)) == len(names) == 5
    # KubeRay refuses RayJobs and RayServices with names over 47 characters, and names that are no DNS label.
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name) for name in names)


def test_pod_groups_agree_across_files() -> None:
    def description(group: dict) -> dict:
        return {key: value for key, value in group.items() if key not in ("replicas", "minReplicas", "maxReplicas")}

    jobs, serving = cluster_specs().values()
    assert {name: description(group) for name, group in pod_groups(jobs).items()} == {
        name: description(group) for name, group in pod_groups(serving).items()
    }
    assert (jobs["rayVersion"], jobs["autoscalerOptions"]) == (serving["rayVersion"], serving["autoscalerOptions"])


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayservice.yaml"])
def test_autoscaler_sees_shard_nodes_and_gpu_nodes(file: str) -> None:
    manifest = {"metadata": {"name": "any", "namespace": "default"}, "spec": cluster_specs()[file]}
    # Ray's autoscaler reads a RayCluster with this function, and validates the result.
    types = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    shard = shard_resource()
    offered = {name: {key: kind["resources"].get(key, 0) for key in ("GPU", shard)} for name, kind in types.items()}
    assert offered == {
        "headgroup": {"GPU": 0, shard: 0},
        "cpu-shards": {"GPU": 0, shard: 1},
        "gpu": {"GPU": 1, shard: 0},
    }
    assert types["headgroup"]["resources"]["CPU"] == 0
    # An actor that asks for the resource goes nowhere else, so a node that has it is always there.
    assert types["cpu-shards"]["min_workers"] >= 1


def test_every_pod_mounts_the_one_claim_as_home() -> None:
    claim = load(KUBERAY / "storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pods = all_pods()
    assert len(pods) == 6
    for name, pod in pods.items():
        (volume,), (container,) = pod["volumes"], pod["containers"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": HOME}], name
        assert {"name": "RETRO_RAY_HOME", "value": HOME} in container["env"], name


def test_every_pod_requests_what_it_is_limited_to_and_is_not_root() -> None:
    for name, pod in all_pods().items():
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        assert pod["securityContext"]["runAsNonRoot"] is True, name


@pytest.mark.parametrize("file", JOB_FILES)
def test_rayjob_selects_the_cluster(file: str) -> None:
    spec = load(KUBERAY / file)["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": load(KUBERAY / "raycluster.yaml")["metadata"]["name"]}
    # KubeRay refuses or ignores these together with clusterSelector.
    assert not {"rayClusterSpec", "backoffLimit", "suspend", "shutdownAfterJobFinishes"} & set(spec)


def test_training_workers_fit_into_the_gpu_group_and_ask_for_it() -> None:
    words = shlex.split(load(KUBERAY / "rayjob-train.yaml")["spec"]["entrypoint"])
    num_workers = int(words[words.index("--num-workers") + 1])
    assert num_workers <= pod_groups(cluster_specs()["raycluster.yaml"])["gpu"]["maxReplicas"]
    # The group starts empty, so `auto` would find no GPU and train on CPUs.
    assert words[words.index("--use-gpu") + 1] == "yes"


# Jobs and the service


def test_jobs_named_exist_and_are_executable() -> None:
    commands = job_commands()
    assert {Path(path).name for path, _ in commands} == {"index.py", "train.py"}
    for path, _ in commands:
        # `ray job submit` on one machine runs from the root; images and launcher put the sources under SOURCES.
        job = ROOT / path.removeprefix(f"{SOURCES}/")
        assert os.access(job, os.X_OK), f"{job} is missing or not executable"
        assert job.read_text().startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize("job", ["index.py", "train.py"])
def test_flags_of_jobs_exist(job: str) -> None:
    flags = {
        word.partition("=")[0]
        for path, arguments in job_commands()
        if Path(path).name == job
        for word in arguments
        if word.startswith("--")
    }
    assert flags
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text(job)))
    assert flags <= known


def test_recipe_exists() -> None:
    recipes = {
        node.name
        for node in ast.parse((ROOT / "retro_ray/recipes.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    used = {words[words.index("--recipe") + 1].replace("-", "_") for _, words in job_commands() if "--recipe" in words}
    assert used
    assert used <= recipes


def serve_settings() -> set[str]:
    """Names of the arguments of `serve run retro_ray.serve:app`."""
    tree = ast.parse((ROOT / "retro_ray/serve/settings.py").read_text())
    (settings,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServeSettings"]
    fields = [node.target for node in settings.body if isinstance(node, ast.AnnAssign)]
    return {field.id for field in fields if isinstance(field, ast.Name)}


def test_serve_config_names_the_app_and_its_settings() -> None:
    config = yaml.safe_load(load(KUBERAY / "rayservice.yaml")["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "retro_ray.serve:app"
    package = ast.parse((ROOT / "retro_ray/serve/__init__.py").read_text())
    exported = {
        alias.asname or alias.name for node in package.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert "app" in exported
    assert application.args["home"] == HOME
    assert set(application.args) <= serve_settings()
    # The replica's GPUs, and a node of the gpu group that has them from the start.
    gpu = pod_groups(cluster_specs()["rayservice.yaml"])["gpu"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert 0 < application.args["num_gpus"] <= int(limits["nvidia.com/gpu"])
    assert gpu["minReplicas"] >= 1


def test_readme_serve_commands_use_known_settings() -> None:
    commands = [command for command in readme_commands() if "serve run" in command]
    assert len(commands) == 2
    for command in commands:
        arguments = command.partition("retro_ray.serve:app")[2].strip("' ").split()
        assert {argument.partition("=")[0] for argument in arguments} <= serve_settings()


# Ray's cluster launcher


@pytest.fixture
def launcher() -> dict:
    return load(CLUSTER / "ray-cluster.yaml")


def test_launcher_config_is_valid(launcher: dict) -> None:
    # The steps of `ray up` before it talks to the provider: Ray's defaults, then its schema.
    validate_config(prepare_config(launcher))


def test_launcher_schema_refuses_a_misspelt_key(launcher: dict) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(launcher | {"max_worker": 3}))


def test_launcher_node_types(launcher: dict) -> None:
    types = launcher["available_node_types"]
    assert {name: kind["resources"] for name, kind in types.items()} == {
        "head": {"CPU": 0},
        "cpu-shards": {shard_resource(): 1},
        "gpu": {},
    }
    assert types["cpu-shards"]["min_workers"] >= 1
    assert launcher["max_workers"] >= sum(kind.get("max_workers", 0) for kind in types.values())


def test_launcher_shares_home_and_sources(launcher: dict) -> None:
    options = launcher["docker"]["run_options"]
    assert f"-v {HOME}:{HOME}" in options
    assert f"-e RETRO_RAY_HOME={HOME}" in options
    assert any("mount -t nfs4" in command and command.endswith(HOME) for command in launcher["initialization_commands"])
    assert launcher["file_mounts"] == {SOURCES: "."}
    assert f"cd {SOURCES} && pip install -c constraints.txt -e ." in launcher["setup_commands"]


def test_launcher_keeps_the_dashboard_on_loopback(launcher: dict) -> None:
    (start,) = [command for command in launcher["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


# Image and versions


def dockerfile(instruction: str) -> list[str]:
    text = (CLUSTER / "Dockerfile").read_text()
    return re.findall(rf"^{instruction} (.+)$", text.replace("\\\n", " "), re.MULTILINE)


def test_dockerfile_copies_what_exists_to_where_jobs_are_looked_for() -> None:
    copied = [word for line in dockerfile("COPY") for word in line.split()[:-1] if not word.startswith("--")]
    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert dockerfile("WORKDIR") == [SOURCES]
    assert dockerfile("USER") == []  # the base image ends as `ray`, not root
    assert "--chown=1000:100 jobs ./jobs" in dockerfile("COPY")
    # What pip reads to build the package.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]} <= set(copied)


def test_ray_version_is_that_of_constraints(launcher: dict) -> None:
    ray = pinned("ray")
    assert {spec["rayVersion"] for spec in cluster_specs().values()} == {ray}
    bases = {f"rayproject/ray:{ray}-py311", f"rayproject/ray:{ray}-py311-gpu"}
    launched = {launcher["docker"]["image"], launcher["available_node_types"]["gpu"]["docker"]["worker_image"]}
    assert launched == bases
    assert f"BASE={min(bases, key=len)}" in dockerfile("ARG")
    ours = {pod["containers"][0]["image"] for pod in all_pods().values()}
    assert ours == {f"registry.example.com/retro_ray:ray-{ray}", f"registry.example.com/retro_ray:ray-{ray}-gpu"}
    # The README builds and pushes exactly those, from those bases, and installs that Ray.
    commands = "\n".join(readme_commands())
    assert set(re.findall(r"registry\.example\.com/\S+", commands)) == ours
    assert set(re.findall(r"BASE=(\S+)", commands)) == {max(bases, key=len)}
    assert re.findall(r"ray\[default\]==([\d.]+)", commands) == [ray]


# README


def test_readme_names_files_and_objects_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    files = set(re.findall(r"(?<![\w/])(?:cluster|tests|jobs)/[\w./-]*\w", text))
    assert len(files) >= 8
    assert [file for file in sorted(files) if not (ROOT / file).exists()] == []
    names = {load(path)["metadata"]["name"] for path in KUBERAY.glob("*.yaml")}
    objects = set(re.findall(r"(?:job|rayjob|service)/(retro-ray[\w-]*?)(?:-head-svc|-serve-svc)?(?![\w-])", text))
    assert objects
    assert objects <= names
