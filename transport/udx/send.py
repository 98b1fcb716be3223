"""Bytes written to a stream, kept by reference until they are acknowledged."""

from __future__ import annotations

from bisect import bisect_right

from ..transmit import Buffer
from .packet import cells

#: A packet made of more pieces than this is joined: the kernel takes 1024 pieces a call, and a run
#: has up to 64 packets.
_MAX_PIECES = 4


class SendBuffer:
    """A queue of buffers addressed by stream offset: how many bytes were written before."""

    __slots__ = ("_chunks", "_starts", "end")

    def __init__(self) -> None:
        #: Offset behind the last byte written.
        self.end = 0
        self._chunks: list[memoryview] = []
        self._starts: list[int] = []

    def append(self, data: Buffer) -> None:
        """Queue bytes behind those already there."""
        view = memoryview(data)
        if view.itemsize != 1 or view.ndim != 1:
            view = view.cast("B")
        if not view:
            return
        self._chunks.append(view)
        self._starts.append(self.end)
        self.end += len(view)

    def last_piece(self, offset: int) -> memoryview | None:
        """All from ``offset`` on, if it was appended in one piece."""
        return self._chunks[-1] if self._starts and self._starts[-1] == offset else None

    def pieces(self, offset: int, size: int) -> list[Buffer]:
        """The ``size`` bytes at ``offset``, as few slices as possible."""
        index = bisect_right(self._starts, offset) - 1
        found: list[Buffer] = []
        while size > 0:
            begin = offset - self._starts[index]
            piece = self._chunks[index][begin : begin + size]
            found.append(piece)
            offset += len(piece)
            size -= len(piece)
            index += 1
        return found if len(found) <= _MAX_PIECES else [b"".join(found)]

    def cut(self, offset: int, length: int, size: int) -> list[Buffer]:
        """The ``length`` bytes at ``offset`` as packets of ``size`` bytes, the last of which may be
        shorter; each in one piece."""
        packets: list[Buffer] = []
        end = offset + length
        index = bisect_right(self._starts, offset) - 1
        while offset < end:
            chunk, begin = self._chunks[index], offset - self._starts[index]
            # All packets that lie in this chunk as a whole, and then one that does not.
            inside = min(len(chunk) - begin, end - offset)
            inside -= inside % size if offset + inside < end else 0
            whole = inside // size
            if whole:
                packets += cells(chunk, begin, size, whole)
            if inside % size:
                packets.append(chunk[begin + whole * size : begin + inside])
            offset += inside
            if offset < end:
                packets.append(b"".join(self.pieces(offset, min(size, end - offset))))
                offset = min(offset + size, end)
                index = bisect_right(self._starts, offset) - 1
        return packets

    def release(self, offset: int) -> None:
        """Let go of the buffers that lie before ``offset`` as a whole."""
        if offset >= self.end:
            self.clear()
            return
        index = bisect_right(self._starts, offset) - 1
        if index > 0:
            del self._chunks[:index]
            del self._starts[:index]

    def clear(self) -> None:
        """Let go of all buffers."""
        self._chunks.clear()
        self._starts.clear()
