"""Small plots as PNG files, drawn with numpy.

A plotting library would be the package's largest dependency for a few pictures.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from math import ceil, log10
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

_WIDTH, _HEIGHT, _MARGIN, _SCALE = 640, 480, 56, 2
INK: Colour = (40, 40, 40)
_GRID = (220, 220, 220)
_SERIES: tuple[Colour, ...] = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (23, 190, 207),
)
# 3 x 5 pixels a character: rows from the top, three bits each.
_GLYPHS = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1), "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7), ".": (0, 0, 0, 0, 2), "-": (0, 0, 7, 0, 0),
    "a": (0, 3, 5, 5, 3), "b": (4, 6, 5, 5, 6), "c": (0, 3, 4, 4, 3), "d": (1, 3, 5, 5, 3),
    "e": (2, 5, 7, 4, 3), "f": (1, 2, 7, 2, 2), "g": (3, 5, 3, 1, 6), "h": (4, 4, 6, 5, 5),
    "i": (2, 0, 2, 2, 2), "j": (1, 0, 1, 5, 2), "k": (4, 5, 6, 5, 5), "l": (6, 2, 2, 2, 7),
    "m": (0, 7, 7, 5, 5), "n": (0, 6, 5, 5, 5), "o": (0, 2, 5, 5, 2), "p": (6, 5, 6, 4, 4),
    "q": (3, 5, 3, 1, 1), "r": (0, 6, 5, 4, 4), "s": (3, 4, 2, 1, 6), "t": (2, 7, 2, 2, 1),
    "u": (0, 5, 5, 5, 7), "v": (0, 5, 5, 5, 2), "w": (0, 5, 5, 7, 7), "x": (0, 5, 2, 2, 5),
    "y": (5, 5, 3, 1, 6), "z": (0, 7, 1, 4, 7),
}  # fmt: skip
_BLANK = (0, 0, 0, 0, 0)


class Plot:
    """Axes from 0 to ``right`` and from 0 to ``top``; points are given in those units."""

    def __init__(
        self, x_label: str, y_label: str, right: float, ticks: Sequence[float], top: float = 1.0
    ) -> None:
        self._right, self._top = right, top
        self.pixels: NDArray[np.uint8] = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
        for fifth in range(6):
            y = top * fifth / 5
            self.line((0, y), (right, y), _GRID)
            self._text(f"{y:.1f}" if top < 10 else f"{y:.0f}", 20, self._y(y) - 5)
        for tick in ticks:
            self.line((tick, 0), (tick, top), _GRID)
            self._text(f"{tick:g}", self._x(tick) - 4, _HEIGHT - _MARGIN + 8)
        self.line((0, 0), (right, 0), INK)
        self.line((0, 0), (0, top), INK)
        self._text(x_label, _WIDTH // 2 - 40, _HEIGHT - 24)
        self._text(y_label, 20, 16)

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: Colour) -> None:
        """A straight line, one pixel wide."""
        xs, ys = (self._x(start[0]), self._x(end[0])), (self._y(start[1]), self._y(end[1]))
        count = max(abs(xs[1] - xs[0]), abs(ys[1] - ys[0])) + 1
        columns = np.linspace(xs[0], xs[1], count).round().astype(int)
        rows = np.linspace(ys[0], ys[1], count).round().astype(int)
        self.pixels[rows, columns] = colour

    def series(self, points: Sequence[tuple[float, float]], number: int, name: str) -> None:
        """Points joined by lines, with a mark on each and the name in the series' colour."""
        colour = _SERIES[number % len(_SERIES)]
        for a, b in pairwise(points):
            self.line(a, b, colour)
        for x, y in points:
            column, row = self._x(x), self._y(y)
            self.pixels[row - 3 : row + 4, column - 3 : column + 4] = colour
        self._text(name, _legend_column(name), 16 + 14 * number, colour)

    def write(self, path: Path) -> None:
        """Write the picture as an 8-bit RGB PNG."""
        height, width, _ = self.pixels.shape
        lines = b"".join(b"\0" + row.tobytes() for row in self.pixels)
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(k, d) for k, d in chunks))

    def _x(self, value: float) -> int:
        return _MARGIN + round(value / self._right * (_WIDTH - 2 * _MARGIN))

    def _y(self, value: float) -> int:
        return _HEIGHT - _MARGIN - round(value / self._top * (_HEIGHT - 2 * _MARGIN))

    def _text(self, text: str, column: int, row: int, colour: Colour = INK) -> None:
        for character in text:
            for down, bits in enumerate(_GLYPHS.get(character, _BLANK)):
                for right in range(3):
                    if bits >> (2 - right) & 1:
                        y, x = row + down * _SCALE, column + right * _SCALE
                        self.pixels[y : y + _SCALE, x : x + _SCALE] = colour
            column += 4 * _SCALE


def _legend_column(name: str) -> int:
    """Where a name starts so that all of it is on the picture."""
    return min(_WIDTH - 130, _WIDTH - 4 * _SCALE * (len(name) + 1))


def rounded_up(value: float) -> float:
    """To the next 1, 2 or 5 times a power of ten: axes of five equal parts read well then."""
    power = 10.0 ** ceil(log10(value)) / 10
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
