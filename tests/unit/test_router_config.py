"""A router's settings, and what it reads of its model."""

import json
import math
from pathlib import Path

import pytest

from router.config import ModelFacts, RouterConfig
from router.core.tenants import Tenant

pytestmark = pytest.mark.unit

GOOD = {"router_id": "r", "model_name": "m", "model_dir": Path("m"), "cluster_secret": b"s" * 16}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"router_id": ""}, "router_id"),
        ({"cluster_secret": b"short"}, "cluster_secret"),
        ({"policy": "magic"}, "least-loaded"),
        ({"listen": "8460"}, "host:port"),
        ({"listen": "127.0.0.1:http"}, "host:port"),
        ({"api_keys": {"": "tenant"}}, "api_keys"),
        ({"api_keys": {"key": ""}}, "api_keys"),
        ({"tenants": {"a": Tenant(name="b")}}, "'b' under the name 'a'"),
        ({"slo_ttft_s": 0}, "slo_ttft_s"),
        ({"slo_itl_s": math.nan}, "slo_itl_s"),
        ({"max_context": 0}, "max_context"),
        ({"queue_tokens": -1}, "queue_tokens"),
        ({"default_timeout_s": math.nan}, "default_timeout_s"),
        ({"link_grace_s": 0}, "link_grace_s"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        RouterConfig(**(GOOD | settings))


def test_secrets_are_not_shown():
    shown = repr(RouterConfig(**(GOOD | {"api_keys": {"key-of-a": "a"}})))
    assert "ssss" not in shown and "key-of-a" not in shown


def write_model(directory: Path, manifest, config) -> RouterConfig:
    (directory / "headrace.json").write_text(json.dumps(manifest))
    (directory / "config.json").write_text(json.dumps(config))
    return RouterConfig(**(GOOD | {"model_dir": directory}))


def test_the_model_is_what_its_directory_says(tmp_path: Path):
    config = write_model(
        tmp_path, {"weights_digest": "abc", "max_context": 2048}, {"architectures": ["LlamaForCausalLM"]}
    )
    assert ModelFacts.read(config) == ModelFacts(
        name="m", architecture="LlamaForCausalLM", digest="abc", max_context=2048
    )


def test_the_profile_may_shorten_the_context_but_not_stretch_it(tmp_path: Path):
    config = write_model(tmp_path, {"max_context": 131072}, {})
    assert ModelFacts.read(config).max_context == config.max_context


@pytest.mark.parametrize("damage", ["missing", "not JSON", "a list"])
def test_a_directory_that_is_no_model_is_named_with_what_makes_one(tmp_path: Path, damage):
    config = write_model(tmp_path, {}, {})
    path = tmp_path / "headrace.json"
    match damage:
        case "missing":
            path.unlink()
        case "not JSON":
            path.write_text("{")
        case _:
            path.write_text("[]")
    with pytest.raises(ValueError, match=r"headrace\.json"):
        ModelFacts.read(config)
