"""Which cores engines get: shapes from one core to many."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cores import CoreDemand, CoreDivision, divide
from worker.config import WorkerRole

pytestmark = pytest.mark.unit

P, D, B = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH
ONE_EACH = (CoreDemand("p", P), CoreDemand("d", D))
TWO_EACH = (CoreDemand("p0", P), CoreDemand("p1", P), CoreDemand("d0", D), CoreDemand("d1", D))


@pytest.mark.parametrize(
    ("num_cores", "prefill", "decode", "service"),
    [
        (1, (0,), (0,), (0,)),
        (2, (0,), (1,), (0,)),
        (4, (1, 2), (3,), (0,)),
        (16, tuple(range(1, 11)), tuple(range(11, 16)), (0,)),
    ],
)
def test_one_prefill_and_one_decode_worker(
    num_cores: int, prefill: tuple[int, ...], decode: tuple[int, ...], service: tuple[int, ...]
) -> None:
    division = divide(range(num_cores), ONE_EACH)
    assert division.engines == {"p": prefill, "d": decode}
    assert division.service == service


@pytest.mark.parametrize(
    ("num_cores", "engine", "service"),
    [(1, (0,), (0,)), (2, (0, 1), (0, 1)), (4, (1, 2, 3), (0,)), (16, tuple(range(1, 16)), (0,))],
)
def test_a_colocated_worker_gets_the_machine(
    num_cores: int, engine: tuple[int, ...], service: tuple[int, ...]
) -> None:
    division = divide(range(num_cores), [CoreDemand("c", B)])
    assert division.engines == {"c": engine}
    assert division.service == service


def test_four_workers_on_two_cores_share_by_role() -> None:
    division = divide((0, 1), TWO_EACH)
    assert division.engines == {"p0": (0,), "p1": (0,), "d0": (1,), "d1": (1,)}
    assert division.shared == {"p0", "p1", "d0", "d1"}
    assert division.service == (0,)


def test_numbers_that_are_asked_for_are_given() -> None:
    demands = [CoreDemand("p", P, 5), CoreDemand("d", D, 2)]
    division = divide(range(8), demands)
    assert division.engines == {"d": (6, 7), "p": (1, 2, 3, 4, 5)}
    assert division.service == (0,)


def test_neighbours_in_the_list_stay_together() -> None:
    division = divide((0, 4, 1, 5, 2, 6, 3, 7), [CoreDemand("p", P, 4), CoreDemand("d", D, 2)])
    assert division.engines == {"d": (3, 7), "p": (1, 5, 2, 6)}


@pytest.mark.parametrize("cores", [(), (0, 1)])
def test_more_than_there_is_is_refused(cores: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 cores wanted"):
        divide(cores, [CoreDemand("p", P, 3)])


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[int], list[CoreDemand]]:
    num_cores = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 64]))
    roles = draw(st.lists(st.sampled_from([P, D, B]), min_size=1, max_size=12))
    left, demands = num_cores, []
    for index, role in enumerate(roles):
        wanted = draw(st.none() | st.integers(1, left)) if left else None
        left -= wanted or 0
        demands.append(CoreDemand(f"w{index}", role, wanted))
    return list(range(num_cores)), demands


@given(machines())
@settings(deadline=None, max_examples=300)
def test_any_division_keeps_the_rules(machine: tuple[list[int], list[CoreDemand]]) -> None:
    cores, demands = machine
    division = divide(cores, demands)
    assert division.engines.keys() == {demand.worker_id for demand in demands}
    assert all(engine and set(engine) <= set(cores) for engine in division.engines.values())
    assert division.service and set(division.service) <= set(cores)
    for demand in demands:
        assert demand.num_cpus is None or len(division.engines[demand.worker_id]) == demand.num_cpus
    check_sharing(cores, demands, division)
    check_service(cores, demands, division)


def check_sharing(cores: list[int], demands: list[CoreDemand], division: CoreDivision) -> None:
    """Engines share cores only where there are more engines than cores."""
    needed = sum(demand.num_cpus or 1 for demand in demands)
    if needed <= len(cores):
        assert not division.shared
        used = [cpu for engine in division.engines.values() for cpu in engine]
        assert len(used) == len(set(used))
    open_roles = {demand.role.decodes for demand in demands if demand.num_cpus is None}
    explicit = sum(demand.num_cpus or 0 for demand in demands)
    if open_roles == {True, False} and len(cores) - explicit >= 2:
        decoding = {cpu for each in demands if each.role.decodes for cpu in division.engines[each.worker_id]}
        prefilling = {
            cpu for each in demands if not each.role.decodes for cpu in division.engines[each.worker_id]
        }
        assert not decoding & prefilling


def check_service(cores: list[int], demands: list[CoreDemand], division: CoreDivision) -> None:
    """Everything else is off the decode cores wherever another core is left, and off all engines if it can be."""
    decoding = {cpu for each in demands if each.role.decodes for cpu in division.engines[each.worker_id]}
    if decoding != set(cores):
        assert not decoding & set(division.service)
    free = set(cores) - {cpu for engine in division.engines.values() for cpu in engine}
    if free:
        assert set(division.service) == free
