from moe_core.pb.epserve.v1 import cluster_pb2 as _cluster_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScaleRequest(_message.Message):
    __slots__ = ("attn_devices", "expert_devices")
    ATTN_DEVICES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DEVICES_FIELD_NUMBER: _ClassVar[int]
    attn_devices: int
    expert_devices: int
    def __init__(self, attn_devices: _Optional[int] = ..., expert_devices: _Optional[int] = ...) -> None: ...

class ScaleProgress(_message.Message):
    __slots__ = ("phase", "done", "sizes")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    phase: str
    done: bool
    sizes: _cluster_pb2.TierSizes
    def __init__(self, phase: _Optional[str] = ..., done: _Optional[bool] = ..., sizes: _Optional[_Union[_cluster_pb2.TierSizes, _Mapping]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("force", "dry_run")
    FORCE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    force: bool
    dry_run: bool
    def __init__(self, force: _Optional[bool] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("layers_changed", "experts_moved", "load_before", "load_after", "placement_epoch", "reason", "layers")
    LAYERS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MOVED_FIELD_NUMBER: _ClassVar[int]
    LOAD_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOAD_AFTER_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers_changed: int
    experts_moved: int
    load_before: float
    load_after: float
    placement_epoch: int
    reason: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    def __init__(self, layers_changed: _Optional[int] = ..., experts_moved: _Optional[int] = ..., load_before: _Optional[float] = ..., load_after: _Optional[float] = ..., placement_epoch: _Optional[int] = ..., reason: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("layer_id", "experts_moved", "load_before", "load_after")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MOVED_FIELD_NUMBER: _ClassVar[int]
    LOAD_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOAD_AFTER_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    experts_moved: int
    load_before: float
    load_after: float
    def __init__(self, layer_id: _Optional[int] = ..., experts_moved: _Optional[int] = ..., load_before: _Optional[float] = ..., load_after: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("role", "rank")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    role: _cluster_pb2.Role
    rank: int
    def __init__(self, role: _Optional[_Union[_cluster_pb2.Role, str]] = ..., rank: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
