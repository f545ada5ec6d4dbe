"""What a profile may say, and how it is told what is wrong with it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.problems import Place, Problem, ProfileError
from cluster.profile import (
    MAX_FILE_BYTES,
    LoadedProfile,
    canonical,
    is_loopback,
    json_schema,
    load_profile,
    parse_profile,
    split_address,
)
from cluster.profiles import find_profile, profile_names

pytestmark = pytest.mark.unit

GOOD = "version: 1\nname: x\nmodel: {path: tiny}\nprefill: {}\ndecode: {}\n"
DESIGN = """\
version: 1
name: laptop
about: One prefill and one decode worker on one machine, for development and first tries.
model:
  path: smollm2-135m-instruct      # a prepared model: a name in the store, or a directory
  precision: auto                  # float32 | bfloat16 | int8 | fp8
  kv_dtype: auto                   # bfloat16 with bfloat16 or int8 weights, else float32
  max_context: 8192                # tokens
prefill:
  replicas: 1
  resources: {cpus: 1, gpus: 0}    # node_type: prefill   on a cluster
  chunk: 512                       # tokens
decode:
  replicas: 1
  resources: {cpus: 1, gpus: 0}
  max_sequences: 64
  kv_memory: 2GiB
kvtransfer:
  fidelity: exact                  # exact | near | compact
  codec: auto
  tiers: {host: 1GiB, disk: {path: ~/.cache/headrace/kv, size: 8GiB}}
router:
  grpc: 127.0.0.1:8460
  policy: cost
  slo: {ttft: 2s, itl: 100ms}
  queue: 65536                     # tokens
"""


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, "p.yaml")
    return caught.value.problems


def only_problem(text: str) -> Problem:
    (problem,) = problems_of(text)
    return problem


def test_the_design_s_example_is_a_profile() -> None:
    profile = parse_profile(DESIGN, "laptop.yaml").profile
    assert profile.decode is not None and profile.decode.kv_memory == 2 << 30
    assert profile.router.slo is not None and profile.router.slo.itl == pytest.approx(0.1)
    assert profile.prefill is not None and profile.prefill.resources.cpus == 1


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_that_comes_with_headrace_is_good(name: str) -> None:
    assert find_profile(name).profile.name == name


def test_the_profiles_that_the_readme_names_are_there() -> None:
    assert {"laptop", "colocated", "two-by-two"} <= set(profile_names())


def test_a_profile_does_not_change() -> None:
    profile = parse_profile(GOOD, "p.yaml").profile
    with pytest.raises(ValidationError, match="frozen"):
        profile.name = "other"


def test_an_unknown_key_names_its_place_and_the_nearest_key() -> None:
    problem = only_problem(GOOD.replace("decode: {}", "decode:\n  max_sequnces: 3"))
    assert problem.place == Place(6, 3)
    assert problem.nearest == "max_sequences"
    assert str(problem).startswith(
        'p.yaml:6:3: decode.max_sequnces: unknown key "max_sequnces"; did you mean'
    )


def test_a_key_in_the_wrong_section_is_told_where_it_belongs() -> None:
    problem = only_problem(GOOD + "kv_memory: 2GiB\n")
    assert "belongs under prefill, decode or colocated" in problem.message


def test_a_wrong_unit_names_the_place_and_the_right_one() -> None:
    problem = only_problem(GOOD.replace("decode: {}", "decode: {kv_memory: 2GB}"))
    assert (problem.place, problem.nearest) == (Place(5, 21), "2GiB")
    assert "2GiB" in problem.expected


def test_an_unknown_word_names_the_nearest() -> None:
    problem = only_problem(GOOD + "kvtransfer: {fidelity: exakt}\n")
    assert problem.nearest == "exact"
    assert problem.expected == "exact, near or compact"


def test_an_unknown_version_says_which_is_known() -> None:
    problem = only_problem(GOOD.replace("version: 1", "version: 2"))
    assert problem.place == Place(1, 10)
    assert problem.expected == "1"


def test_a_missing_key_names_the_section_that_lacks_it() -> None:
    problem = only_problem(GOOD.replace("{path: tiny}", "{precision: auto}"))
    assert problem.path == ("model", "path")
    assert problem.place == Place(3, 1)


def test_a_key_given_twice_is_refused() -> None:
    problem = only_problem(GOOD + "name: y\n")
    assert (problem.place, problem.message) == (Place(6, 1), "given twice; first on line 2")


def test_all_problems_are_reported_in_the_order_of_the_file() -> None:
    text = GOOD.replace("version: 1", "version: 7").replace("{path: tiny}", "{pth: tiny}")
    text = text.replace("decode: {}", "decode: {replicas: 0, kv_memory: 1, chunk: many}")
    problems = problems_of(text)
    assert [problem.path for problem in problems] == [
        ("version",),
        ("model", "path"),
        ("model", "pth"),
        ("decode", "replicas"),
        ("decode", "kv_memory"),
        ("decode", "chunk"),
    ]
    assert str(ProfileError(problems)).count("\n") == len(problems) - 1


@pytest.mark.parametrize("sections", ["", "prefill: {}\n", "decode: {}\n"])
def test_a_cluster_that_cannot_prefill_and_decode_is_refused(sections: str) -> None:
    problem = only_problem(f"version: 1\nname: x\nmodel: {{path: tiny}}\n{sections}")
    assert "nothing can" in problem.message
    assert problem.expected == "the sections prefill and decode, or colocated"


def test_a_colocated_worker_alone_is_a_cluster() -> None:
    profile = parse_profile("version: 1\nname: x\nmodel: {path: a}\ncolocated: {}\n", "p.yaml").profile
    assert [name for name, _ in profile.groups()] == ["colocated"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "- 1",
        "a: [",
        "\tb: 1",
        "a: *x",
        "{1: 2}",
        "? [a]\n: b",
        "!!python/object:os.system {}",
        "\x00",
    ],
)
def test_what_is_no_mapping_of_keys_is_refused_with_a_place(text: str) -> None:
    assert all(problem.place is not None for problem in problems_of(text))


def test_aliases_cannot_unfold_without_end() -> None:
    levels = "".join(f"a{level}: &a{level} [{f'*a{level - 1}, ' * 9}]\n" for level in range(1, 9))
    assert "too large" in only_problem(f"a0: &a0 [x]\n{levels}").message


@given(st.text(alphabet="abc:{}[]-&*!|>#'\"\n \t0", max_size=60))
@settings(deadline=None, max_examples=300)
def test_no_text_makes_the_reader_fail_otherwise(text: str) -> None:
    with pytest.raises(ProfileError):
        parse_profile(text, "p.yaml")


@pytest.mark.parametrize("address", ["localhost", "a:b", ":1", "h:70000", "h:²", "h:-1", ""])
def test_an_address_must_be_host_and_port(address: str) -> None:
    problem = only_problem(GOOD + f"router: {{grpc: '{address}'}}\n")
    assert "host:port" in problem.expected


def test_addresses_are_taken_apart() -> None:
    assert split_address("127.0.0.1:8460") == ("127.0.0.1", 8460)
    assert split_address("[::1]:0") == ("::1", 0)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "host")] == [
        True, True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"#" * (MAX_FILE_BYTES + 1)])
def test_a_file_that_cannot_be_read_is_a_problem_with_its_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "p.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ProfileError, match="cannot be read") as caught:
        load_profile(file)
    assert str(caught.value).startswith(str(file))


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(ProfileError) as caught:
        find_profile("labtop")
    assert caught.value.problems[0].nearest == "laptop"


def test_the_canonical_form_is_a_profile_with_the_same_meaning() -> None:
    import yaml

    loaded = parse_profile(DESIGN, "p.yaml")
    again = parse_profile(yaml.safe_dump(canonical(loaded.profile)), "again.yaml")
    assert again.profile == loaded.profile


def test_the_schema_knows_every_key_and_refuses_others() -> None:
    schema = json_schema()
    properties, definitions = schema["properties"], schema["$defs"]
    assert isinstance(properties, dict) and isinstance(definitions, dict)
    assert set(properties) == set(type(parse_profile(GOOD, "p").profile).model_fields)
    assert schema["additionalProperties"] is False
    assert definitions["Decode"]["properties"]["kv_memory"]["anyOf"][0]["pattern"].endswith("TiB)$")


def test_what_the_file_says_is_told_from_defaults() -> None:
    loaded: LoadedProfile = parse_profile(DESIGN, "p.yaml")
    assert loaded.says(("decode", "kv_memory"))
    assert not loaded.says(("prefill", "kv_memory"))
