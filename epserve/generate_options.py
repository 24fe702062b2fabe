"""The options of `epserve generate`, and how the texts among them are read.

Knows names, help texts and notation; knows nothing of what a value does to a text.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from moe_core.errors import ConfigError

PROMPT, SAMPLING, ENDING, OUTPUT = "Prompt", "Sampling", "Where to end", "Output"

PromptOption = Annotated[str | None, typer.Option(help="Text to continue.", rich_help_panel=PROMPT)]
PromptIdsOption = Annotated[
    str | None, typer.Option(help="Token ids to continue, as in 1,2,3.", rich_help_panel=PROMPT)
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(help="Tokens to generate at most. Default: what fits.", rich_help_panel=ENDING),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="0 takes the likeliest token. Default: 1.", rich_help_panel=SAMPLING),
]
TopPOption = Annotated[
    float | None, typer.Option(help="Smallest set with this mass.", rich_help_panel=SAMPLING)
]
TopKOption = Annotated[
    int | None, typer.Option(help="Only the k likeliest; 0: all.", rich_help_panel=SAMPLING)
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        help="Only those this likely, relative to the likeliest.", rich_help_panel=SAMPLING
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(help="Repeats a random choice.", rich_help_panel=SAMPLING)
]
StopOption = Annotated[
    list[str] | None, typer.Option(help="Text to stop at; repeatable.", rich_help_panel=ENDING)
]
StopTokenIdsOption = Annotated[
    str | None, typer.Option(help="Token ids to stop at, as in 1,2,3.", rich_help_panel=ENDING)
]
IgnoreEosOption = Annotated[
    bool,
    typer.Option(
        "--ignore-eos", help="Go on after an end-of-sequence token.", rich_help_panel=ENDING
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        help="Above 1: less of what was there, prompt included.", rich_help_panel=SAMPLING
    ),
]
PresencePenaltyOption = Annotated[
    float | None,
    typer.Option(help="Above 0: less of what was generated.", rich_help_panel=SAMPLING),
]
FrequencyPenaltyOption = Annotated[
    float | None,
    typer.Option(help="Above 0: less of it, the more often it was.", rich_help_panel=SAMPLING),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        help="With --json: logprobs, and of so many likeliest tokens.", rich_help_panel=OUTPUT
    ),
]
PromptLogprobsOption = Annotated[
    int | None,
    typer.Option(
        help="As --logprobs, of the prompt's tokens; --max-tokens 0 leaves it at that.",
        rich_help_panel=OUTPUT,
    ),
]
LogitBiasOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Token id and what to add to its logit, as in 15=-2.5; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
MinTokensOption = Annotated[
    int | None, typer.Option(help="No stopping before so many.", rich_help_panel=ENDING)
]
NumChoicesOption = Annotated[
    int | None, typer.Option(help="Completions of the prompt. Default: 1.", rich_help_panel=OUTPUT)
]


def token_ids(option: str, text: str | None) -> tuple[int, ...]:
    """Token ids separated by commas; none where the option was not given. Raises ConfigError."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(option, text, "must be token ids separated by commas", ["1,2,3"])
    return tuple(map(int, parts))


def logit_bias(texts: Sequence[str]) -> dict[int, float]:
    """Each as in 15=-2.5: a token id and what is added to its logit. Raises ConfigError."""
    biases: dict[int, float] = {}
    for text in texts:
        token_id, _, bias = text.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise ConfigError(
                "logit_bias", text, "must be a token id, = and a number", ["15=-2.5"]
            ) from None
    return biases
