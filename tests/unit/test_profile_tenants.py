"""Tenants in a profile: what may be said of them, where it is wrong, and what the router is told."""

import sys

import pytest
import yaml

from cluster.cli import main
from cluster.explain import explain, render
from cluster.placement import Node
from cluster.plan import plan
from cluster.problems import Place, Problem, ProfileError
from cluster.profile import canonical, json_schema, parse_profile
from cluster.wiring import Wiring
from router.auth import ApiKeys, key_digest
from router.core.placement import POLICIES
from router.core.tenants import Tenant

pytestmark = pytest.mark.unit

GOOD = "version: 1\nname: x\nmodel: {path: tiny}\ncolocated: {}\n"
KEY_A, KEY_B = key_digest("a"), key_digest("b")
TENANTS = f"""\
router:
  tenants:
    team-a: {{keys: [{KEY_A}], weight: 2, max_concurrent: 64, tokens_per_s: 5000, burst: 9000, max_priority: 3}}
    team-b:
      keys:
        - {KEY_B}
"""
NODE = Node(
    name="vm", address="127.0.0.1", cores=(0, 1), memory_bytes=24 << 30, gpu_memory_bytes=(), types=None
)


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ProfileError) as caught:
        parse_profile(GOOD + text, "p.yaml")
    return caught.value.problems


def only_problem(text: str) -> Problem:
    (problem,) = problems_of(text)
    return problem


def test_the_router_is_told_who_may_do_what() -> None:
    loaded = parse_profile(GOOD + TENANTS, "p.yaml")
    wiring = Wiring(loaded.profile, plan(loaded, [NODE]), "tiny", "tiny", b"s" * 32)
    config = wiring.router_config(wiring.plan.routers[0])
    assert config.api_keys == {KEY_A: "team-a", KEY_B: "team-b"}
    assert config.tenants == {
        "team-a": Tenant(
            name="team-a",
            weight=2,
            max_concurrent=64,
            tokens_per_s=5000,
            burst_tokens=9000,
            max_priority=3,
        ),
        "team-b": Tenant(name="team-b"),
    }


def test_what_is_shown_is_a_profile_with_the_same_tenants() -> None:
    loaded = parse_profile(GOOD + TENANTS, "p.yaml")
    shown = render(explain(loaded, plan(loaded, [NODE])))
    assert parse_profile(shown, "shown.yaml").profile.router == loaded.profile.router
    again = parse_profile(yaml.safe_dump(canonical(loaded.profile)), "again.yaml")
    assert again.profile == loaded.profile


def test_an_unknown_key_of_a_tenant_names_its_place_and_the_nearest() -> None:
    problem = only_problem(TENANTS + "      wieght: 3\n")
    assert (problem.place, problem.nearest) == (Place(11, 7), "weight")
    assert problem.path == ("router", "tenants", "team-b", "wieght")


def test_a_key_itself_is_refused_and_not_repeated() -> None:
    problem = only_problem(TENANTS.replace(KEY_B, "hr-secret"))
    assert problem.place == Place(10, 11)
    assert "`headrace tenants key NAME`" in problem.expected
    assert "hr-secret" not in str(problem)


def test_a_name_that_is_none_is_refused_at_its_place() -> None:
    problem = only_problem(TENANTS.replace("team-b:", "Team B:"))
    assert problem.place == Place(8, 5)
    assert '"Team B" is not a name' in problem.message


def test_a_key_belongs_to_one_tenant() -> None:
    problem = only_problem(TENANTS.replace(KEY_B, KEY_A))
    assert (problem.place, problem.path) == (Place(10, 11), ("router", "tenants", "team-b", "keys", 0))
    assert "team-a" in problem.message


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ("router: {tenants: {}}\n", ("router", "tenants")),
        ("router: {tenants: []}\n", ("router", "tenants")),
        ("router: {tenants: {a: {}}}\n", ("router", "tenants", "a", "keys")),
        ("router: {tenants: {a: {keys: []}}}\n", ("router", "tenants", "a", "keys")),
        ("router: {tenants: {a: {keys: x}}}\n", ("router", "tenants", "a", "keys")),
        (f"router: {{tenants: {{a: {{keys: [{KEY_A}], burst: 5}}}}}}\n", ("router", "tenants", "a", "burst")),
        (
            f"router: {{tenants: {{a: {{keys: [{KEY_A}], weight: 0}}}}}}\n",
            ("router", "tenants", "a", "weight"),
        ),
        (
            f"router: {{tenants: {{a: {{keys: [{KEY_A}], max_priority: 10}}}}}}\n",
            ("router", "tenants", "a", "max_priority"),
        ),
    ],
)
def test_what_cannot_be_is_named(wrong: str, path: tuple[str, ...]) -> None:
    problem = only_problem(wrong)
    assert problem.path == path
    assert problem.place is not None and problem.place.line == 5


def test_every_policy_of_the_router_is_one_of_a_profile() -> None:
    for name in POLICIES:
        assert parse_profile(GOOD + f"router: {{policy: {name}}}\n", "p.yaml").profile.router.policy == name
    problem = only_problem("router: {policy: leastloaded}\n")
    assert (problem.nearest, problem.place) == ("least-loaded", Place(5, 18))
    assert all(name in problem.expected for name in POLICIES)
    assert "policy" in str(json_schema()) and all(name in str(json_schema()) for name in POLICIES)


def test_a_drawn_key_is_printed_with_the_line_that_lets_it_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = set()
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["headrace", "tenants", "key", "team-a"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        key, line = capsys.readouterr().out.splitlines()
        keys.add(key)
        loaded = parse_profile(GOOD + f"router:\n  tenants:\n    {line}\n", "p.yaml")
        tenants = loaded.profile.router.tenants
        assert tenants is not None
        known = ApiKeys({tenants["team-a"].keys[0]: "team-a"})
        assert known.tenant([("authorization", f"Bearer {key}")]) == "team-a"
    assert len(keys) == 2 and all(len(key) > 40 for key in keys)


def test_a_key_for_no_name_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["headrace", "tenants", "key", "Team A"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
