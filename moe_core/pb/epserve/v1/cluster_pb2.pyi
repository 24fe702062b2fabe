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
    ROLE_GATEWAY: _ClassVar[Role]
    ROLE_ATTN: _ClassVar[Role]
    ROLE_EXPERT: _ClassVar[Role]

class MemberState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMBER_STATE_UNSPECIFIED: _ClassVar[MemberState]
    MEMBER_STATE_LOADING: _ClassVar[MemberState]
    MEMBER_STATE_CONNECTING: _ClassVar[MemberState]
    MEMBER_STATE_READY: _ClassVar[MemberState]
    MEMBER_STATE_DRAINING: _ClassVar[MemberState]
    MEMBER_STATE_FAILED: _ClassVar[MemberState]
ROLE_UNSPECIFIED: Role
ROLE_GATEWAY: Role
ROLE_ATTN: Role
ROLE_EXPERT: Role
MEMBER_STATE_UNSPECIFIED: MemberState
MEMBER_STATE_LOADING: MemberState
MEMBER_STATE_CONNECTING: MemberState
MEMBER_STATE_READY: MemberState
MEMBER_STATE_DRAINING: MemberState
MEMBER_STATE_FAILED: MemberState

class RegisterRequest(_message.Message):
    __slots__ = ("join", "status", "expert_load")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    join: Join
    status: StatusReport
    expert_load: ExpertLoad
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., status: _Optional[_Union[StatusReport, _Mapping]] = ..., expert_load: _Optional[_Union[ExpertLoad, _Mapping]] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("assigned", "state")
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    assigned: Assigned
    state: ClusterState
    def __init__(self, assigned: _Optional[_Union[Assigned, _Mapping]] = ..., state: _Optional[_Union[ClusterState, _Mapping]] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("role", "rank", "address", "device", "pid", "model_fingerprint", "instance_epoch", "dtype", "host_id", "placement", "parallel", "protocol_versions")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    rank: int
    address: str
    device: str
    pid: int
    model_fingerprint: str
    instance_epoch: int
    dtype: str
    host_id: str
    placement: Placement
    parallel: ParallelSettings
    protocol_versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., rank: _Optional[int] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., instance_epoch: _Optional[int] = ..., dtype: _Optional[str] = ..., host_id: _Optional[str] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., parallel: _Optional[_Union[ParallelSettings, _Mapping]] = ..., protocol_versions: _Optional[_Iterable[int]] = ...) -> None: ...

class StatusReport(_message.Message):
    __slots__ = ("state", "detail", "store_address", "attention_load", "links", "engine_metrics", "prepared_epoch", "used_epoch", "refused_epoch")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_LOAD_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_METRICS_FIELD_NUMBER: _ClassVar[int]
    PREPARED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    USED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REFUSED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    state: MemberState
    detail: str
    store_address: str
    attention_load: AttentionLoad
    links: _containers.RepeatedCompositeFieldContainer[LinkStats]
    engine_metrics: EngineMetrics
    prepared_epoch: int
    used_epoch: int
    refused_epoch: int
    def __init__(self, state: _Optional[_Union[MemberState, str]] = ..., detail: _Optional[str] = ..., store_address: _Optional[str] = ..., attention_load: _Optional[_Union[AttentionLoad, _Mapping]] = ..., links: _Optional[_Iterable[_Union[LinkStats, _Mapping]]] = ..., engine_metrics: _Optional[_Union[EngineMetrics, _Mapping]] = ..., prepared_epoch: _Optional[int] = ..., used_epoch: _Optional[int] = ..., refused_epoch: _Optional[int] = ...) -> None: ...

class AttentionLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "free_kv_blocks", "total_kv_blocks", "kv_block_size", "max_num_seqs", "hands_over")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    FREE_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    HANDS_OVER_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    free_kv_blocks: int
    total_kv_blocks: int
    kv_block_size: int
    max_num_seqs: int
    hands_over: bool
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., free_kv_blocks: _Optional[int] = ..., total_kv_blocks: _Optional[int] = ..., kv_block_size: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., hands_over: _Optional[bool] = ...) -> None: ...

class EngineMetrics(_message.Message):
    __slots__ = ("steps", "step_s", "attention_s", "dispatch_s", "expert_wait_s", "expert_queue_s", "expert_compute_s", "combine_s", "sampling_s", "other_s", "preemptions", "prefix_query_tokens", "prefix_hit_tokens", "output_tokens", "handed_over_tokens", "recomputed_tokens")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_S_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_S_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    EXPERT_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    EXPERT_COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COMBINE_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_S_FIELD_NUMBER: _ClassVar[int]
    OTHER_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    step_s: float
    attention_s: float
    dispatch_s: float
    expert_wait_s: float
    expert_queue_s: float
    expert_compute_s: float
    combine_s: float
    sampling_s: float
    other_s: float
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    output_tokens: int
    handed_over_tokens: int
    recomputed_tokens: int
    def __init__(self, steps: _Optional[int] = ..., step_s: _Optional[float] = ..., attention_s: _Optional[float] = ..., dispatch_s: _Optional[float] = ..., expert_wait_s: _Optional[float] = ..., expert_queue_s: _Optional[float] = ..., expert_compute_s: _Optional[float] = ..., combine_s: _Optional[float] = ..., sampling_s: _Optional[float] = ..., other_s: _Optional[float] = ..., preemptions: _Optional[int] = ..., prefix_query_tokens: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., handed_over_tokens: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerExpertLoad]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerExpertLoad, _Mapping]]] = ...) -> None: ...

class LayerExpertLoad(_message.Message):
    __slots__ = ("layer_id", "tokens")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer_id: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class LinkStats(_message.Message):
    __slots__ = ("source", "target", "transport", "dispatches", "dispatch_bytes", "combine_bytes", "routing_bytes", "stream_tensor_bytes", "doorbells", "wait_s", "dispatch_tokens")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DISPATCHES_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMBINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROUTING_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAM_TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOORBELLS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    source: str
    target: str
    transport: str
    dispatches: int
    dispatch_bytes: int
    combine_bytes: int
    routing_bytes: int
    stream_tensor_bytes: int
    doorbells: int
    wait_s: float
    dispatch_tokens: int
    def __init__(self, source: _Optional[str] = ..., target: _Optional[str] = ..., transport: _Optional[str] = ..., dispatches: _Optional[int] = ..., dispatch_bytes: _Optional[int] = ..., combine_bytes: _Optional[int] = ..., routing_bytes: _Optional[int] = ..., stream_tensor_bytes: _Optional[int] = ..., doorbells: _Optional[int] = ..., wait_s: _Optional[float] = ..., dispatch_tokens: _Optional[int] = ...) -> None: ...

class Assigned(_message.Message):
    __slots__ = ("rank", "parallel", "protocol_version")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    parallel: ParallelSettings
    protocol_version: int
    def __init__(self, rank: _Optional[int] = ..., parallel: _Optional[_Union[ParallelSettings, _Mapping]] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class ParallelSettings(_message.Message):
    __slots__ = ("attn_devices", "expert_devices", "dp_size", "ep_size", "enable_mla", "expert_parallel_degree", "num_redundant_experts", "shared_experts", "colocated")
    ATTN_DEVICES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DEVICES_FIELD_NUMBER: _ClassVar[int]
    DP_SIZE_FIELD_NUMBER: _ClassVar[int]
    EP_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENABLE_MLA_FIELD_NUMBER: _ClassVar[int]
    EXPERT_PARALLEL_DEGREE_FIELD_NUMBER: _ClassVar[int]
    NUM_REDUNDANT_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_FIELD_NUMBER: _ClassVar[int]
    attn_devices: int
    expert_devices: int
    dp_size: int
    ep_size: int
    enable_mla: bool
    expert_parallel_degree: int
    num_redundant_experts: int
    shared_experts: str
    colocated: bool
    def __init__(self, attn_devices: _Optional[int] = ..., expert_devices: _Optional[int] = ..., dp_size: _Optional[int] = ..., ep_size: _Optional[int] = ..., enable_mla: _Optional[bool] = ..., expert_parallel_degree: _Optional[int] = ..., num_redundant_experts: _Optional[int] = ..., shared_experts: _Optional[str] = ..., colocated: _Optional[bool] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("role", "rank", "dp_rank", "tp_rank", "ep_rank", "etp_rank", "pid", "address", "device", "state", "detail", "instance_epoch", "store_address", "host_id", "attention_load", "links", "experts", "engine_metrics", "queued_requests", "prepared_epoch", "used_epoch", "leaving", "refused_epoch", "loop_tasks")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    EP_RANK_FIELD_NUMBER: _ClassVar[int]
    ETP_RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_LOAD_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_METRICS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PREPARED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    USED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    REFUSED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOOP_TASKS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    rank: int
    dp_rank: int
    tp_rank: int
    ep_rank: int
    etp_rank: int
    pid: int
    address: str
    device: str
    state: MemberState
    detail: str
    instance_epoch: int
    store_address: str
    host_id: str
    attention_load: AttentionLoad
    links: _containers.RepeatedCompositeFieldContainer[LinkStats]
    experts: int
    engine_metrics: EngineMetrics
    queued_requests: int
    prepared_epoch: int
    used_epoch: int
    leaving: bool
    refused_epoch: int
    loop_tasks: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., rank: _Optional[int] = ..., dp_rank: _Optional[int] = ..., tp_rank: _Optional[int] = ..., ep_rank: _Optional[int] = ..., etp_rank: _Optional[int] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., state: _Optional[_Union[MemberState, str]] = ..., detail: _Optional[str] = ..., instance_epoch: _Optional[int] = ..., store_address: _Optional[str] = ..., host_id: _Optional[str] = ..., attention_load: _Optional[_Union[AttentionLoad, _Mapping]] = ..., links: _Optional[_Iterable[_Union[LinkStats, _Mapping]]] = ..., experts: _Optional[int] = ..., engine_metrics: _Optional[_Union[EngineMetrics, _Mapping]] = ..., queued_requests: _Optional[int] = ..., prepared_epoch: _Optional[int] = ..., used_epoch: _Optional[int] = ..., leaving: _Optional[bool] = ..., refused_epoch: _Optional[int] = ..., loop_tasks: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("epoch", "num_logical_experts", "ep_size", "layers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGICAL_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EP_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_logical_experts: int
    ep_size: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerPlacement]
    def __init__(self, epoch: _Optional[int] = ..., num_logical_experts: _Optional[int] = ..., ep_size: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerPlacement, _Mapping]]] = ...) -> None: ...

class LayerPlacement(_message.Message):
    __slots__ = ("layer_id", "physical_to_logical", "physical_to_ep_rank")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_TO_LOGICAL_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_TO_EP_RANK_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    physical_to_logical: _containers.RepeatedScalarFieldContainer[int]
    physical_to_ep_rank: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer_id: _Optional[int] = ..., physical_to_logical: _Optional[_Iterable[int]] = ..., physical_to_ep_rank: _Optional[_Iterable[int]] = ...) -> None: ...

class ClusterState(_message.Message):
    __slots__ = ("version", "parallel", "members", "placement", "expert_load", "next_placement", "target")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    NEXT_PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    version: int
    parallel: ParallelSettings
    members: _containers.RepeatedCompositeFieldContainer[Member]
    placement: Placement
    expert_load: ExpertLoad
    next_placement: Placement
    target: TierSizes
    def __init__(self, version: _Optional[int] = ..., parallel: _Optional[_Union[ParallelSettings, _Mapping]] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., expert_load: _Optional[_Union[ExpertLoad, _Mapping]] = ..., next_placement: _Optional[_Union[Placement, _Mapping]] = ..., target: _Optional[_Union[TierSizes, _Mapping]] = ...) -> None: ...

class TierSizes(_message.Message):
    __slots__ = ("attn_devices", "expert_devices")
    ATTN_DEVICES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DEVICES_FIELD_NUMBER: _ClassVar[int]
    attn_devices: int
    expert_devices: int
    def __init__(self, attn_devices: _Optional[int] = ..., expert_devices: _Optional[int] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("role", "rank", "instance_epoch", "loop_idle_ms", "loop_tasks")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOOP_IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    LOOP_TASKS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    rank: int
    instance_epoch: int
    loop_idle_ms: int
    loop_tasks: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., rank: _Optional[int] = ..., instance_epoch: _Optional[int] = ..., loop_idle_ms: _Optional[int] = ..., loop_tasks: _Optional[int] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FollowLeaderRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class SharedLayout(_message.Message):
    __slots__ = ("placement", "parallel", "last_epoch", "model_fingerprint")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    parallel: ParallelSettings
    last_epoch: int
    model_fingerprint: str
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ..., parallel: _Optional[_Union[ParallelSettings, _Mapping]] = ..., last_epoch: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class GatewayRecord(_message.Message):
    __slots__ = ("member", "cluster_address")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    member: Member
    cluster_address: str
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., cluster_address: _Optional[str] = ...) -> None: ...
