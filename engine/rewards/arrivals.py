"""What is to be judged, while it still arrives: who gathers completions puts each here when it has ended, and a reward takes
them in a thread of its own. Every item has a place, so that what is judged does not depend on the order of arrival.

Waiting: who takes waits without a deadline of its own. Who puts has one, and closes the arrivals in any case: as ended, when
everything is here, or as abandoned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from threading import Condition
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from engine.rewards.base import Answer

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class Arriving(Protocol[Item_co]):
    """What a selector loop asks of what arrives; see `Arrivals`."""

    def take_now(self) -> tuple[Mapping[int, Item_co], bool]:
        """What has arrived since the last call, and whether nothing comes behind it."""
        ...

    def telling(self, changed: Callable[[], object]) -> AbstractContextManager[None]:
        """Has `changed` called within the block whenever `take_now` would find something else."""
        ...


class Arrivals(Generic[Item]):
    """Items by their places. One thread puts, another takes. Leaving it as a context ends it, or where something was raised
    abandons it."""

    def __init__(self, *, is_part: bool = False) -> None:
        """`is_part`: whether more of the same step follows in another; what is so of a whole step need not be of it."""
        self.is_part = is_part
        self._changed = Condition()
        self._new: dict[int, Item] = {}
        self._ended = self._abandoned = False
        self._tell: Callable[[], object] | None = None

    @classmethod
    def of(cls, items: Sequence[Item]) -> Self:
        """All of them, which are here already."""
        made = cls()
        with made:
            made.put(dict(enumerate(items)))
        return made

    def put(self, items: Mapping[int, Item]) -> None:
        """Items that have arrived, by their places."""
        with self._changed:
            assert not self._ended, "nothing arrives after the end"
            self._new |= items
            self._notify()

    def abandon(self) -> None:
        """Nobody wants what is judged any more, or not all will come: who takes gets a CancelledError, after the end too."""
        with self._changed:
            self._abandoned = True
            self._notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abandon()
            return
        with self._changed:
            self._ended = True
            self._notify()

    def take(self) -> dict[int, Item] | None:
        """Waits for further items; those that have arrived since the last call, None at the end. CancelledError where the rest
        is abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._new or self._ended or self._abandoned)
            return self._taken() or None

    def take_now(self) -> tuple[dict[int, Item], bool]:
        """The same without waiting, and whether nothing comes behind them."""
        with self._changed:
            return self._taken(), self._ended

    def all(self) -> dict[int, Item]:
        """Waits for the end; all that has not been taken, in the order of places."""
        found: dict[int, Item] = {}
        while (new := self.take()) is not None:
            found |= new
        return dict(sorted(found.items()))

    @contextmanager
    def telling(self, changed: Callable[[], object]) -> Iterator[None]:
        """Has `changed` called within the block whenever `take_now` would find something else, in the thread of who puts."""
        with self._changed:
            self._tell = changed
        try:
            yield
        finally:
            with self._changed:
                self._tell = None

    def _taken(self) -> dict[int, Item]:
        if self._abandoned:
            raise CancelledError
        taken, self._new = self._new, {}
        return taken

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._tell is not None:
            self._tell()


class Groups:
    """Answers that arrive, as groups: those to one prompt with one number (`Answer.group`), by their places. A group arrives
    with the last of its answers (`Answer.group_size`), or at the end where nobody counted them. Its own place is that of its
    first answer. So what is in a group, and in which order, does not depend on when its answers arrived."""

    def __init__(self, answers: Arrivals[Answer]) -> None:
        self._answers = answers
        self._incomplete: dict[tuple[int, str], dict[int, Answer]] = {}
        self.taken: dict[int, dict[int, Answer]] = {}  # the groups so far, by their places

    def take(self) -> dict[int, dict[int, Answer]] | None:
        """As `Arrivals.take`, of groups."""
        while True:
            new = self._answers.take()
            if (found := self._complete(new or {}, is_end=new is None)) or new is None:
                return found or None

    def take_now(self) -> tuple[dict[int, dict[int, Answer]], bool]:
        """As `Arrivals.take_now`, of groups."""
        new, is_end = self._answers.take_now()
        return self._complete(new, is_end=is_end), is_end

    def telling(self, changed: Callable[[], object]) -> AbstractContextManager[None]:
        """As `Arrivals.telling`."""
        return self._answers.telling(changed)

    def _complete(self, new: Mapping[int, Answer], *, is_end: bool) -> dict[int, dict[int, Answer]]:
        for place, answer in new.items():
            self._incomplete.setdefault((answer.group, answer.prompt.id), {})[place] = answer
        keys = self._incomplete.keys() if is_end else {(answer.group, answer.prompt.id) for answer in new.values()}
        found = {}
        for key in list(keys):
            group = self._incomplete[key]
            if is_end or len(group) == next(iter(group.values())).group_size:
                found[min(group)] = dict(sorted(self._incomplete.pop(key).items()))
        self.taken |= found
        return dict(sorted(found.items()))
