from headrace.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    address: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("router_id", "router_epoch", "connected")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_epoch: int
    connected: bool
    def __init__(self, router_id: _Optional[str] = ..., router_epoch: _Optional[int] = ..., connected: bool = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("address", "connected", "hello", "report", "connected_s", "last_error")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_S_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    address: str
    connected: bool
    hello: _worker_pb2.WorkerHello
    report: _worker_pb2.WorkerReport
    connected_s: float
    last_error: str
    def __init__(self, address: _Optional[str] = ..., connected: bool = ..., hello: _Optional[_Union[_worker_pb2.WorkerHello, _Mapping]] = ..., report: _Optional[_Union[_worker_pb2.WorkerReport, _Mapping]] = ..., connected_s: _Optional[float] = ..., last_error: _Optional[str] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("router_id", "profile", "model", "workers", "queued_requests", "queued_tokens", "running_requests", "finished_requests", "failed_requests", "cancelled_requests", "uptime_s", "recoveries", "recoveries_refused", "prefix_index")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_REFUSED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_INDEX_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    profile: str
    model: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    queued_requests: int
    queued_tokens: int
    running_requests: int
    finished_requests: int
    failed_requests: int
    cancelled_requests: int
    uptime_s: float
    recoveries: int
    recoveries_refused: int
    prefix_index: PrefixIndexStatus
    def __init__(self, router_id: _Optional[str] = ..., profile: _Optional[str] = ..., model: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running_requests: _Optional[int] = ..., finished_requests: _Optional[int] = ..., failed_requests: _Optional[int] = ..., cancelled_requests: _Optional[int] = ..., uptime_s: _Optional[float] = ..., recoveries: _Optional[int] = ..., recoveries_refused: _Optional[int] = ..., prefix_index: _Optional[_Union[PrefixIndexStatus, _Mapping]] = ...) -> None: ...

class PrefixIndexStatus(_message.Message):
    __slots__ = ("blocks", "exact_workers", "other_workers", "age_s", "predictions", "false_hit_rate", "repairs")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXACT_WORKERS_FIELD_NUMBER: _ClassVar[int]
    OTHER_WORKERS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    FALSE_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    REPAIRS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    exact_workers: int
    other_workers: int
    age_s: float
    predictions: int
    false_hit_rate: float
    repairs: int
    def __init__(self, blocks: _Optional[int] = ..., exact_workers: _Optional[int] = ..., other_workers: _Optional[int] = ..., age_s: _Optional[float] = ..., predictions: _Optional[int] = ..., false_hit_rate: _Optional[float] = ..., repairs: _Optional[int] = ...) -> None: ...

class SetWorkerStateRequest(_message.Message):
    __slots__ = ("worker_id", "state")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    state: _worker_pb2.WorkerState
    def __init__(self, worker_id: _Optional[str] = ..., state: _Optional[_Union[_worker_pb2.WorkerState, str]] = ...) -> None: ...

class SetWorkerStateResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: _worker_pb2.WorkerState
    def __init__(self, state: _Optional[_Union[_worker_pb2.WorkerState, str]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("worker_id", "chosen", "cost_s", "queue_s", "compute_s", "transfer_s", "step_s", "cached_tokens", "tokens_ahead", "free_blocks", "note")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    chosen: bool
    cost_s: float
    queue_s: float
    compute_s: float
    transfer_s: float
    step_s: float
    cached_tokens: int
    tokens_ahead: int
    free_blocks: int
    note: str
    def __init__(self, worker_id: _Optional[str] = ..., chosen: bool = ..., cost_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., step_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., tokens_ahead: _Optional[int] = ..., free_blocks: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class PlacementDecision(_message.Message):
    __slots__ = ("attempt", "age_s", "policy", "reason", "decode_worker", "prefill_worker", "predicted_ttft_s", "decode", "prefill", "ended")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    age_s: float
    policy: str
    reason: str
    decode_worker: str
    prefill_worker: str
    predicted_ttft_s: float
    decode: _containers.RepeatedCompositeFieldContainer[Candidate]
    prefill: _containers.RepeatedCompositeFieldContainer[Candidate]
    ended: str
    def __init__(self, attempt: _Optional[int] = ..., age_s: _Optional[float] = ..., policy: _Optional[str] = ..., reason: _Optional[str] = ..., decode_worker: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., predicted_ttft_s: _Optional[float] = ..., decode: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., prefill: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., ended: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("request_id", "state", "decisions")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    state: str
    decisions: _containers.RepeatedCompositeFieldContainer[PlacementDecision]
    def __init__(self, request_id: _Optional[str] = ..., state: _Optional[str] = ..., decisions: _Optional[_Iterable[_Union[PlacementDecision, _Mapping]]] = ...) -> None: ...
