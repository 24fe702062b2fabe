"""What the engine says of a sequence, as messages."""

import pytest

from attn_service.sequence import FinishReason, SequenceOutput, StepOutput, TokenLogprobs
from attn_service.sequence_messages import output_to_pb
from moe_core.parked_kv import ParkedKv
from moe_core.pb.epserve.v1 import attention_pb2 as pb
from moe_core.pb.epserve.v1 import logprobs_pb2

TOLD = TokenLogprobs(7, -0.5, 2, (3, 7), (-0.25, -0.5))
TOLD_MESSAGE = logprobs_pb2.TokenLogprobs(
    token_id=7, logprob=-0.5, rank=2, top_token_ids=[3, 7], top_logprobs=[-0.25, -0.5]
)
CASES = {
    "one token": (
        SequenceOutput("a", (7,)),
        pb.SequenceOutput(sequence_id="a", token_ids=[7]),
    ),
    "a first token that did not queue": (
        SequenceOutput("a", (7,), num_cached_tokens=16, queued_us=0),
        pb.SequenceOutput(sequence_id="a", token_ids=[7], num_cached_tokens=16, queued_us=0),
    ),
    "logprobs": (
        SequenceOutput("a", (7,), logprobs=(TOLD,), prompt_logprobs=(TOLD, TOLD)),
        pb.SequenceOutput(
            sequence_id="a",
            token_ids=[7],
            logprobs=[TOLD_MESSAGE],
            prompt_logprobs=[TOLD_MESSAGE, TOLD_MESSAGE],
        ),
    ),
    "the end with its tokens": (
        SequenceOutput("a", (7, 8), FinishReason.STOP),
        pb.SequenceOutput(sequence_id="a", token_ids=[7, 8], finish_reason="stop"),
    ),
    "an error": (
        SequenceOutput(
            "a",
            finish_reason=FinishReason.ERROR,
            error_code="UNAVAILABLE",
            error="no expert 3",
            go_elsewhere=True,
        ),
        pb.SequenceOutput(
            sequence_id="a",
            finish_reason="error",
            error_code="UNAVAILABLE",
            error="no expert 3",
            go_elsewhere=True,
        ),
    ),
    "parked": (
        SequenceOutput("a", finish_reason=FinishReason.PARKED, parked=ParkedKv(6, (4, 2))),
        pb.SequenceOutput(
            sequence_id="a",
            finish_reason="parked",
            parked=pb.ParkedKv(num_tokens=6, block_ids=[4, 2]),
        ),
    ),
    "parked with nothing kept": (
        SequenceOutput("a", finish_reason=FinishReason.PARKED, parked=ParkedKv(0, ())),
        pb.SequenceOutput(sequence_id="a", finish_reason="parked", parked=pb.ParkedKv()),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_says_what_the_output_does(case: str) -> None:
    output, message = CASES[case]
    expected = pb.StepOutput(step=5, outputs=[message, message])
    assert output_to_pb(StepOutput(5, (output, output))) == expected
