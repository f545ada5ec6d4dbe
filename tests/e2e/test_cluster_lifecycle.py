"""`headrace up` to `headrace down` on a real Ray: what runs, what comes back, what is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import COLOCATED, SPLIT, Home, wait_until

pytestmark = pytest.mark.e2e


def test_both_workers_serve_in_processes_of_their_own(split_cluster: Home) -> None:
    workers = split_cluster.workers()
    assert workers.keys() == {"prefill-0", "decode-0"}
    assert {worker["hello"]["role"] for worker in workers.values()} == {"ROLE_PREFILL", "ROLE_DECODE"}
    assert len({worker["hello"]["pid"] for worker in workers.values()}) == 2
    assert all(worker["hello"]["invariant"] for worker in workers.values())


def test_the_status_names_every_worker(split_cluster: Home) -> None:
    answer = split_cluster.run("status")
    assert answer.returncode == 0
    assert "prefill-0" in answer.stdout and "decode-0" in answer.stdout


def test_an_answer_goes_through_both_workers(split_cluster: Home) -> None:
    answer = split_cluster.run(
        "generate", "the ring of the king", "--temperature", "0", "--max-tokens", "8", "--stages"
    )
    assert answer.returncode == 0
    assert answer.stdout.strip()
    assert "prefill-0" in answer.stderr and "decode-0" in answer.stderr


def test_a_prompt_can_come_from_standard_input_and_answers_repeat(split_cluster: Home) -> None:
    first, second = (split_cluster.generate("the ring of the king") for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == second.stdout


def test_a_bad_request_is_one_line_and_exit_code_2(split_cluster: Home) -> None:
    answer = split_cluster.run("generate", "the king", "--max-tokens", "0")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1


def test_a_second_cluster_is_refused_while_one_is_up(split_cluster: Home) -> None:
    answer = split_cluster.up(COLOCATED)
    assert answer.returncode == 1
    assert "is up at" in answer.stderr and "headrace down" in answer.stderr
    assert split_cluster.workers()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core holds everything")
def test_nothing_but_its_engine_runs_on_the_decode_core(split_cluster: Home) -> None:
    decode = split_cluster.workers()["decode-0"]["hello"]
    engine_cores = set(decode["cpus"])
    local_ray = split_cluster.state().local_ray
    assert local_ray is not None
    on_engine_cores = {
        (process.pid, thread)
        for process in local_ray.processes()
        for thread, cores in thread_cores(process.pid).items()
        if cores & engine_cores
    }
    assert {pid for pid, _ in on_engine_cores} == {int(decode["pid"])}
    assert len(on_engine_cores) == len(engine_cores)


def thread_cores(pid: int) -> dict[int, set[int]]:
    """The cores that each thread of a process may use."""
    threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    return {thread: os.sched_getaffinity(thread) for thread in threads}


def test_a_killed_prefill_worker_comes_back_as_a_new_incarnation(split_cluster: Home) -> None:
    """A decode worker: test_killed_worker.py."""
    expected = split_cluster.generate("the king").stdout
    before = split_cluster.workers()["prefill-0"]["hello"]
    os.kill(int(before["pid"]), signal.SIGKILL)

    def is_back() -> bool:
        worker = split_cluster.workers().get("prefill-0")
        return worker is not None and worker["hello"]["epoch"] != before["epoch"]

    wait_until(is_back, "the prefill worker comes back")
    answer = split_cluster.generate("the king")
    assert (answer.returncode, answer.stdout) == (0, expected)


def test_a_killed_router_comes_back_at_its_address(split_cluster: Home) -> None:
    expected = split_cluster.generate("the king").stdout
    local_ray = split_cluster.state().local_ray
    assert local_ray is not None
    (router,) = [each for each in local_ray.processes() if "RouterActor" in " ".join(each.cmdline())]
    router.kill()
    wait_until(lambda: len(split_cluster.workers()) == 2, "the workers find the new router")
    assert split_cluster.generate("the king").stdout == expected


def test_down_leaves_nothing(home: Home) -> None:
    started = home.up(COLOCATED)
    assert started.returncode == 0, started.stderr
    assert home.generate("the king").returncode == 0
    local_ray = home.state().local_ray
    assert local_ray is not None and local_ray.processes()
    assert home.run("down").returncode == 0
    assert not local_ray.processes()
    assert not Path(local_ray.temp_dir).exists()
    assert home.run("status").returncode == 1


def test_a_worker_that_cannot_start_is_named_and_nothing_is_left(home: Home) -> None:
    weights = home.path / "models" / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    answer = home.up(SPLIT)
    assert answer.returncode == 1
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "0 did not start: " in errors[0] and "model.safetensors" in errors[0]
    assert not (home.path / "run" / "cluster.json").exists()


def test_impossible_resources_are_refused_before_anything_starts(home: Home) -> None:
    answer = home.up(SPLIT.replace("decode: {", "decode: {resources: {cpus: 1000}, "))
    assert answer.returncode == 2
    assert "profile.yaml:6:28: decode.resources.cpus: 1000 cores wanted by each worker" in answer.stderr
    assert not (home.path / "run" / "cluster.json").exists()


def test_a_port_that_is_taken_is_refused_before_anything_starts(home: Home) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = home.up(SPLIT.replace(":0'", f":{port}'"))
    assert answer.returncode == 2
    assert "router.grpc: cannot listen on" in answer.stderr


def test_json_status_is_one_object(split_cluster: Home) -> None:
    status = json.loads(split_cluster.run("status", "--json").stdout)
    assert status["profile"] == "tiny"
    assert status["router_address"] == split_cluster.state().router_address


def test_a_cluster_whose_ray_died_is_noticed_and_cleared_away(split_cluster: Home) -> None:
    """The last of this module: it ends the cluster that the others share."""
    local_ray = split_cluster.state().local_ray
    assert local_ray is not None
    (raylet,) = [process for process in local_ray.processes() if process.name() == "raylet"]
    raylet.kill()
    wait_until(lambda: not local_ray.is_running(), "the rest of Ray ends with its raylet")
    answer = split_cluster.run("status")
    assert answer.returncode == 1
    assert "has ended without" in answer.stderr
    assert split_cluster.run("down").returncode == 0
    assert not local_ray.processes()
