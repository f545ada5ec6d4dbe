"""From profile and machines to a plan, or to problems with their places."""

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.explain import explain, render
from cluster.memory import ModelFacts
from cluster.placement import Node
from cluster.plan import ClusterPlan, environment, plan
from cluster.problems import Place, Problem, ProfileError
from cluster.profile import parse_profile
from cluster.profiles import find_profile
from cluster.wiring import Wiring
from engine.models.config import ModelConfig
from worker.config import WorkerRole

pytestmark = pytest.mark.unit

HEAD = "version: 1\nname: x\nmodel: {path: tiny}\n"
GIB = 1 << 30


def machine(num_cores: int, num_gpus: int = 0, name: str = "vm", types: str | None = None) -> Node:
    return Node(
        name=name,
        address="127.0.0.1" if name == "vm" else name,
        cores=tuple(range(num_cores)),
        memory_bytes=24 * GIB,
        gpu_memory_bytes=(80 * GIB,) * num_gpus,
        types=None if types is None else frozenset(types.split()),
    )


def planned(sections: str, *nodes: Node, model: ModelFacts = ModelFacts()) -> ClusterPlan:
    return plan(parse_profile(HEAD + sections, "p.yaml"), nodes or (machine(2),), model)


def problems_of(sections: str, *nodes: Node, model: ModelFacts = ModelFacts()) -> tuple[Problem, ...]:
    with pytest.raises(ProfileError) as caught:
        planned(sections, *nodes, model=model)
    return caught.value.problems


def test_the_laptop_profile_on_two_cores() -> None:
    result = plan(find_profile("laptop"), [machine(2)])
    prefill, decode = result.workers
    assert (prefill.worker_id, prefill.role, prefill.cpus) == ("prefill-0", WorkerRole.PREFILL, (0,))
    assert (decode.worker_id, decode.role, decode.cpus) == ("decode-0", WorkerRole.DECODE, (1,))
    assert prefill.service_cpus == decode.service_cpus == result.routers[0].cpus == (0,)
    assert (prefill.ray_cpus, decode.ray_cpus) == (1, 1)
    assert (result.precision, result.kv_dtype) == ("float32", "float32")


def test_the_colocated_profile_takes_both_cores() -> None:
    (worker,) = plan(find_profile("colocated"), [machine(2)]).workers
    assert (worker.role, worker.cpus) == (WorkerRole.BOTH, (0, 1))


@pytest.mark.parametrize("num_cores", [1, 2, 4, 16])
@pytest.mark.parametrize("name", ["laptop", "colocated", "two-by-two"])
def test_the_profiles_that_come_with_headrace_run_on_any_machine(name: str, num_cores: int) -> None:
    result = plan(find_profile(name), [machine(num_cores)])
    assert sum(worker.ray_cpus for worker in result.workers) <= num_cores


@pytest.mark.parametrize(
    ("num_gpus", "each", "precision"),
    [(0, 0, "float32"), (1, 0, "float32"), (2, 1, "bfloat16"), (8, 1, "bfloat16")],
)
def test_gpus_are_used_where_every_worker_can_have_one(num_gpus: int, each: int, precision: str) -> None:
    result = planned("prefill: {}\ndecode: {}\n", machine(16, num_gpus))
    assert [worker.gpus for worker in result.workers] == [each, each]
    assert result.precision == precision
    assert {worker.device for worker in result.workers} == {"cuda" if each else "cpu"}


def test_gpus_that_are_not_there_name_the_place() -> None:
    sections = "prefill: {resources: {gpus: 1}}\ndecode: {resources: {gpus: 1}}\n"
    (problem,) = problems_of(sections, machine(4, 1))
    assert problem.path == ("decode", "resources", "gpus")
    assert problem.place == Place(5, 28)
    assert problem.message == "2 GPUs wanted in all, 1 here"


def test_prefill_on_gpus_and_decode_on_cpus_cannot_pair() -> None:
    sections = "prefill: {resources: {gpus: 1}}\ndecode: {resources: {gpus: 0}}\n"
    (problem,) = problems_of(sections, machine(4, 2))
    assert problem.path == ("decode", "resources", "gpus")
    assert "arithmetic differs" in problem.expected


def test_more_cores_than_the_machine_has_name_the_place() -> None:
    (problem,) = problems_of("prefill: {resources: {cpus: 4}}\ndecode: {}\n", machine(2))
    assert problem.place == Place(4, 29)
    assert problem.message == "4 cores wanted by each worker; vm has 2 cores"


def test_more_workers_than_cores_name_what_was_wanted() -> None:
    (problem,) = problems_of("prefill: {replicas: 3, resources: {cpus: 1}}\ndecode: {}\n", machine(2))
    assert problem.path == ("prefill", "resources", "cpus")
    assert problem.message == (
        "room for 2 of 3 workers; wanted prefill: 3 × 1, decode: 1 × a share; 2 cores here"
    )


def test_more_memory_than_the_machine_has_names_the_place() -> None:
    model = ModelFacts(weights_bytes=GIB)
    (problem,) = problems_of("prefill: {}\ndecode: {kv_memory: 40GiB}\n", machine(2), model=model)
    assert problem.path == ("decode", "kv_memory")
    assert problem.message == "2 workers on vm want 44.2GiB of KV blocks and weights, it has 24.0GiB"


SMOLLM2 = ModelFacts(
    weights_bytes=538 << 20,
    max_context=8192,
    config=ModelConfig.parse(
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
        }
    ),
)


def test_less_memory_than_one_context_takes_says_how_much_is_needed() -> None:
    (problem,) = problems_of("prefill: {}\ndecode: {kv_memory: 256MiB}\n", machine(2), model=SMOLLM2)
    assert problem.path == ("decode", "kv_memory")
    assert problem.message == "256MiB is less than one context of 8192 tokens"
    assert problem.expected == "at least 384MiB, or a smaller model.max_context"


def test_the_memory_that_is_left_out_holds_one_context_on_a_small_machine() -> None:
    small = dataclasses.replace(machine(2), memory_bytes=2 * GIB)
    result = planned("prefill: {}\ndecode: {}\n", small, model=SMOLLM2)
    assert [worker.kv_bytes for worker in result.workers] == [384 << 20, 384 << 20]


def test_more_memory_than_a_gpu_has_names_the_place() -> None:
    sections = "prefill: {resources: {gpus: 1}}\ndecode: {resources: {gpus: 1}, kv_memory: 81GiB}\n"
    (problem,) = problems_of(sections, machine(4, 2))
    assert problem.path == ("decode", "kv_memory")


def test_fp8_is_for_gpus() -> None:
    head = HEAD.replace("tiny}", "tiny, precision: fp8}")
    sections = "prefill: {resources: {gpus: 1}}\ndecode: {resources: {gpus: 1}}\n"
    result = plan(parse_profile(head + sections, "p.yaml"), [machine(4, 2)])
    assert (result.precision, result.kv_dtype) == ("fp8", "bfloat16")
    with pytest.raises(ProfileError, match="fp8 runs on GPUs"):
        plan(parse_profile(head + "colocated: {}\n", "p.yaml"), [machine(2)])


def test_int8_keeps_its_cache_in_bfloat16_and_is_for_the_cpu() -> None:
    sections = "prefill: {resources: {gpus: 1}}\ndecode: {resources: {gpus: 1}}\n"
    head = HEAD.replace("tiny}", "tiny, precision: int8}")
    result = plan(parse_profile(head + "colocated: {}\n", "p.yaml"), [machine(2)])
    assert (result.precision, result.kv_dtype) == ("int8", "bfloat16")
    with pytest.raises(ProfileError, match="int8 runs on CPUs"):
        plan(parse_profile(head + sections, "p.yaml"), [machine(4, 2)])


def test_a_context_longer_than_the_model_s_is_refused() -> None:
    loaded = parse_profile(HEAD.replace("tiny}", "tiny, max_context: 9000}") + "colocated: {}\n", "p.yaml")
    with pytest.raises(ProfileError, match="at most 8192"):
        plan(loaded, [machine(2)], ModelFacts(max_context=8192))


@pytest.mark.parametrize(("model_context", "expected"), [(0, 8192), (2048, 2048), (131072, 8192)])
def test_the_context_that_is_left_out_is_the_model_s_within_reason(model_context: int, expected: int) -> None:
    assert planned("colocated: {}\n", model=ModelFacts(max_context=model_context)).max_context == expected


def test_workers_spread_over_nodes_of_their_type() -> None:
    nodes = (
        machine(2, name="a", types=""),
        machine(8, name="b", types="big"),
        machine(8, name="c", types="big"),
    )
    sections = (
        "prefill: {replicas: 2, node_type: big}\ndecode: {node_type: big}\nrouter: {grpc: '0.0.0.0:1'}\n"
    )
    result = planned(sections, *nodes)
    assert [worker.node.name for worker in result.workers[:2]] == ["b", "c"]
    assert result.routers[0].node.name == "a"


def test_a_node_type_that_nobody_has_names_the_nearest() -> None:
    (problem,) = problems_of(
        "prefill: {node_type: prefil}\ndecode: {}\n", machine(4, name="a", types="prefill decode")
    )
    assert (problem.path, problem.nearest) == (("prefill", "node_type"), "prefill")


def test_a_node_type_means_nothing_on_one_machine() -> None:
    assert len(planned("prefill: {node_type: p}\ndecode: {node_type: d}\n").workers) == 2


def test_a_router_on_loopback_cannot_serve_other_machines() -> None:
    nodes = (machine(1, name="a", types=""), machine(8, name="b", types="big"))
    (problem,) = problems_of("colocated: {node_type: big}\n", *nodes)
    assert problem.path == ("router", "grpc")
    assert "0.0.0.0:8460" in problem.expected


def test_answering_workers_are_told_of_guesses_waiting_and_room() -> None:
    sections = "prefill: {}\ndecode: {max_drafts: 0, set_aside_memory: 1GiB}\nrouter: {slo: {itl: 50ms}}\n"
    loaded = parse_profile(HEAD + sections, "p.yaml")
    result = plan(loaded, [machine(2)])
    wiring = Wiring(loaded.profile, result, "tiny", "tiny", b"s" * 32)
    prefill, decode = (wiring.worker_config(worker) for worker in result.workers)
    assert (decode.max_drafts, decode.set_aside_bytes, decode.itl_s) == (0, GIB, 0.05)
    assert (prefill.max_drafts, prefill.set_aside_bytes) == (0, 0)
    (alone,) = planned("colocated: {kv_memory: 400MiB}\n").workers
    assert (alone.max_drafts, alone.set_aside_bytes) == (8, 100 << 20)


def test_the_router_is_told_its_policy_and_service_level() -> None:
    sections = "colocated: {}\nrouter: {policy: cost, slo: {ttft: 2s, itl: 50ms}}\n"
    loaded = parse_profile(HEAD + sections, "p.yaml")
    wiring = Wiring(loaded.profile, plan(loaded, [machine(2)]), "tiny", "tiny", b"s" * 32)
    config = wiring.router_config(wiring.plan.routers[0])
    assert (config.policy, config.slo_ttft_s, config.slo_itl_s) == ("cost", 2.0, 0.05)
    assert (config.api_keys, config.tenants) == ({}, {})


@pytest.mark.parametrize(("streaming", "port"), [("relay", None), ("direct", 0)])
def test_where_tokens_come_from_workers_the_workers_listen_for_clients(
    streaming: str, port: int | None
) -> None:
    sections = f"prefill: {{}}\ndecode: {{}}\nrouter: {{streaming: {streaming}}}\n"
    loaded = parse_profile(HEAD + sections, "p.yaml")
    wiring = Wiring(loaded.profile, plan(loaded, [machine(2)]), "tiny", "tiny", b"s" * 32)
    assert wiring.router_config(wiring.plan.routers[0]).streaming == streaming
    assert {wiring.worker_config(worker).direct_port for worker in wiring.plan.workers} == {port}


TIERS = "kvtransfer: {tiers: {host: 1GiB, disk: {path: kv, size: 8GiB}, tenant_share: 0.5}}\n"


def test_every_machine_with_workers_has_one_store() -> None:
    nodes = (machine(2, name="a"), machine(2, name="b"), machine(0, name="c"))
    sections = "prefill: {replicas: 2, resources: {cpus: 1}}\ndecode: {replicas: 2, resources: {cpus: 1}}\n"
    router = 'router: {grpc: "0.0.0.0:8460"}\n'
    stores = planned(sections + router + TIERS, *nodes).stores
    assert [(store.store_id, store.node.name) for store in stores] == [("store-0", "a"), ("store-1", "b")]
    assert stores[0].host_bytes == 1 << 30
    assert (stores[0].disk_path, stores[0].disk_bytes, stores[0].tenant_share) == ("kv", 8 << 30, 0.5)
    assert planned(sections + router, *nodes).stores == ()


def test_the_host_tier_counts_against_the_machine_s_memory() -> None:
    sections = "colocated: {kv_memory: 2GiB}\nkvtransfer: {tiers: {host: 1000GiB}}\n"
    (problem,) = problems_of(sections)
    assert problem.path == ("colocated", "kv_memory") and "the host tier" in problem.message


def test_a_worker_computes_with_as_many_threads_as_it_has_cores() -> None:
    assert environment(planned("colocated: {}\n").workers[0])["OMP_NUM_THREADS"] == "2"


def test_show_prints_a_profile_that_plans_to_the_same() -> None:
    loaded = find_profile("laptop")
    first = plan(loaded, [machine(4)])
    text = render(explain(loaded, first))
    again = parse_profile(text, "shown.yaml")
    assert plan(again, [machine(4)]).workers == first.workers


def test_show_says_where_each_value_came_from() -> None:
    loaded = parse_profile(HEAD + "colocated:\n  chunk: 64\n", "p.yaml")
    sources = {each.path: each.source for each in explain(loaded, plan(loaded, [machine(2)]))}
    assert sources["colocated", "chunk"] == "p.yaml:5"
    assert sources["colocated", "max_sequences"] == "default"
    assert sources["colocated", "resources", "cpus"] == "derived: of 2 cores"
    assert sources["model", "precision"] == "derived: auto, on cpu"


def test_every_process_is_told_what_the_plan_says() -> None:
    loaded = parse_profile(HEAD + "prefill: {chunk: 64}\ndecode: {kv_memory: 1GiB}\n", "p.yaml")
    result = plan(loaded, [machine(2)], ModelFacts(max_context=2048))
    wiring = Wiring(loaded.profile, result, "tiny", "tiny", bytes(32))
    prefill, decode = (wiring.worker_config(worker) for worker in result.workers)
    assert (prefill.chunk_tokens, prefill.cpus, prefill.routers) == (64, (0,), ("127.0.0.1:8460",))
    assert (decode.kv_bytes, decode.cpus, decode.service_cpus) == (GIB, (1,), (0,))
    router = wiring.router_config(result.routers[0])
    assert (router.listen, router.max_context, router.model_name) == ("127.0.0.1:8460", 2048, "tiny")


def test_a_router_on_every_interface_is_reached_at_its_node() -> None:
    loaded = parse_profile(HEAD + "colocated: {}\nrouter: {grpc: '0.0.0.0:9'}\n", "p.yaml")
    result = plan(loaded, [machine(2, name="10.0.0.7")])
    assert Wiring(loaded.profile, result, "tiny", "tiny", bytes(32)).router_addresses == ("10.0.0.7:9",)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, Sequence[Node]]:
    nodes = [
        dataclasses.replace(
            machine(draw(st.sampled_from([0, 1, 2, 4, 16])), draw(st.integers(0, 8))), address=name
        )
        for name in ("a", "b", "c")[: draw(st.integers(1, 3))]
    ]
    sections = [
        f"{name}: {{replicas: {draw(st.integers(1, 4))}, resources: "
        f"{{cpus: {draw(st.sampled_from(['null', 1, 2, 8]))}, gpus: {draw(st.sampled_from(['null', 0, 1]))}}}}}\n"
        for name in draw(
            st.sampled_from([("prefill", "decode"), ("colocated",), ("prefill", "decode", "colocated")])
        )
    ]
    return HEAD + "".join(sections) + "router: {grpc: '0.0.0.0:1'}\n", nodes


@given(shapes())
@settings(deadline=None, max_examples=300)
def test_any_profile_on_any_machines_gives_a_plan_that_fits_or_problems(
    shape: tuple[str, Sequence[Node]],
) -> None:
    text, nodes = shape
    loaded = parse_profile(text, "p.yaml")
    try:
        result = plan(loaded, nodes)
    except ProfileError as error:
        assert error.problems and all(problem.place is not None for problem in error.problems)
        return
    assert len(result.workers) == sum(group.replicas for _, group in loaded.profile.groups())
    assert len({worker.worker_id for worker in result.workers}) == len(result.workers)
    for node in nodes:
        here = [worker for worker in result.workers if worker.node == node]
        assert sum(worker.ray_cpus for worker in here) <= len(node.cores)
        assert sum(worker.gpus for worker in here) <= len(node.gpu_memory_bytes)
        assert all(set(worker.cpus) <= set(node.cores) for worker in here)


def test_router_replicas_listen_on_one_port_after_the_other_and_workers_know_them_all() -> None:
    sections = "colocated: {}\nrouter: {grpc: '127.0.0.1:9000', replicas: 2}\n"
    loaded = parse_profile(HEAD + sections, "p.yaml")
    result = plan(loaded, [machine(2)])
    wiring = Wiring(loaded.profile, result, "tiny", "tiny", bytes(32))
    assert wiring.router_addresses == ("127.0.0.1:9000", "127.0.0.1:9001")
    assert [router.name for router in result.routers] == ["router", "router-1"]
    assert {wiring.worker_config(worker).routers for worker in result.workers} == {wiring.router_addresses}
    configs = [wiring.router_config(router) for router in result.routers]
    assert [(config.router_id, config.listen) for config in configs] == [
        ("router", "127.0.0.1:9000"),
        ("router-1", "127.0.0.1:9001"),
    ]
