"""What every route of one app has at hand: the parts it was made from, and who is asking."""

from dataclasses import dataclass, field

from starlette.requests import Request

from gateway.admission import ServedModel
from gateway.callers import Caller
from gateway.cluster import Registry
from gateway.generation import Generator
from gateway.http.chat_template import ChatTemplate
from gateway.http.event_writer import StepWrites
from moe_core.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class HttpContext:
    """created: when this app was made, in seconds since 1970, as OpenAI dates models.
    writes: those of all streams."""

    generator: Generator
    registry: Registry
    chat_template: ChatTemplate | None
    max_body_bytes: int
    created: int
    version: str
    writes: StepWrites = field(default_factory=StepWrites)

    @property
    def model(self) -> ServedModel:
        return self.generator.model

    def check_model(self, name: str | None) -> None:
        """Raises NotFoundError; no name stands for the one model that is served."""
        if name and name != self.model.name:
            raise NotFoundError(f"model={name!r}: this server has {self.model.name!r}")


def context_of(request: Request) -> HttpContext:
    context: HttpContext = request.app.state.context
    return context


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller
