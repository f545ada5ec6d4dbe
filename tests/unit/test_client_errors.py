"""The error tree: what its docstring draws is what is there."""

import pickle
import re

import grpc
import pytest

import headrace
from headrace import _errors
from headrace._errors import ERROR_CLASSES, HeadraceError, InternalError, error_class

pytestmark = pytest.mark.unit

CLASSES = [
    kind for kind in vars(_errors).values() if isinstance(kind, type) and issubclass(kind, HeadraceError)
]


def test_every_class_is_public_and_drawn_in_the_tree() -> None:
    tree = _errors.__doc__.split("gRPC status")[0]
    drawn = set(re.findall(r"(?:├──|└──|^    )\s*([A-Z]\w+)", tree, re.MULTILINE))
    assert drawn == {kind.__name__ for kind in CLASSES} <= set(headrace.__all__)


def test_the_table_of_statuses_in_the_docstring_is_the_one_in_force() -> None:
    table = _errors.__doc__.split("gRPC status → class:")[1]
    documented = {}
    for codes, name in re.findall(r"^    ([A-Z_, ]+?)(?:, others)?\s+([A-Z][a-z]\w+)$", table, re.MULTILINE):
        documented |= dict.fromkeys(codes.split(", "), name)
    in_force = {code: kind.__name__ for code, kind in ERROR_CLASSES.items()}
    assert {code: name for code, name in documented.items() if name != "InternalError"} == in_force
    assert all(error_class(code).__name__ == name for code, name in documented.items())


def test_every_grpc_status_has_a_class() -> None:
    failures = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
    assert {code.name for code in failures if error_class(code.name) is InternalError} == {
        "INTERNAL",
        "UNKNOWN",
        "UNIMPLEMENTED",
    }


def test_an_unknown_status_is_an_internal_error() -> None:
    assert error_class("SOMETHING_NEW") is InternalError


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (headrace.Unavailable, ConnectionError),
        (headrace.DeadlineExceeded, TimeoutError),
        (headrace.InvalidRequest, ValueError),
        (headrace.AnswerIncomplete, RuntimeError),
    ],
)
def test_errors_that_python_has_a_word_for_can_be_caught_by_it(
    kind: type[HeadraceError], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_tells_what_where_why_and_what_to_do(kind: type[HeadraceError]) -> None:
    error = kind(
        "the decode worker went away",
        request_id="r-1",
        stage="decode",
        cause="WORKER_LOST",
        retryable=True,
        retry_after_s=1.5,
    )
    assert str(error) == (
        "the decode worker went away [stage decode, cause WORKER_LOST, request r-1, retry after 1.5 s]"
    )


def test_an_error_without_facts_is_its_message() -> None:
    assert str(HeadraceError("no")) == "no"


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[HeadraceError]) -> None:
    error = kind(
        "no room", request_id="r-1", stage="queue", cause="FULL", code="X", retry_after_s=2.0, attempt=3
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
