from headrace.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_BOTH: _ClassVar[Role]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_SERVING: _ClassVar[WorkerState]
    WORKER_STATE_NO_NEW: _ClassVar[WorkerState]
    WORKER_STATE_KV_ONLY: _ClassVar[WorkerState]
    WORKER_STATE_GONE: _ClassVar[WorkerState]

class DirectPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECT_PHASE_UNSPECIFIED: _ClassVar[DirectPhase]
    DIRECT_PHASE_OPEN: _ClassVar[DirectPhase]
    DIRECT_PHASE_DELIVERED: _ClassVar[DirectPhase]
    DIRECT_PHASE_BROKEN: _ClassVar[DirectPhase]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_BOTH: Role
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_SERVING: WorkerState
WORKER_STATE_NO_NEW: WorkerState
WORKER_STATE_KV_ONLY: WorkerState
WORKER_STATE_GONE: WorkerState
DIRECT_PHASE_UNSPECIFIED: DirectPhase
DIRECT_PHASE_OPEN: DirectPhase
DIRECT_PHASE_DELIVERED: DirectPhase
DIRECT_PHASE_BROKEN: DirectPhase

class RequestKey(_message.Message):
    __slots__ = ("tenant", "request_id", "attempt")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    request_id: str
    attempt: int
    def __init__(self, tenant: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "reserve", "start_prefill", "cancel", "acknowledge", "resume", "snapshot", "set_state", "take_over")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    START_PREFILL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SET_STATE_FIELD_NUMBER: _ClassVar[int]
    TAKE_OVER_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    reserve: Reserve
    start_prefill: StartPrefill
    cancel: CancelAttempt
    acknowledge: AcknowledgeTokens
    resume: ResumeStream
    snapshot: BlockSnapshotRequest
    set_state: SetState
    take_over: TakeOver
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., start_prefill: _Optional[_Union[StartPrefill, _Mapping]] = ..., cancel: _Optional[_Union[CancelAttempt, _Mapping]] = ..., acknowledge: _Optional[_Union[AcknowledgeTokens, _Mapping]] = ..., resume: _Optional[_Union[ResumeStream, _Mapping]] = ..., snapshot: _Optional[_Union[BlockSnapshotRequest, _Mapping]] = ..., set_state: _Optional[_Union[SetState, _Mapping]] = ..., take_over: _Optional[_Union[TakeOver, _Mapping]] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "reserved", "prefill_finished", "step", "failed", "report", "blocks", "direct")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FINISHED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    reserved: Reserved
    prefill_finished: PrefillFinished
    step: StepOutput
    failed: AttemptFailed
    report: WorkerReport
    blocks: BlockEvents
    direct: DirectState
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., prefill_finished: _Optional[_Union[PrefillFinished, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., blocks: _Optional[_Union[BlockEvents, _Mapping]] = ..., direct: _Optional[_Union[DirectState, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_id", "router_epoch")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_epoch: int
    def __init__(self, router_id: _Optional[str] = ..., router_epoch: _Optional[int] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("weights_digest", "tokenizer_digest", "arithmetic", "layout", "handoff_major")
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_MAJOR_FIELD_NUMBER: _ClassVar[int]
    weights_digest: str
    tokenizer_digest: str
    arithmetic: str
    layout: str
    handoff_major: int
    def __init__(self, weights_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., arithmetic: _Optional[str] = ..., layout: _Optional[str] = ..., handoff_major: _Optional[int] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "state", "identity", "kv_address", "block_tokens", "num_blocks", "max_sequences", "max_context", "invariant", "pid", "cpus", "protocol_version", "vocab_size", "key_identity", "kv_bytes_per_token", "direct_address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    INVARIANT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    KEY_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DIRECT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    role: Role
    state: WorkerState
    identity: Identity
    kv_address: str
    block_tokens: int
    num_blocks: int
    max_sequences: int
    max_context: int
    invariant: bool
    pid: int
    cpus: _containers.RepeatedScalarFieldContainer[int]
    protocol_version: int
    vocab_size: int
    key_identity: str
    kv_bytes_per_token: int
    direct_address: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., state: _Optional[_Union[WorkerState, str]] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ..., kv_address: _Optional[str] = ..., block_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_context: _Optional[int] = ..., invariant: bool = ..., pid: _Optional[int] = ..., cpus: _Optional[_Iterable[int]] = ..., protocol_version: _Optional[int] = ..., vocab_size: _Optional[int] = ..., key_identity: _Optional[str] = ..., kv_bytes_per_token: _Optional[int] = ..., direct_address: _Optional[str] = ...) -> None: ...

class GenerationTask(_message.Message):
    __slots__ = ("prompt_token_ids", "sampling", "eos_token_ids", "fidelity", "so_far", "resumable")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    SO_FAR_FIELD_NUMBER: _ClassVar[int]
    RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.SamplingParams
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    fidelity: str
    so_far: _containers.RepeatedCompositeFieldContainer[ChoiceSoFar]
    resumable: bool
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., fidelity: _Optional[str] = ..., so_far: _Optional[_Iterable[_Union[ChoiceSoFar, _Mapping]]] = ..., resumable: bool = ...) -> None: ...

class ChoiceSoFar(_message.Message):
    __slots__ = ("token_ids", "finished")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finished: bool = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("key", "task", "remaining_s", "local_prefill")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    task: GenerationTask
    remaining_s: float
    local_prefill: bool
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., task: _Optional[_Union[GenerationTask, _Mapping]] = ..., remaining_s: _Optional[float] = ..., local_prefill: bool = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("key", "lease_id", "decode_epoch", "kv_address", "cached_tokens", "ttl_s", "kv_dtypes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPES_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    lease_id: bytes
    decode_epoch: int
    kv_address: str
    cached_tokens: int
    ttl_s: float
    kv_dtypes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., lease_id: _Optional[bytes] = ..., decode_epoch: _Optional[int] = ..., kv_address: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., ttl_s: _Optional[float] = ..., kv_dtypes: _Optional[_Iterable[str]] = ...) -> None: ...

class CacheSource(_message.Message):
    __slots__ = ("kv_address", "epoch", "cached_tokens")
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    kv_address: str
    epoch: int
    cached_tokens: int
    def __init__(self, kv_address: _Optional[str] = ..., epoch: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class StartPrefill(_message.Message):
    __slots__ = ("key", "task", "remaining_s", "lease", "sources")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    task: GenerationTask
    remaining_s: float
    lease: Reserved
    sources: _containers.RepeatedCompositeFieldContainer[CacheSource]
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., task: _Optional[_Union[GenerationTask, _Mapping]] = ..., remaining_s: _Optional[float] = ..., lease: _Optional[_Union[Reserved, _Mapping]] = ..., sources: _Optional[_Iterable[_Union[CacheSource, _Mapping]]] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("key", "prefill_s", "transfer_s", "handoff_s", "cached_tokens", "computed_tokens", "transferred_tokens", "kv_bytes", "wire_bytes", "frame_s", "fetched_tokens", "fetched_from", "fetch_s", "codec", "codec_reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAME_S_FIELD_NUMBER: _ClassVar[int]
    FETCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FROM_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_REASON_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    prefill_s: float
    transfer_s: float
    handoff_s: float
    cached_tokens: int
    computed_tokens: int
    transferred_tokens: int
    kv_bytes: int
    wire_bytes: int
    frame_s: float
    fetched_tokens: int
    fetched_from: str
    fetch_s: float
    codec: str
    codec_reason: str
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., handoff_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., transferred_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., wire_bytes: _Optional[int] = ..., frame_s: _Optional[float] = ..., fetched_tokens: _Optional[int] = ..., fetched_from: _Optional[str] = ..., fetch_s: _Optional[float] = ..., codec: _Optional[str] = ..., codec_reason: _Optional[str] = ...) -> None: ...

class CancelAttempt(_message.Message):
    __slots__ = ("key", "cause")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    cause: str
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., cause: _Optional[str] = ...) -> None: ...

class TokensSeen(_message.Message):
    __slots__ = ("key", "choice", "next_index")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    choice: int
    next_index: int
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., choice: _Optional[int] = ..., next_index: _Optional[int] = ...) -> None: ...

class AcknowledgeTokens(_message.Message):
    __slots__ = ("seen",)
    SEEN_FIELD_NUMBER: _ClassVar[int]
    seen: _containers.RepeatedCompositeFieldContainer[TokensSeen]
    def __init__(self, seen: _Optional[_Iterable[_Union[TokensSeen, _Mapping]]] = ...) -> None: ...

class TakeOver(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ...) -> None: ...

class ResumeStream(_message.Message):
    __slots__ = ("key", "next_index")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    next_index: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., next_index: _Optional[_Iterable[int]] = ...) -> None: ...

class ChoiceOutput(_message.Message):
    __slots__ = ("key", "delta", "finished")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    delta: _inference_pb2.Delta
    finished: _inference_pb2.ChoiceFinished
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., delta: _Optional[_Union[_inference_pb2.Delta, _Mapping]] = ..., finished: _Optional[_Union[_inference_pb2.ChoiceFinished, _Mapping]] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("outputs", "step_s")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[ChoiceOutput]
    step_s: float
    def __init__(self, outputs: _Optional[_Iterable[_Union[ChoiceOutput, _Mapping]]] = ..., step_s: _Optional[float] = ...) -> None: ...

class DirectState(_message.Message):
    __slots__ = ("key", "ticket_id", "phase")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    ticket_id: bytes
    phase: DirectPhase
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., ticket_id: _Optional[bytes] = ..., phase: _Optional[_Union[DirectPhase, str]] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("key", "error")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    key: RequestKey
    error: _inference_pb2.ErrorDetail
    def __init__(self, key: _Optional[_Union[RequestKey, _Mapping]] = ..., error: _Optional[_Union[_inference_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class KvReport(_message.Message):
    __slots__ = ("pushed_bytes_by_codec", "pushed_bytes_by_carrier", "pushed_wire_bytes", "last_reason_by_codec", "fetched_tokens_by_source", "write_backs_dropped")
    class PushedBytesByCodecEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PushedBytesByCarrierEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class LastReasonByCodecEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class FetchedTokensBySourceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PUSHED_BYTES_BY_CODEC_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BYTES_BY_CARRIER_FIELD_NUMBER: _ClassVar[int]
    PUSHED_WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_REASON_BY_CODEC_FIELD_NUMBER: _ClassVar[int]
    FETCHED_TOKENS_BY_SOURCE_FIELD_NUMBER: _ClassVar[int]
    WRITE_BACKS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    pushed_bytes_by_codec: _containers.ScalarMap[str, int]
    pushed_bytes_by_carrier: _containers.ScalarMap[str, int]
    pushed_wire_bytes: int
    last_reason_by_codec: _containers.ScalarMap[str, str]
    fetched_tokens_by_source: _containers.ScalarMap[str, int]
    write_backs_dropped: int
    def __init__(self, pushed_bytes_by_codec: _Optional[_Mapping[str, int]] = ..., pushed_bytes_by_carrier: _Optional[_Mapping[str, int]] = ..., pushed_wire_bytes: _Optional[int] = ..., last_reason_by_codec: _Optional[_Mapping[str, str]] = ..., fetched_tokens_by_source: _Optional[_Mapping[str, int]] = ..., write_backs_dropped: _Optional[int] = ...) -> None: ...

class LinkSpeed(_message.Message):
    __slots__ = ("kv_address", "bytes_per_s", "fixed_s")
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FIXED_S_FIELD_NUMBER: _ClassVar[int]
    kv_address: str
    bytes_per_s: float
    fixed_s: float
    def __init__(self, kv_address: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., fixed_s: _Optional[float] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("number", "is_snapshot", "continues", "changes", "num_blocks", "digest")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    IS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CONTINUES_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    number: int
    is_snapshot: bool
    continues: bool
    changes: _containers.RepeatedCompositeFieldContainer[BlockChange]
    num_blocks: int
    digest: int
    def __init__(self, number: _Optional[int] = ..., is_snapshot: bool = ..., continues: bool = ..., changes: _Optional[_Iterable[_Union[BlockChange, _Mapping]]] = ..., num_blocks: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class BlockChange(_message.Message):
    __slots__ = ("added", "keys")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    added: bool
    keys: bytes
    def __init__(self, added: bool = ..., keys: _Optional[bytes] = ...) -> None: ...

class BlockSnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetState(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: WorkerState
    def __init__(self, state: _Optional[_Union[WorkerState, str]] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("state", "running_sequences", "waiting_sequences", "queued_prefill_tokens", "free_blocks", "private_blocks", "cached_blocks", "pins", "leases", "step_s", "refused_stale", "preemptions", "steps", "kv", "drafts", "drafts_kept", "prefill_s_per_token", "links", "first_row_s", "row_s")
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    REFUSED_STALE_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_KEPT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_S_FIELD_NUMBER: _ClassVar[int]
    ROW_S_FIELD_NUMBER: _ClassVar[int]
    state: WorkerState
    running_sequences: int
    waiting_sequences: int
    queued_prefill_tokens: int
    free_blocks: int
    private_blocks: int
    cached_blocks: int
    pins: int
    leases: int
    step_s: float
    refused_stale: int
    preemptions: int
    steps: int
    kv: KvReport
    drafts: int
    drafts_kept: int
    prefill_s_per_token: float
    links: _containers.RepeatedCompositeFieldContainer[LinkSpeed]
    first_row_s: float
    row_s: float
    def __init__(self, state: _Optional[_Union[WorkerState, str]] = ..., running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., private_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., pins: _Optional[int] = ..., leases: _Optional[int] = ..., step_s: _Optional[float] = ..., refused_stale: _Optional[int] = ..., preemptions: _Optional[int] = ..., steps: _Optional[int] = ..., kv: _Optional[_Union[KvReport, _Mapping]] = ..., drafts: _Optional[int] = ..., drafts_kept: _Optional[int] = ..., prefill_s_per_token: _Optional[float] = ..., links: _Optional[_Iterable[_Union[LinkSpeed, _Mapping]]] = ..., first_row_s: _Optional[float] = ..., row_s: _Optional[float] = ...) -> None: ...
