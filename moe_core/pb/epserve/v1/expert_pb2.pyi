from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandoverRequest(_message.Message):
    __slots__ = ("hello", "grant", "expert", "blocks", "release")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    hello: HandoverHello
    grant: NixlGrant
    expert: ExpertName
    blocks: KvBlocks
    release: str
    def __init__(self, hello: _Optional[_Union[HandoverHello, _Mapping]] = ..., grant: _Optional[_Union[NixlGrant, _Mapping]] = ..., expert: _Optional[_Union[ExpertName, _Mapping]] = ..., blocks: _Optional[_Union[KvBlocks, _Mapping]] = ..., release: _Optional[str] = ...) -> None: ...

class HandoverResponse(_message.Message):
    __slots__ = ("welcome", "part", "sent")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    welcome: HandoverWelcome
    part: bytes
    sent: UnitSent
    def __init__(self, welcome: _Optional[_Union[HandoverWelcome, _Mapping]] = ..., part: _Optional[bytes] = ..., sent: _Optional[_Union[UnitSent, _Mapping]] = ...) -> None: ...

class HandoverHello(_message.Message):
    __slots__ = ("protocol_versions", "model_fingerprint", "dtype", "shard_rank", "shard_size", "unit_bytes", "transports", "rank", "layout")
    PROTOCOL_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHARD_RANK_FIELD_NUMBER: _ClassVar[int]
    SHARD_SIZE_FIELD_NUMBER: _ClassVar[int]
    UNIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    protocol_versions: _containers.RepeatedScalarFieldContainer[int]
    model_fingerprint: str
    dtype: str
    shard_rank: int
    shard_size: int
    unit_bytes: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    rank: int
    layout: str
    def __init__(self, protocol_versions: _Optional[_Iterable[int]] = ..., model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., shard_rank: _Optional[int] = ..., shard_size: _Optional[int] = ..., unit_bytes: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., rank: _Optional[int] = ..., layout: _Optional[str] = ...) -> None: ...

class HandoverWelcome(_message.Message):
    __slots__ = ("protocol_version", "transport", "transport_reason", "instance_epoch", "agent_name", "process")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_REASON_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    AGENT_NAME_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    transport: str
    transport_reason: str
    instance_epoch: int
    agent_name: str
    process: HostProcess
    def __init__(self, protocol_version: _Optional[int] = ..., transport: _Optional[str] = ..., transport_reason: _Optional[str] = ..., instance_epoch: _Optional[int] = ..., agent_name: _Optional[str] = ..., process: _Optional[_Union[HostProcess, _Mapping]] = ...) -> None: ...

class ExpertName(_message.Message):
    __slots__ = ("layer_id", "logical_id")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_ID_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    logical_id: int
    def __init__(self, layer_id: _Optional[int] = ..., logical_id: _Optional[int] = ...) -> None: ...

class KvBlocks(_message.Message):
    __slots__ = ("block_ids",)
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, block_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class UnitSent(_message.Message):
    __slots__ = ("held", "blake3")
    HELD_FIELD_NUMBER: _ClassVar[int]
    BLAKE3_FIELD_NUMBER: _ClassVar[int]
    held: bool
    blake3: bytes
    def __init__(self, held: _Optional[bool] = ..., blake3: _Optional[bytes] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("hello", "dispatch", "doorbell")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    DOORBELL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    dispatch: DispatchMessage
    doorbell: Doorbell
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., dispatch: _Optional[_Union[DispatchMessage, _Mapping]] = ..., doorbell: _Optional[_Union[Doorbell, _Mapping]] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("welcome", "combine", "doorbell", "failure")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    DOORBELL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    combine: CombineMessage
    doorbell: Doorbell
    failure: DispatchFailure
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., combine: _Optional[_Union[CombineMessage, _Mapping]] = ..., doorbell: _Optional[_Union[Doorbell, _Mapping]] = ..., failure: _Optional[_Union[DispatchFailure, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_versions", "model_fingerprint", "attn_rank", "attn_world", "dtype", "hidden_size", "num_columns", "slot_count", "slot_tokens", "instance_epoch", "transports", "nixl", "expert_rank", "expert_world")
    PROTOCOL_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ATTN_RANK_FIELD_NUMBER: _ClassVar[int]
    ATTN_WORLD_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SLOT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_RANK_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WORLD_FIELD_NUMBER: _ClassVar[int]
    protocol_versions: _containers.RepeatedScalarFieldContainer[int]
    model_fingerprint: str
    attn_rank: int
    attn_world: int
    dtype: str
    hidden_size: int
    num_columns: int
    slot_count: int
    slot_tokens: int
    instance_epoch: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    nixl: NixlGrant
    expert_rank: int
    expert_world: int
    def __init__(self, protocol_versions: _Optional[_Iterable[int]] = ..., model_fingerprint: _Optional[str] = ..., attn_rank: _Optional[int] = ..., attn_world: _Optional[int] = ..., dtype: _Optional[str] = ..., hidden_size: _Optional[int] = ..., num_columns: _Optional[int] = ..., slot_count: _Optional[int] = ..., slot_tokens: _Optional[int] = ..., instance_epoch: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., nixl: _Optional[_Union[NixlGrant, _Mapping]] = ..., expert_rank: _Optional[int] = ..., expert_world: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "transport", "transport_reason", "instance_epoch", "nixl")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_REASON_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    transport: str
    transport_reason: str
    instance_epoch: int
    nixl: NixlGrant
    def __init__(self, protocol_version: _Optional[int] = ..., transport: _Optional[str] = ..., transport_reason: _Optional[str] = ..., instance_epoch: _Optional[int] = ..., nixl: _Optional[_Union[NixlGrant, _Mapping]] = ...) -> None: ...

class NixlGrant(_message.Message):
    __slots__ = ("agent_name", "agent_metadata", "base_address", "slot_bytes", "slot_count", "device_id", "memory_type", "link_id", "process")
    AGENT_NAME_FIELD_NUMBER: _ClassVar[int]
    AGENT_METADATA_FIELD_NUMBER: _ClassVar[int]
    BASE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TYPE_FIELD_NUMBER: _ClassVar[int]
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    agent_name: str
    agent_metadata: bytes
    base_address: int
    slot_bytes: int
    slot_count: int
    device_id: int
    memory_type: str
    link_id: int
    process: HostProcess
    def __init__(self, agent_name: _Optional[str] = ..., agent_metadata: _Optional[bytes] = ..., base_address: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., slot_count: _Optional[int] = ..., device_id: _Optional[int] = ..., memory_type: _Optional[str] = ..., link_id: _Optional[int] = ..., process: _Optional[_Union[HostProcess, _Mapping]] = ...) -> None: ...

class HostProcess(_message.Message):
    __slots__ = ("host_id", "pid", "start_ticks", "doorbell", "parked_fd")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    START_TICKS_FIELD_NUMBER: _ClassVar[int]
    DOORBELL_FIELD_NUMBER: _ClassVar[int]
    PARKED_FD_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    pid: int
    start_ticks: int
    doorbell: str
    parked_fd: int
    def __init__(self, host_id: _Optional[str] = ..., pid: _Optional[int] = ..., start_ticks: _Optional[int] = ..., doorbell: _Optional[str] = ..., parked_fd: _Optional[int] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("placement_epoch", "step", "layer_id", "microbatch", "chunk", "attempt")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    step: int
    layer_id: int
    microbatch: int
    chunk: int
    attempt: int
    def __init__(self, placement_epoch: _Optional[int] = ..., step: _Optional[int] = ..., layer_id: _Optional[int] = ..., microbatch: _Optional[int] = ..., chunk: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Tag(_message.Message):
    __slots__ = ("slot", "sequence")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    sequence: int
    def __init__(self, slot: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("attn_rank", "instance_epoch", "tag")
    ATTN_RANK_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    attn_rank: int
    instance_epoch: int
    tag: Tag
    def __init__(self, attn_rank: _Optional[int] = ..., instance_epoch: _Optional[int] = ..., tag: _Optional[_Union[Tag, _Mapping]] = ...) -> None: ...

class LocateResponse(_message.Message):
    __slots__ = ("where",)
    class Where(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[LocateResponse.Where]
        NOT_ARRIVED: _ClassVar[LocateResponse.Where]
        QUEUED: _ClassVar[LocateResponse.Where]
        ANSWERED: _ClassVar[LocateResponse.Where]
    UNKNOWN: LocateResponse.Where
    NOT_ARRIVED: LocateResponse.Where
    QUEUED: LocateResponse.Where
    ANSWERED: LocateResponse.Where
    WHERE_FIELD_NUMBER: _ClassVar[int]
    where: LocateResponse.Where
    def __init__(self, where: _Optional[_Union[LocateResponse.Where, str]] = ...) -> None: ...

class DispatchMessage(_message.Message):
    __slots__ = ("tag", "key", "num_tokens", "hidden_states", "physical_ids", "topk_weights")
    TAG_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    tag: Tag
    key: Key
    num_tokens: int
    hidden_states: bytes
    physical_ids: bytes
    topk_weights: bytes
    def __init__(self, tag: _Optional[_Union[Tag, _Mapping]] = ..., key: _Optional[_Union[Key, _Mapping]] = ..., num_tokens: _Optional[int] = ..., hidden_states: _Optional[bytes] = ..., physical_ids: _Optional[bytes] = ..., topk_weights: _Optional[bytes] = ...) -> None: ...

class CombineMessage(_message.Message):
    __slots__ = ("tag", "num_tokens", "partial", "queue_us", "compute_us")
    TAG_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    tag: Tag
    num_tokens: int
    partial: bytes
    queue_us: int
    compute_us: int
    def __init__(self, tag: _Optional[_Union[Tag, _Mapping]] = ..., num_tokens: _Optional[int] = ..., partial: _Optional[bytes] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class DispatchFailure(_message.Message):
    __slots__ = ("tag", "code", "message")
    TAG_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    tag: Tag
    code: str
    message: str
    def __init__(self, tag: _Optional[_Union[Tag, _Mapping]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Doorbell(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
