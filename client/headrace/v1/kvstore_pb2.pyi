from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StoreLayout(_message.Message):
    __slots__ = ("planes", "block_tokens")
    PLANES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    planes: _containers.RepeatedCompositeFieldContainer[StorePlane]
    block_tokens: int
    def __init__(self, planes: _Optional[_Iterable[_Union[StorePlane, _Mapping]]] = ..., block_tokens: _Optional[int] = ...) -> None: ...

class StorePlane(_message.Message):
    __slots__ = ("name", "layers", "heads", "tokens_per_entry", "fields")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_ENTRY_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    layers: int
    heads: int
    tokens_per_entry: int
    fields: _containers.RepeatedCompositeFieldContainer[StoreField]
    def __init__(self, name: _Optional[str] = ..., layers: _Optional[int] = ..., heads: _Optional[int] = ..., tokens_per_entry: _Optional[int] = ..., fields: _Optional[_Iterable[_Union[StoreField, _Mapping]]] = ...) -> None: ...

class StoreField(_message.Message):
    __slots__ = ("name", "width", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    width: int
    dtype: str
    def __init__(self, name: _Optional[str] = ..., width: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ("offer_id", "tenant_label", "keys", "first_block", "block_tokens", "layout", "fidelity", "remaining_s", "sender_epoch")
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_LABEL_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    SENDER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    offer_id: bytes
    tenant_label: bytes
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    first_block: int
    block_tokens: int
    layout: StoreLayout
    fidelity: int
    remaining_s: float
    sender_epoch: int
    def __init__(self, offer_id: _Optional[bytes] = ..., tenant_label: _Optional[bytes] = ..., keys: _Optional[_Iterable[bytes]] = ..., first_block: _Optional[int] = ..., block_tokens: _Optional[int] = ..., layout: _Optional[_Union[StoreLayout, _Mapping]] = ..., fidelity: _Optional[int] = ..., remaining_s: _Optional[float] = ..., sender_epoch: _Optional[int] = ...) -> None: ...

class OfferResponse(_message.Message):
    __slots__ = ("lease_id", "receiver_epoch", "ttl_s", "start_block", "num_blocks", "refused", "message")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    START_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    receiver_epoch: int
    ttl_s: float
    start_block: int
    num_blocks: int
    refused: str
    message: str
    def __init__(self, lease_id: _Optional[bytes] = ..., receiver_epoch: _Optional[int] = ..., ttl_s: _Optional[float] = ..., start_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., refused: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("keys", "fidelity", "layout", "block_tokens", "dtypes")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    fidelity: int
    layout: str
    block_tokens: int
    dtypes: _containers.RepeatedCompositeFieldContainer[StoreDtypes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., fidelity: _Optional[int] = ..., layout: _Optional[str] = ..., block_tokens: _Optional[int] = ..., dtypes: _Optional[_Iterable[_Union[StoreDtypes, _Mapping]]] = ...) -> None: ...

class StoreDtypes(_message.Message):
    __slots__ = ("fields",)
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    fields: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, fields: _Optional[_Iterable[str]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("epoch", "num_blocks", "fidelity", "tiers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_blocks: int
    fidelity: int
    tiers: _containers.RepeatedCompositeFieldContainer[StoreTierRun]
    def __init__(self, epoch: _Optional[int] = ..., num_blocks: _Optional[int] = ..., fidelity: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[StoreTierRun, _Mapping]]] = ...) -> None: ...

class StoreTierRun(_message.Message):
    __slots__ = ("tier", "num_blocks", "num_bytes", "bytes_per_s")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    tier: str
    num_blocks: int
    num_bytes: int
    bytes_per_s: float
    def __init__(self, tier: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class StoreStatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreStatResponse(_message.Message):
    __slots__ = ("epoch", "tiers", "landing_bytes", "queued_bytes", "dropped_records", "dropped_bytes", "num_leases", "num_fetches", "host_hits", "disk_hits", "misses", "directory")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LANDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_FETCHES_FIELD_NUMBER: _ClassVar[int]
    HOST_HITS_FIELD_NUMBER: _ClassVar[int]
    DISK_HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    tiers: _containers.RepeatedCompositeFieldContainer[StoreTierStats]
    landing_bytes: int
    queued_bytes: int
    dropped_records: int
    dropped_bytes: int
    num_leases: int
    num_fetches: int
    host_hits: int
    disk_hits: int
    misses: int
    directory: str
    def __init__(self, epoch: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[StoreTierStats, _Mapping]]] = ..., landing_bytes: _Optional[int] = ..., queued_bytes: _Optional[int] = ..., dropped_records: _Optional[int] = ..., dropped_bytes: _Optional[int] = ..., num_leases: _Optional[int] = ..., num_fetches: _Optional[int] = ..., host_hits: _Optional[int] = ..., disk_hits: _Optional[int] = ..., misses: _Optional[int] = ..., directory: _Optional[str] = ...) -> None: ...

class StoreTierStats(_message.Message):
    __slots__ = ("tier", "state", "reason", "since_s", "limit_bytes", "used_bytes", "num_records", "num_pinned", "num_evicted", "num_refused", "bytes_per_s", "unusable_files", "unusable_bytes", "written_records", "write_failures", "read_failures", "bad_records", "torn_files", "tenants")
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    UNUSABLE_FILES_FIELD_NUMBER: _ClassVar[int]
    UNUSABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_RECORDS_FIELD_NUMBER: _ClassVar[int]
    WRITE_FAILURES_FIELD_NUMBER: _ClassVar[int]
    READ_FAILURES_FIELD_NUMBER: _ClassVar[int]
    BAD_RECORDS_FIELD_NUMBER: _ClassVar[int]
    TORN_FILES_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    state: str
    reason: str
    since_s: float
    limit_bytes: int
    used_bytes: int
    num_records: int
    num_pinned: int
    num_evicted: int
    num_refused: int
    bytes_per_s: float
    unusable_files: int
    unusable_bytes: int
    written_records: int
    write_failures: int
    read_failures: int
    bad_records: int
    torn_files: int
    tenants: _containers.RepeatedCompositeFieldContainer[StoreTenantBytes]
    def __init__(self, tier: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., since_s: _Optional[float] = ..., limit_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., num_records: _Optional[int] = ..., num_pinned: _Optional[int] = ..., num_evicted: _Optional[int] = ..., num_refused: _Optional[int] = ..., bytes_per_s: _Optional[float] = ..., unusable_files: _Optional[int] = ..., unusable_bytes: _Optional[int] = ..., written_records: _Optional[int] = ..., write_failures: _Optional[int] = ..., read_failures: _Optional[int] = ..., bad_records: _Optional[int] = ..., torn_files: _Optional[int] = ..., tenants: _Optional[_Iterable[_Union[StoreTenantBytes, _Mapping]]] = ...) -> None: ...

class StoreTenantBytes(_message.Message):
    __slots__ = ("tenant_label", "num_bytes")
    TENANT_LABEL_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant_label: bytes
    num_bytes: int
    def __init__(self, tenant_label: _Optional[bytes] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class StoreListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreEntry(_message.Message):
    __slots__ = ("tier", "name", "tenant_label", "layout", "block_tokens", "fidelity", "num_records", "num_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_LABEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    NUM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    name: str
    tenant_label: bytes
    layout: str
    block_tokens: int
    fidelity: int
    num_records: int
    num_bytes: int
    def __init__(self, tier: _Optional[str] = ..., name: _Optional[str] = ..., tenant_label: _Optional[bytes] = ..., layout: _Optional[str] = ..., block_tokens: _Optional[int] = ..., fidelity: _Optional[int] = ..., num_records: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class StoreVerifyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreVerifyProgress(_message.Message):
    __slots__ = ("done", "total", "num_bytes", "bad")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    num_bytes: int
    bad: int
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., num_bytes: _Optional[int] = ..., bad: _Optional[int] = ...) -> None: ...

class StoreGcRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreGcResponse(_message.Message):
    __slots__ = ("files", "file_bytes")
    FILES_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    files: int
    file_bytes: int
    def __init__(self, files: _Optional[int] = ..., file_bytes: _Optional[int] = ...) -> None: ...
