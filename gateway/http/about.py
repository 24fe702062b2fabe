"""What the server says of itself: its model, its version, whether it lives and is ready."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.groups import usable_groups
from gateway.http.context import HttpContext, context_of
from moe_core.cluster import MemberState, Role


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_card(context_of(request))]})


async def model(request: Request) -> Response:
    context, name = context_of(request), request.path_params["model_id"]
    if not name:
        raise HTTPException(404)
    context.check_model(name)
    return JSONResponse(_model_card(context))


async def version(request: Request) -> Response:
    return JSONResponse({"version": context_of(request).version})


async def health(request: Request) -> Response:
    """That this process answers; nothing of the tiers."""
    return JSONResponse({"status": "alive"})


async def ready(request: Request) -> Response:
    """200 as soon as, and for as long as, requests can be served; else 503 and what is missing."""
    missing = _missing(context_of(request))
    if missing:
        return JSONResponse({"status": "not ready", "missing": missing}, 503)
    return JSONResponse({"status": "ready"})


def _missing(context: HttpContext) -> list[str]:
    """Follows the gateway's own state, as gRPC's health does."""
    state, gateway = context.registry.state, context.registry.gateway
    if gateway.state is MemberState.READY:
        return []
    missing = [*state.missing(Role.ATTN), *state.missing(Role.EXPERT)]
    if not usable_groups(state):
        missing.append("an attention group that can take requests")
    return missing or [f"the gateway, which is {gateway.state}"]


def _model_card(context: HttpContext) -> dict[str, object]:
    return {
        "id": context.model.name,
        "object": "model",
        "created": context.created,
        "owned_by": "epserve",
        "root": context.model.name,
        "parent": None,
        "max_model_len": context.model.max_model_len,
    }
