"""From a command's options to the dataclass that whatever it starts is given.

Knows that both go by the same names; knows no option and no setting itself.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

import typer

from moe_core.config.parallel import ParallelConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Settings = TypeVar("_Settings", bound="DataclassInstance")


def settings_from(context: typer.Context, kind: type[_Settings], **known: object) -> _Settings:
    """Settings of which each field has the value of the command's option of that name.

    `known` are fields that no option gives as it is; what has neither keeps its default. Raises
    ConfigError.
    """
    named = {field.name for field in fields(kind)} & context.params.keys()
    return kind(**{name: context.params[name] for name in named} | known)


def parallel_from(context: typer.Context) -> ParallelConfig:
    """How the two tiers are cut. Raises ConfigError."""
    return settings_from(context, ParallelConfig)
