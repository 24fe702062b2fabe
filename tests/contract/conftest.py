"""The exchange over each transport in turn."""

from collections.abc import AsyncIterator

import pytest

from support.exchange_ends import Ends


@pytest.fixture(params=["local", "grpc", "nixl"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[Ends]:
    made = Ends(request.param)
    async with made.stack:
        yield made
