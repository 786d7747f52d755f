from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from tornjango.comet.brokers.base import Draft
from tornjango.comet.log import EPOCH_BYTES, Message, Position


class MemoryBroker:
    """Numbers the messages of one process, whose logs are all there is: other processes neither see nor outlive them.

    It needs no threads and never waits, so it is no `Broker`: a message is delivered as it is published.
    """

    name = "memory"

    def __init__(self) -> None:
        self.end = Position(secrets.token_bytes(EPOCH_BYTES), 0)

    def number(self, drafts: Sequence[Draft]) -> list[Message]:
        """One caller at a time."""
        now = time.monotonic()
        epoch, offset = self.end
        self.end = Position(epoch, offset + len(drafts))
        return [
            Message(draft.channel.name, offset + n, now, draft.body, draft.audience)
            for n, draft in enumerate(drafts, 1)
        ]
