"""The cluster files of launch/: by Ray's own schema, and their recipe a right one. KubeRay's schema does not come with
Ray; the file was checked against the operator's, where it was written."""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cuboid.trainer.check_folders import absolute_errors
from cuboid.trainer.recipe_file import load_recipe

LAUNCH = Path(__file__).parents[1] / "launch"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / name).read_text())


def test_the_cloud_cluster_is_one_to_ray() -> None:
    spec = find_spec("ray")
    assert spec
    assert spec.origin
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = read("ray_aws.yaml")
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"head_node": {}}, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    for kind in ("head", "worker"):
        (start,) = [line for line in cluster[f"{kind}_start_ray_commands"] if "ray start" in line]
        assert start.startswith("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=")
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]


def test_the_kubernetes_job_runs_a_right_recipe_on_storage_that_all_pods_see() -> None:
    spec = read("kuberay.yaml")["spec"]
    command, verb, recipe, *overrides = shlex.split(spec["entrypoint"])
    assert (command, verb) == ("cuboid", "train")
    wanted = load_recipe(recipe, overrides)
    assert not list(absolute_errors(wanted))
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for pod, container in zip(pods, containers, strict=True):
        volume = next(
            mount["name"] for mount in container["volumeMounts"] if wanted.runs.startswith(mount["mountPath"])
        )
        assert volume in [one["name"] for one in pod["volumes"] if "persistentVolumeClaim" in one]
