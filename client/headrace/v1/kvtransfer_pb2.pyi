from headrace.v1 import inference_pb2 as _inference_pb2
from headrace.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_STATE_UNSPECIFIED: _ClassVar[LeaseState]
    LEASE_STATE_GRANTED: _ClassVar[LeaseState]
    LEASE_STATE_FILLING: _ClassVar[LeaseState]
    LEASE_STATE_COMMITTED: _ClassVar[LeaseState]
    LEASE_STATE_RELEASED: _ClassVar[LeaseState]
    LEASE_STATE_ABORTED: _ClassVar[LeaseState]
    LEASE_STATE_EXPIRED: _ClassVar[LeaseState]
LEASE_STATE_UNSPECIFIED: LeaseState
LEASE_STATE_GRANTED: LeaseState
LEASE_STATE_FILLING: LeaseState
LEASE_STATE_COMMITTED: LeaseState
LEASE_STATE_RELEASED: LeaseState
LEASE_STATE_ABORTED: LeaseState
LEASE_STATE_EXPIRED: LeaseState

class LeaseRef(_message.Message):
    __slots__ = ("lease_id", "attempt", "sender_epoch", "receiver_epoch")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SENDER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    attempt: int
    sender_epoch: int
    receiver_epoch: int
    def __init__(self, lease_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., sender_epoch: _Optional[int] = ..., receiver_epoch: _Optional[int] = ...) -> None: ...

class ManifestEntry(_message.Message):
    __slots__ = ("frame", "raw_bytes", "checksum")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    frame: int
    raw_bytes: int
    checksum: int
    def __init__(self, frame: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("key", "num_tokens", "first_tokens", "codec", "handoff_major", "layout", "sampler_state", "penalty_boundary", "codec_reason", "drafting", "identity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_MAJOR_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_STATE_FIELD_NUMBER: _ClassVar[int]
    PENALTY_BOUNDARY_FIELD_NUMBER: _ClassVar[int]
    CODEC_REASON_FIELD_NUMBER: _ClassVar[int]
    DRAFTING_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    key: _worker_pb2.RequestKey
    num_tokens: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    codec: str
    handoff_major: int
    layout: str
    sampler_state: bytes
    penalty_boundary: int
    codec_reason: str
    drafting: Drafting
    identity: str
    def __init__(self, key: _Optional[_Union[_worker_pb2.RequestKey, _Mapping]] = ..., num_tokens: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., codec: _Optional[str] = ..., handoff_major: _Optional[int] = ..., layout: _Optional[str] = ..., sampler_state: _Optional[bytes] = ..., penalty_boundary: _Optional[int] = ..., codec_reason: _Optional[str] = ..., drafting: _Optional[_Union[Drafting, _Mapping]] = ..., identity: _Optional[str] = ...) -> None: ...

class Drafting(_message.Message):
    __slots__ = ("follows", "hits", "misses")
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    follows: int
    hits: float
    misses: float
    def __init__(self, follows: _Optional[int] = ..., hits: _Optional[float] = ..., misses: _Optional[float] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("choice", "token_id", "logprobs", "finished")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    choice: int
    token_id: int
    logprobs: _inference_pb2.TokenLogprobs
    finished: _inference_pb2.FinishReason
    def __init__(self, choice: _Optional[int] = ..., token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.TokenLogprobs, _Mapping]] = ..., finished: _Optional[_Union[_inference_pb2.FinishReason, str]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("lease", "manifest", "handoff", "remaining_s")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    manifest: _containers.RepeatedCompositeFieldContainer[ManifestEntry]
    handoff: Handoff
    remaining_s: float
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., manifest: _Optional[_Iterable[_Union[ManifestEntry, _Mapping]]] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ..., remaining_s: _Optional[float] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("state", "reason", "missing_frames")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MISSING_FRAMES_FIELD_NUMBER: _ClassVar[int]
    state: LeaseState
    reason: str
    missing_frames: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, state: _Optional[_Union[LeaseState, str]] = ..., reason: _Optional[str] = ..., missing_frames: _Optional[_Iterable[int]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("lease", "cause")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    cause: str
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., cause: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: LeaseState
    def __init__(self, state: _Optional[_Union[LeaseState, str]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("state", "ttl_s")
    STATE_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    state: LeaseState
    ttl_s: float
    def __init__(self, state: _Optional[_Union[LeaseState, str]] = ..., ttl_s: _Optional[float] = ...) -> None: ...
