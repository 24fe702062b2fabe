"""What this process writes to Exchange streams, by kind; hello and welcome excepted.

Knows that every other message goes through a MessageWriter.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moe_core.transport.stream import MessageWriter


@contextmanager
def written_messages() -> Iterator[Counter[str]]:
    """Counted from now on, by both ends if both are in this process."""
    kinds: Counter[str] = Counter()
    send = MessageWriter.send

    def counted(writer: MessageWriter[Any], message: Any) -> None:  # noqa: ANN401
        kinds[message.WhichOneof("kind")] += 1
        send(writer, message)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MessageWriter, "send", counted)
        yield kinds
