"""Who is in which channel, by process: what every process knows of all the others.

Pure: no clock, no thread, no event loop; the caller keeps others out. A client may be in a channel by several processes at
once, for a while, when it goes from one to another: it is one member, and gone when the last of them says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple


class Member(NamedTuple):
    """One client that follows a channel. ``user`` is its user's primary key, as JSON has it, and ``name`` what
    ``get_username()`` says; None for those who are not logged in. ``id`` tells clients apart, and nothing else of them.
    """

    id: str
    user: int | str | None = None
    name: str | None = None


Entry = tuple[str, Member]


class Roll:
    """The members of all channels. A process that is not in ``processes`` is not known, one without members is."""

    def __init__(self) -> None:
        #: By process, by channel, by id.
        self.processes: dict[str, dict[str, dict[str, Member]]] = {}
        # By channel, by id, the longest present first; with the number of processes by which it is there.
        self._channels: dict[str, dict[str, tuple[Member, int]]] = {}
        #: Channels whose members are not those that they were; whoever tells of them takes them out.
        self.changed: set[str] = set()

    def join(self, process: str, channel: str, member: Member) -> bool:
        """Whether that was not known."""
        there = self.processes.setdefault(process, {}).setdefault(channel, {})
        before = there.get(member.id)
        if before == member:
            return False
        there[member.id] = member
        members = self._channels.setdefault(channel, {})
        shown, count = members.get(member.id, (None, 0))
        members[member.id] = member, count + (before is None)
        if shown != member:
            self.changed.add(channel)
        return True

    def leave(self, process: str, channel: str, id: str) -> bool:
        """Whether it was there."""
        channels = self.processes.get(process, {})
        if channels.get(channel, {}).pop(id, None) is None:
            return False
        if not channels[channel]:
            del channels[channel]
        members = self._channels[channel]
        member, count = members[id]
        if count > 1:
            members[id] = member, count - 1
            return True
        del members[id]
        if not members:
            del self._channels[channel]
        self.changed.add(channel)
        return True

    def replace(self, process: str, entries: Iterable[Entry]) -> None:
        """The process has these members, and no others; who was there and is, has never left."""
        self.processes.setdefault(process, {})
        wanted = set()
        for channel, member in entries:
            wanted.add((channel, member.id))
            self.join(process, channel, member)
        for channel, member in self.entries(process):
            if (channel, member.id) not in wanted:
                self.leave(process, channel, member.id)

    def remove(self, process: str) -> None:
        """The process is gone, and with it its members."""
        self.replace(process, ())
        del self.processes[process]

    def entries(self, process: str) -> list[Entry]:
        there = self.processes.get(process, {})
        return [(channel, member) for channel in there for member in there[channel].values()]

    def channels(self) -> Iterable[str]:
        """Those in which somebody is."""
        return self._channels

    def count(self, channel: str) -> int:
        return len(self._channels.get(channel, ()))

    def members(self, channel: str, most: int | None = None) -> list[Member]:
        """The longest present first."""
        members = self._channels.get(channel, {}).values()
        return [member for member, _ in islice(members, most)]

    def holders(self, channel: str) -> list[str]:
        """The processes by which somebody is there."""
        return [process for process, there in self.processes.items() if channel in there]
