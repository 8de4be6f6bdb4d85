"""What tools/race.py rewards where a model says nothing that could be judged: a bit of the answer's checksum, which is 1 of
every second answer and the same on both sides of the race.
"""

from zlib import crc32


def last_bit(completion: str) -> float:
    """0 or 1."""
    return float(crc32(completion.encode()) & 1)
