"""A checksum nearly as fast as memory is: sums over the rows and over the columns of the words, and the CRC-32 of those sums.

The bytes are seen as rows of 512 words of 64 bits. One word that changes changes the sum of its row and of its column; a word that
moves within its row changes two columns; other contents give other sums but with a chance of ``2^-64``. What does not fill a
row goes into the CRC as it is. (A CRC-32 of all bytes is three times slower and would be most of what a transfer costs.)
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

ROW_WORDS = 512
ROW_BYTES = 8 * ROW_WORDS


def block_checksum(data: npt.NDArray[np.uint8]) -> int:
    """Of a contiguous run of bytes, uint8 [n]; 32 bits. Free of copies."""
    whole = len(data) // ROW_BYTES * ROW_BYTES
    found = zlib.crc32(len(data).to_bytes(8, "little"))
    if whole:
        words = data[:whole].view(np.uint64)
        found = zlib.crc32(np.add.reduceat(words, np.arange(0, len(words), ROW_WORDS)).data, found)
        found = zlib.crc32(np.add.reduce(words.reshape(-1, ROW_WORDS), axis=0).data, found)
    return zlib.crc32(data[whole:].tobytes(), found)
