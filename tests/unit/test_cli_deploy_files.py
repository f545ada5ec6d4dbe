"""Files of deploy/ that no other test opens."""

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster_file() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "deploy" / "ray" / "on-prem.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_the_cluster_file_names_as_many_workers_as_it_scales_to(cluster_file: dict[str, Any]) -> None:
    assert cluster_file["provider"]["type"] == "local"
    assert (
        cluster_file["min_workers"]
        == cluster_file["max_workers"]
        == len(cluster_file["provider"]["worker_ips"])
    )


def test_no_node_of_the_cluster_file_answers_without_a_token(cluster_file: dict[str, Any]) -> None:
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster_file[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in cluster_file["file_mounts"]


def test_the_dashboard_of_the_cluster_file_is_on_loopback(cluster_file: dict[str, Any]) -> None:
    (head,) = [command for command in cluster_file["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head


def test_the_readme_s_profile_is_one() -> None:
    from cluster.profile import parse_profile

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("```yaml\n")[1].split("```")[0]
    assert [name for name, _ in parse_profile(example, "README.md").profile.groups()] == ["prefill", "decode"]


def test_every_key_of_a_profile_is_documented() -> None:
    from cluster.profile import json_schema

    page = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    definitions = json_schema()["$defs"]
    assert isinstance(definitions, dict)
    keys = {key for section in definitions.values() for key in section["properties"]}
    assert {key for key in keys if key not in page} == set()
