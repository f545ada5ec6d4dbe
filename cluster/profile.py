"""What a profile may say: its shape, vocabulary and defaults. Pure; knows no machine, no Ray and no torch.

A profile is one YAML file. `parse_profile` reports everything that is wrong with it at once, each with
its place. What a profile leaves out is None here and is settled by `cluster.plan` for the machine at hand.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from cluster import units, yaml_places
from cluster.problems import KeyPath, Place, Problem, ProfileError
from cluster.profile_errors import problems_from
from router.auth import is_key_digest
from router.core.placement import POLICIES
from router.core.tenants import MAX_PRIORITY, MAX_WEIGHT

VERSION = 1
MAX_FILE_BYTES = 256 * 1024
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


def _size(value: object) -> object:
    try:
        return value if value is None else units.parse_size(value)
    except units.UnitError as error:
        raise _unit_error(error) from error


def _duration(value: object) -> object:
    try:
        return value if value is None else units.parse_duration(value)
    except units.UnitError as error:
        raise _unit_error(error) from error


def _unit_error(error: units.UnitError) -> PydanticCustomError:
    facts = {"message": str(error), "expected": error.expected, "nearest": error.nearest or ""}
    return PydanticCustomError("unit", "{message}", facts)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8460` or `[::1]:8460`. Raises ValueError."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f'"{address}" is not host:port')
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(value: object) -> object:
    try:
        if isinstance(value, str):
            split_address(value)
    except ValueError as error:
        facts = {"message": str(error), "expected": 'host:port, such as "127.0.0.1:8460"', "nearest": ""}
        raise PydanticCustomError("address", "{message}", facts) from error
    return value


def _policy(value: object) -> object:
    if isinstance(value, str) and value not in POLICIES:
        raise PydanticCustomError("literal_error", "unknown policy", {"expected": ", ".join(POLICIES)})
    return value


def _key_digest(value: object) -> object:
    if not isinstance(value, str) or not is_key_digest(value):
        # Not shown: it may be the key itself.
        facts = {
            "message": "this is no digest of a key",
            "expected": "sha256: and 64 hexadecimal digits, as `headrace tenants key NAME` prints them",
            "nearest": "",
        }
        raise PydanticCustomError("key_digest", "{message}", facts)
    return value


Size = Annotated[
    int,
    BeforeValidator(_size),
    Field(gt=0),
    PlainSerializer(units.format_size, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": units.SIZE_PATTERN, "examples": ["2GiB"]}),
]
Duration = Annotated[
    float,
    BeforeValidator(_duration),
    Field(gt=0),
    PlainSerializer(units.format_duration, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": units.DURATION_PATTERN, "examples": ["100ms"]}),
]
Address = Annotated[str, BeforeValidator(_address)]
Policy = Annotated[str, BeforeValidator(_policy), WithJsonSchema({"type": "string", "enum": list(POLICIES)})]
KeyDigest = Annotated[
    str,
    BeforeValidator(_key_digest),
    WithJsonSchema({"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}),
]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Section(BaseModel):
    """A part of a profile: unknown keys are errors, values are what they say, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    """The model that the cluster serves."""

    path: Annotated[str, Field(min_length=1)]
    """A prepared model: a name in the store, or a directory (relative to the profile's file)."""
    precision: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    """Of the linear layers. auto: float32 on CPUs, bfloat16 on GPUs."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """Of the KV cache. auto: bfloat16 with bfloat16 or int8 weights, else float32."""
    max_context: Annotated[int, Field(ge=64, le=1 << 20)] | None = None
    """Tokens of prompt and answer together. Left out: what the model was made for, at most 8192."""


class Resources(Section):
    """What each worker of a section gets."""

    cpus: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Cores of the engine. Left out: a share of the machine's."""
    gpus: Annotated[int, Field(ge=0, le=1)] | None = None
    """GPUs of the engine, 0 or 1. Left out: 1 where every worker can have one, else 0."""


class Workers(Section):
    """A group of equal workers."""

    replicas: Annotated[int, Field(ge=1, le=256)] = 1
    """How many."""
    resources: Resources = Resources()
    node_type: Annotated[str, Field(min_length=1)] | None = None
    """On a Ray cluster: only nodes whose label `ray.io/node-group` or `headrace/node-type` is this."""
    chunk: Annotated[int, Field(ge=16, le=16384)]
    """Prompt tokens in one engine step."""
    max_sequences: Annotated[int, Field(ge=1, le=4096)]
    """Sequences that run at the same time."""
    kv_memory: Size | None = None
    """Of KV blocks, for each worker. Left out: a share of the machine's memory."""


class Prefill(Workers):
    """Workers that read prompts."""

    chunk: Annotated[int, Field(ge=16, le=16384)] = 512
    max_sequences: Annotated[int, Field(ge=1, le=4096)] = 16


class Answering(Workers):
    """Workers that write answers."""

    max_sequences: Annotated[int, Field(ge=1, le=4096)] = 64
    max_drafts: Annotated[int, Field(ge=0, le=64)] = 8
    """Guesses at an answer's next tokens in one step, made where they pay; 0: none. They never change an answer."""
    set_aside_memory: Size | None = None
    """Of answers that had to give way, so that they need not be computed again; beside `kv_memory`, taken when
    needed. Left out: a quarter of that, at most 256MiB."""


class Decode(Answering):
    """Workers that write answers."""

    chunk: Annotated[int, Field(ge=16, le=16384)] = 128


class Colocated(Answering):
    """Workers that do both, each for its own requests."""

    chunk: Annotated[int, Field(ge=16, le=16384)] = 256


class Disk(Section):
    """A cache tier on a file system, best on NVMe. It outlives the cluster."""

    path: Annotated[str, Field(min_length=1)]
    """A directory on every node that has workers; a relative one lies in HEADRACE_HOME."""
    size: Size


class Tiers(Section):
    """Where cached prefixes go beside the workers' own memory, node by node."""

    host: Size
    """Of the node's memory, shared by its workers."""
    disk: Disk | None = None
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of every tier that one tenant may fill."""


class KvTransfer(Section):
    """How KV blocks travel, and what of them is kept."""

    fidelity: Literal["exact", "near", "compact"] = "exact"
    """The worst class of codec that may touch a request's KV."""
    codec: Literal["auto", "raw", "split", "int8", "fp8", "ecsq", "int4"] = "auto"
    """auto: what is predicted to land first within `fidelity`."""
    lease_ttl: Duration = 10.0
    """A lease expires this long after its last push or renewal."""
    tiers: Tiers | None = None
    windows: Literal["ends", "full", "periodic", "zero"] = "ends"
    """Of models with windows (DeepSeek-V4), where in a sequence they are kept, so that a cached prefix can be gone on
    from. ends: where prompts and answers end, and where a prompt parts from another; full: at every block; periodic:
    every `windows_period`; zero: nowhere, the last window times layers tokens are computed again."""
    windows_period: Annotated[int, Field(ge=128, le=1 << 20, multiple_of=128)] = 4096
    """Tokens between windows that are kept."""


class Slo(Section):
    """Service level: what a request should see."""

    ttft: Duration | None = None
    """Time to first token; requests that are predicted to miss it because of load are refused at once."""
    itl: Duration | None = None
    """Inter-token latency: where prompts are computed beside answers, their chunks are cut to it."""


class Tenant(Section):
    """Somebody who calls with API keys of their own."""

    keys: Annotated[list[KeyDigest], Field(min_length=1)]
    """Digests of its API keys, as `headrace tenants key NAME` prints them; the keys themselves stand nowhere."""
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] = 1.0
    """Its share of the cluster, to that of others, while more is asked for than can be served."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests at a time, waiting ones too. Left out: any number."""
    tokens_per_s: Annotated[int, Field(ge=1)] | None = None
    """Tokens per second, of prompts and answers. Left out: any rate."""
    burst: Annotated[int, Field(ge=1)] | None = None
    """Tokens by which it may exceed that rate for a moment. Left out: what the rate allows in 10 s."""
    max_priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0
    """The highest priority that its requests may have; a higher one is served first."""


class Router(Section):
    """The front door."""

    grpc: Address = "127.0.0.1:8460"
    """Where it listens; port 0 takes a free one."""
    replicas: Annotated[int, Field(ge=1, le=16)] = 1
    """How many; the second one listens on the port after the first one's, and so on."""
    policy: Policy = "cost"
    """How workers are chosen."""
    streaming: Literal["relay", "direct"] = "relay"
    """How tokens reach clients. relay: through the router. direct: from the worker that writes them, where the client
    can do that and reaches it, else through the router; each decode worker then listens for clients."""
    slo: Slo | None = None
    queue: Annotated[int, Field(ge=1, le=1 << 32)] = 65536
    """Prompt tokens that may wait; beyond it requests are refused at once."""
    tenants: Annotated[dict[Name, Tenant], Field(min_length=1)] | None = None
    """Who may call, by name. Left out: everybody, without a key, as the tenant `default`."""
    timeout: Annotated[Duration, Field(le=86400)] = 600.0
    """Of a request that brings no deadline."""
    resume_grace: Duration = 10.0
    """A resumable request outlives its lost connection by this long."""


class Profile(Section):
    """A Headrace cluster: `prefill` and `decode` workers, or `colocated` ones, or all three."""

    version: Literal[1]
    name: Name
    about: str = ""
    model: Model
    prefill: Prefill | None = None
    decode: Decode | None = None
    colocated: Colocated | None = None
    kvtransfer: KvTransfer = KvTransfer()
    router: Router = Router()

    def groups(self) -> Iterator[tuple[str, Workers]]:
        """The worker sections that the profile has, by name."""
        for name, group in (
            ("prefill", self.prefill),
            ("decode", self.decode),
            ("colocated", self.colocated),
        ):
            if group is not None:
                yield name, group


@dataclass(frozen=True, slots=True)
class LoadedProfile:
    """A profile and the file it came from."""

    profile: Profile
    document: yaml_places.Document

    @property
    def file(self) -> str:
        """The file as the user named it."""
        return self.document.file

    def says(self, path: KeyPath) -> bool:
        """Whether the file itself gives this value."""
        return path in self.document.values

    def problem(self, path: KeyPath, message: str, expected: str = "", nearest: str = "") -> Problem:
        """A problem at the place of `path`, or of the nearest enclosing value that the file has."""
        place = self.document.place_of(path)
        return Problem(
            file=self.file, place=place, path=path, message=message, expected=expected, nearest=nearest
        )


def load_profile(path: Path) -> LoadedProfile:
    """Read and check a profile.

    Raises ProfileError with every problem, also for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {units.format_size(MAX_FILE_BYTES)}")
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problem = Problem(file=str(path), place=None, path=(), message=f"cannot be read: {reason}")
        raise ProfileError([problem]) from error
    return parse_profile(text, str(path))


def parse_profile(text: str, file: str) -> LoadedProfile:
    """Check the text of a profile. Raises ProfileError with every problem."""
    document = yaml_places.read(text, file)
    problems = list(document.problems)
    profile: Profile | None = None
    try:
        profile = Profile.model_validate(document.value)
    except ValidationError as error:
        problems += problems_from(error, document, Profile)
    if profile is not None:
        problems += _missing_roles(profile, document)
        problems += _tenant_problems(profile, document)
    if profile is None or problems:
        raise ProfileError(problems)
    return LoadedProfile(profile, document)


def _missing_roles(profile: Profile, document: yaml_places.Document) -> Iterator[Problem]:
    """A cluster must be able to prefill and to decode."""
    if profile.colocated is not None or (profile.prefill is not None and profile.decode is not None):
        return
    missing = {"prefill", "decode"} - {name for name, _ in profile.groups()}
    yield Problem(
        file=document.file,
        place=Place(1, 1),
        path=(),
        message=f"nothing can {' or '.join(sorted(missing, reverse=True))}",
        expected="the sections prefill and decode, or colocated",
    )


def _tenant_problems(profile: Profile, document: yaml_places.Document) -> Iterator[Problem]:
    """A key is one tenant's, and a burst is one over a rate."""
    owners: dict[str, str] = {}
    for name, tenant in (profile.router.tenants or {}).items():
        here: KeyPath = ("router", "tenants", name)
        for index, digest in enumerate(tenant.keys):
            owner = owners.setdefault(digest, name)
            if owner != name:
                path = (*here, "keys", index)
                place = document.place_of(path)
                message = f"this is a key of {owner} too; a key belongs to one tenant"
                yield Problem(file=document.file, place=place, path=path, message=message)
        if tenant.burst is not None and tenant.tokens_per_s is None:
            path = (*here, "burst")
            place = document.place_of(path)
            message = "there is no rate that it could exceed"
            expected = "tokens_per_s beside it"
            yield Problem(file=document.file, place=place, path=path, message=message, expected=expected)


def json_schema() -> dict[str, object]:
    """JSON Schema (draft 2020-12) of a profile, for editors."""
    schema = Profile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Headrace profile"}


def canonical(profile: Profile) -> dict[str, object]:
    """The profile as plain values with units, every default filled in."""
    plain: dict[str, object] = json.loads(profile.model_dump_json())
    return plain
