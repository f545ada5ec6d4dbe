"""A YAML document as plain values, with the place of every key and value. Knows no profile.

Reads the safe subset: mappings, sequences and scalars. Duplicate keys are reported, since YAML
libraries silently keep the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import yaml

from cluster.problems import KeyPath, Place, Problem, ProfileError

MAX_NODES = 10_000
"""Bounds what aliases of aliases can unfold to."""


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    Attributes:
        value: dicts, lists and scalars.
        keys: where each key stands.
        values: where each value begins.
        problems: duplicate and non-text keys.
    """

    file: str
    value: object
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place_of(self, path: KeyPath) -> Place:
        """Where the value at `path` is, or the nearest enclosing one that the file has."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.values:
                return self.values[path[:end]]
        return Place(1, 1)

    def key_place(self, path: KeyPath) -> Place:
        """Where the key of `path` is, or the nearest enclosing one that the file has."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.keys:
                return self.keys[path[:end]]
        return Place(1, 1)


def read(text: str, file: str) -> Document:
    """Parse `text`. Raises ProfileError where it is no YAML."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        reader = _Reader(loader, file)
        value = reader.build(root, ()) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
        raise ProfileError([_problem(file, place, (), f"not valid YAML: {error.problem}")]) from error
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ProfileError([_problem(file, Place(1, 1), (), f"not valid YAML: {message}")]) from error
    return Document(file, value, reader.keys, reader.values, reader.problems)


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, file: str) -> None:
        self._loader = loader
        self._file = file
        self._num_nodes = 0
        self.keys: dict[KeyPath, Place] = {}
        self.values: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []

    def build(self, node: yaml.Node, path: KeyPath) -> object:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES or len(path) > 32:
            raise ProfileError(
                [_problem(self._file, _place(node), path[:4], "too large or too deep for a profile")]
            )
        self.values[path] = _place(node)
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return cast(object, self._loader.construct_object(node))

    def _build_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        built: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in built:
                first = self.keys[(*path, key)].line
                self.problems.append(
                    _problem(
                        self._file, _place(key_node), (*path, key), f"given twice; first on line {first}"
                    )
                )
                continue
            self.keys[(*path, key)] = _place(key_node)
            built[key] = self.build(value_node, (*path, key))
        return built

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        key = self._loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, str):
            return key
        self.problems.append(
            _problem(self._file, _place(node), path, "a key must be text", expected="a name")
        )
        return None


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _problem(file: str, place: Place, path: KeyPath, message: str, expected: str = "") -> Problem:
    return Problem(file=file, place=place, path=path, message=message, expected=expected)
