"""Ways in which a file may come to be another than it was. Each takes its bytes and those of other files."""

from __future__ import annotations

import random


def flip(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data[:draw.randrange(len(data))]


def lengthen(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data + draw.randbytes(draw.choice((1, 512, 4096)))


def replace_some(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    first = draw.randrange(len(data))
    length = draw.randrange(1, 64)
    return data[:first] + draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length))) + data[first + length:]


def replace_all(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return draw.choice((b"", b"{}", b"[]", b"null", draw.randbytes(700), bytes(2048)))


def swap(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return draw.choice(others)


def other_digit(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Another digit or letter: what is still well-formed, and wrong."""
    places = [place for place, byte in enumerate(data) if chr(byte).isalnum()]
    place = draw.choice(places)
    return data[:place] + draw.choice(b"0123456789abcdefz").to_bytes() + data[place + 1:]


MUTATIONS = (flip, cut, lengthen, replace_some, replace_all, swap, other_digit)
