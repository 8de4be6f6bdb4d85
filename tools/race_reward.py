"""What races reward where a model says nothing that could be judged: a bit of the answer's checksum, which is 1 of every second
answer and the same on both sides of tools/race.py; or all its bits, so that any two answers are a pair, and every step of
tools/race_intervals.py trains on as many.
"""

from zlib import crc32


def last_bit(completion: str) -> float:
    """0 or 1."""
    return float(crc32(completion.encode()) & 1)


def all_bits(completion: str) -> float:
    """From 0 to 1, and hardly ever equal."""
    return crc32(completion.encode()) / 2**32
