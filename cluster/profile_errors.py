"""Pydantic's findings as Problems: place in the file, what was expected, the nearest valid name. Pure."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from types import UnionType

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.problems import KeyPath, Problem, dotted, nearest_name, one_of
from cluster.yaml_places import Document


def problems_from(error: ValidationError, document: Document, root: type[BaseModel]) -> Iterator[Problem]:
    """One Problem for each thing that pydantic found."""
    for details in error.errors(include_url=False):
        if details["type"] == "extra_forbidden":
            yield _unknown_key(details, document, root)
        elif details["type"] == "missing":
            yield _missing_key(details, document, root)
        else:
            yield _bad_value(details, document)


def _unknown_key(details: ErrorDetails, document: Document, root: type[BaseModel]) -> Problem:
    path = details["loc"]
    name = str(path[-1])
    valid = _keys_at(root, path[:-1])
    nearest = nearest_name(name, valid)
    elsewhere = [] if nearest else _sections_with(root, name)
    message = f'unknown key "{name}"'
    if elsewhere:
        message += f", which belongs under {one_of(elsewhere)}"
    return Problem(
        file=document.file,
        place=document.key_place(path),
        path=path,
        message=message,
        expected=one_of(valid),
        nearest=nearest,
    )


def _missing_key(details: ErrorDetails, document: Document, root: type[BaseModel]) -> Problem:
    path = details["loc"]
    section = _section_at(root, path[:-1])
    about = section.model_fields[str(path[-1])].description if section else None
    return Problem(
        file=document.file,
        place=document.key_place(path[:-1]),
        path=path,
        message="missing",
        expected=(about or "").removesuffix(".").split(". ")[0],
    )


def _bad_value(details: ErrorDetails, document: Document) -> Problem:
    facts = details.get("ctx", {})
    given = details["input"]
    describe = _DESCRIPTIONS.get(details["type"])
    message, expected = describe(given, facts) if describe else (details["msg"], "")
    nearest = str(facts.get("nearest", ""))
    if details["type"] == "literal_error" and isinstance(given, str):
        nearest = nearest_name(given, _literals(facts))
    path, is_key = _without_key_mark(details["loc"])
    return Problem(
        file=document.file,
        place=document.key_place(path) if is_key else document.place_of(path),
        path=path,
        message=message,
        expected=expected,
        nearest=nearest,
    )


def _without_key_mark(path: KeyPath) -> tuple[KeyPath, bool]:
    """Pydantic ends the path of a key that is wrong by itself with a mark."""
    return (path[:-1], True) if path and path[-1] == "[key]" else (path, False)


Facts = typing.Mapping[str, typing.Any]
Description = Callable[[object, Facts], tuple[str, str]]


def _shown(value: object) -> str:
    """A value as it is put in a message: as YAML has it, and not all of it."""
    names = {True: "true", False: "false", None: "nothing"}
    if value is None or isinstance(value, bool):
        return names[value]
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _literals(facts: Facts) -> list[str]:
    """The valid names of pydantic's `'a', 'b' or 'c'`."""
    return [part.strip("' ") for part in str(facts["expected"]).replace(" or ", ", ").split(", ")]


def _is_not(expected: str) -> Description:
    return lambda given, _: (f"{_shown(given)} is not {expected}", "")


def _limit(words: str, key: str) -> Description:
    return lambda given, facts: (f"{_shown(given)} is out of range", f"{words} {facts[key]}")


_DESCRIPTIONS: dict[str, Description] = {
    "literal_error": lambda given, facts: (f"{_shown(given)} is not known", one_of(_literals(facts))),
    "unit": lambda given, facts: (str(facts["message"]), str(facts["expected"])),
    "address": lambda given, facts: (str(facts["message"]), str(facts["expected"])),
    "key_digest": lambda given, facts: (str(facts["message"]), str(facts["expected"])),
    "int_type": _is_not("a whole number"),
    "float_type": _is_not("a number"),
    "string_type": lambda given, _: (
        f"{_shown(given)} is not text",
        "text; quote it if it looks like something else",
    ),
    "bool_type": _is_not("true or false"),
    "model_type": _is_not("a section of keys and values"),
    "dict_type": _is_not("a section of keys and values"),
    "list_type": _is_not("a list"),
    "too_short": lambda given, _: ("must not be empty", ""),
    "string_too_short": lambda given, _: ("must not be empty", ""),
    "string_pattern_mismatch": lambda given, _: (
        f"{_shown(given)} is not a name",
        "up to 63 lower-case letters, digits, dots, dashes and underscores",
    ),
    "greater_than": _limit("more than", "gt"),
    "greater_than_equal": _limit("at least", "ge"),
    "less_than": _limit("less than", "lt"),
    "less_than_equal": _limit("at most", "le"),
}


def _keys_at(root: type[BaseModel], path: KeyPath) -> list[str]:
    section = _section_at(root, path)
    return list(section.model_fields) if section else []


def _section_at(root: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    here: object = root
    for step in path:
        section = _section_of(here)
        if section is not None:
            field = section.model_fields.get(str(step))
            here = field.annotation if field is not None else None
        else:
            here = next(
                (kind.__args__[1] for kind in _members(here) if typing.get_origin(kind) is dict), None
            )
    return _section_of(here)


def _section_of(annotation: object) -> type[BaseModel] | None:
    """The section in `Section` or `Section | None`."""
    members = _members(annotation)
    return next((kind for kind in members if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _members(annotation: object) -> Iterator[typing.Any]:
    """The types in a union, or the one type."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif isinstance(annotation, UnionType) or origin is typing.Union:
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _sections_with(root: type[BaseModel], name: str, path: KeyPath = ()) -> list[str]:
    """Every section that knows `name`, for a key that was put in the wrong one."""
    section = _section_at(root, path)
    if section is None:
        return []
    here = [dotted(path)] if path and name in section.model_fields else []
    deeper = (_sections_with(root, name, (*path, key)) for key in section.model_fields)
    return here + [place for places in deeper for place in places]
