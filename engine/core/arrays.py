"""Rows of token ids and of log-probs, 4 bytes a number from the engine that sampled them to the packed row that trains on them:
immutable, equal and hashed by their bits, and pickled as bytes, so that a million of them are one object and not a million.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar, overload

if TYPE_CHECKING:  # what only names prompts or rewards starts without it
    import numpy as np

N = TypeVar("N", int, float)

ITEM_BYTES = 4
AT_ONCE = 1 << 15  # numbers that are added at once
FRACTION_BITS, EXPONENTS, SMALLEST_BITS = 23, 256, 149  # of a float32; its smallest number is 2^-149
KINDS = 2 * EXPONENTS  # with a sign


@dataclass(frozen=True, slots=True, repr=False)
class Numbers(Sequence[N]):
    """Numbers of one kind, in the machine's byte order. Whoever iterates gets Python numbers; `array` costs nothing."""

    data: bytes

    CODE: ClassVar[str]  # of the kind, as the module array names it
    DTYPE: ClassVar[str]  # and as numpy does

    @classmethod
    def of(cls, values: Iterable[N]) -> Self:
        """Of Python numbers; OverflowError for an integer that 32 bits do not hold."""
        assert not isinstance(values, bytes), "array would take them for its memory"
        return cls(array(cls.CODE, values).tobytes())

    @classmethod
    def copied(cls, values: np.ndarray) -> Self:
        """Of an array [T] of the same kind."""
        assert values.dtype == cls.DTYPE and values.ndim == 1, (values.dtype, values.shape, cls.DTYPE)
        return cls(values.tobytes())

    @classmethod
    def joined(cls, rows: Iterable[Self]) -> Self:
        """Rows one after another."""
        return cls(b"".join(row.data for row in rows))

    def parted(self, lengths: Iterable[int]) -> list[Self]:
        """Rows of such lengths, one after another, which are all of it."""
        places = list(accumulate(lengths, initial=0))
        assert places[-1] == len(self), (places[-1], len(self))
        parts = pairwise(place * ITEM_BYTES for place in places)
        return [type(self)(self.data[start:end]) for start, end in parts]

    @property
    def array(self) -> np.ndarray:
        """The same memory as an array [T] that cannot be written."""
        import numpy as np

        return np.frombuffer(self.data, self.DTYPE)

    def __len__(self) -> int:
        return len(self.data) // ITEM_BYTES

    def __iter__(self) -> Iterator[N]:
        return iter(self._view())

    @overload
    def __getitem__(self, place: int) -> N: ...

    @overload
    def __getitem__(self, place: slice) -> Self: ...

    def __getitem__(self, place: int | slice) -> N | Self:
        found = self._view()[place]
        return type(self)(found.tobytes()) if isinstance(found, memoryview) else found

    def __repr__(self) -> str:
        return f"{type(self).__name__}.of({list(self)})"

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        return type(self), (self.data,)

    def _view(self) -> memoryview[N]:
        return memoryview(self.data).cast(self.CODE)  # type: ignore[call-overload, no-any-return]


class TokenIds(Numbers[int]):
    """Token ids, int32."""

    __slots__ = ()
    CODE, DTYPE = "i", "int32"


class LogProbs(Numbers[float]):
    """Log-probs of tokens, natural logarithm, float32 as engines compute them."""

    __slots__ = ()
    CODE, DTYPE = "f", "float32"


NO_TOKENS, NO_LOG_PROBS = TokenIds(b""), LogProbs(b"")


def exact_sum(rows: Iterable[LogProbs]) -> float:
    """The sum of all numbers, finite ones, rounded once: what math.fsum gives, without a Python number for each.

    A float32 is a whole number of 24 bits times a power of two (IEEE 754). Those of one sign and exponent are added as whole
    numbers, exactly, and the sums of all exponents as one Python integer, which is divided once.
    """
    import numpy as np

    bits = np.frombuffer(LogProbs.joined(rows).data, np.uint32)
    sums, counts = np.zeros(KINDS, np.int64), np.zeros(KINDS, np.int64)
    for start in range(0, bits.size, AT_ONCE):
        some = bits[start : start + AT_ONCE]
        kinds = (some >> FRACTION_BITS).astype(np.intp)  # sign and exponent
        fractions = (some & ((1 << FRACTION_BITS) - 1)).astype(np.float64)  # so few of them add up exactly
        sums += np.bincount(kinds, fractions, KINDS).astype(np.int64)
        counts += np.bincount(kinds, minlength=KINDS)
    total = 0  # in units of the smallest number
    for kind in counts.nonzero()[0].tolist():
        whole, exponent = int(sums[kind]), kind % EXPONENTS
        if exponent:  # else numbers without the leading bit that is not written
            whole = (whole + (int(counts[kind]) << FRACTION_BITS)) << (exponent - 1)
        total += whole if kind < EXPONENTS else -whole
    return total / (1 << SMALLEST_BITS)
