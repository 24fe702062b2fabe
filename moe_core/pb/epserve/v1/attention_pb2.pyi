from moe_core.pb.epserve.v1 import expert_pb2 as _expert_pb2
from moe_core.pb.epserve.v1 import logprobs_pb2 as _logprobs_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineRequest(_message.Message):
    __slots__ = ("add", "abort", "park")
    ADD_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PARK_FIELD_NUMBER: _ClassVar[int]
    add: AddSequence
    abort: AbortSequence
    park: ParkSequence
    def __init__(self, add: _Optional[_Union[AddSequence, _Mapping]] = ..., abort: _Optional[_Union[AbortSequence, _Mapping]] = ..., park: _Optional[_Union[ParkSequence, _Mapping]] = ...) -> None: ...

class AddSequence(_message.Message):
    __slots__ = ("sequence_id", "prompt_ids", "sampling", "priority", "output_ids", "traceparent", "take_over", "kv_source")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TAKE_OVER_FIELD_NUMBER: _ClassVar[int]
    KV_SOURCE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: EngineSampling
    priority: int
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    traceparent: str
    take_over: bool
    kv_source: KvSource
    def __init__(self, sequence_id: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[EngineSampling, _Mapping]] = ..., priority: _Optional[int] = ..., output_ids: _Optional[_Iterable[int]] = ..., traceparent: _Optional[str] = ..., take_over: _Optional[bool] = ..., kv_source: _Optional[_Union[KvSource, _Mapping]] = ...) -> None: ...

class KvSource(_message.Message):
    __slots__ = ("dp_rank", "instance_epoch", "parked")
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    dp_rank: int
    instance_epoch: int
    parked: ParkedKv
    def __init__(self, dp_rank: _Optional[int] = ..., instance_epoch: _Optional[int] = ..., parked: _Optional[_Union[ParkedKv, _Mapping]] = ...) -> None: ...

class ParkedKv(_message.Message):
    __slots__ = ("num_tokens", "block_ids")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_tokens: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineSampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "index", "stop_token_ids", "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    index: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    prompt_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., index: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_tokens: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class AbortSequence(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class ParkSequence(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class FetchBlocksRequest(_message.Message):
    __slots__ = ("dp_rank", "instance_epoch", "block_ids", "own_blocks", "timeout_ms", "leader_instance_epoch")
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    OWN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    LEADER_INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    dp_rank: int
    instance_epoch: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    own_blocks: _containers.RepeatedScalarFieldContainer[int]
    timeout_ms: int
    leader_instance_epoch: int
    def __init__(self, dp_rank: _Optional[int] = ..., instance_epoch: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., own_blocks: _Optional[_Iterable[int]] = ..., timeout_ms: _Optional[int] = ..., leader_instance_epoch: _Optional[int] = ...) -> None: ...

class FetchBlocksResponse(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class FindRequest(_message.Message):
    __slots__ = ("sequence_ids",)
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sequence_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class FindResponse(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[FoundSequence]
    def __init__(self, sequences: _Optional[_Iterable[_Union[FoundSequence, _Mapping]]] = ...) -> None: ...

class FoundSequence(_message.Message):
    __slots__ = ("sequence_id", "seed")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    seed: int
    def __init__(self, sequence_id: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("step", "outputs")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, step: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "finish_reason", "error_code", "error", "logprobs", "num_cached_tokens", "queued_us", "go_elsewhere", "prompt_logprobs", "parked")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    GO_ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    error_code: str
    error: str
    logprobs: _containers.RepeatedCompositeFieldContainer[_logprobs_pb2.TokenLogprobs]
    num_cached_tokens: int
    queued_us: int
    go_elsewhere: bool
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_logprobs_pb2.TokenLogprobs]
    parked: ParkedKv
    def __init__(self, sequence_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., error_code: _Optional[str] = ..., error: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[_logprobs_pb2.TokenLogprobs, _Mapping]]] = ..., num_cached_tokens: _Optional[int] = ..., queued_us: _Optional[int] = ..., go_elsewhere: _Optional[bool] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_logprobs_pb2.TokenLogprobs, _Mapping]]] = ..., parked: _Optional[_Union[ParkedKv, _Mapping]] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("tp_rank", "leader_instance_epoch", "num_blocks", "block_size")
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    LEADER_INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    tp_rank: int
    leader_instance_epoch: int
    num_blocks: int
    block_size: int
    def __init__(self, tp_rank: _Optional[int] = ..., leader_instance_epoch: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step", "placement_epoch", "sequences", "num_microbatches")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    step: int
    placement_epoch: int
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceSlice]
    num_microbatches: int
    def __init__(self, step: _Optional[int] = ..., placement_epoch: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SequenceSlice, _Mapping]]] = ..., num_microbatches: _Optional[int] = ...) -> None: ...

class SequenceSlice(_message.Message):
    __slots__ = ("token_ids", "num_computed_tokens", "block_table", "needs_logits", "asked_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_LOGITS_FIELD_NUMBER: _ClassVar[int]
    ASKED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_computed_tokens: int
    block_table: _containers.RepeatedScalarFieldContainer[int]
    needs_logits: bool
    asked_logprobs: AskedLogprobs
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_computed_tokens: _Optional[int] = ..., block_table: _Optional[_Iterable[int]] = ..., needs_logits: _Optional[bool] = ..., asked_logprobs: _Optional[_Union[AskedLogprobs, _Mapping]] = ...) -> None: ...

class AskedLogprobs(_message.Message):
    __slots__ = ("token_ids", "num_top")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_top: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_top: _Optional[int] = ...) -> None: ...
