"""Workers: what answers at the address of a Ray cluster, and whether it lets in everybody.

Ray's servers speak gRPC, which is HTTP/2 (RFC 9113) with headers as RFC 7541 packs them. One question is asked in bytes
and without a token, so that the answer does not depend on what this process has. It comes before Ray is asked to
connect, which would try for minutes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Literal

from evomem.errors import WorkerError

REACH_SECONDS = 5.0
QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""What every client asks first: answered to anybody where no token is asked for."""
_DATA, _HEADERS, _SETTINGS, _GOAWAY = b"\x00", b"\x01", b"\x04", b"\x07"  # types of frames
_END_STREAM, _END_HEADERS = 1, 4  # flags
_STATUS = b"grpc-status"
_UNAUTHENTICATED = b"16"

Access = Literal["open", "token", "unknown"]


def access(address: str, token: str | None = None) -> Access:
    """Say whom the cluster at HOST:PORT lets in: everybody, or who has its token.

    Parameters
    ----------
    token : what is shown to it; a cluster that is open then is open to who shows this.

    Raises
    ------
    WorkerError : it is no address, nothing answers there, or what answers is not Ray.
    """
    host, port = _parts(address)
    hint = "Is the head node running (ray start --head), is this its port, and is it open to this machine?"
    try:
        with socket.create_connection((host, port), timeout=REACH_SECONDS) as connection:
            connection.sendall(_question(host, token))
            frames = _frames(connection)
            kind, _, _ = next(frames, (b"", 0, b""))
            if kind != _SETTINGS:
                raise WorkerError(f"--address {address}: what answers there is not Ray. {hint}")
            return _judged(frames)
    except (OSError, OverflowError) as error:
        raise WorkerError(f"--address {address}: nothing answers there ({error}). {hint}") from error


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise WorkerError(f"--address {address}: not an address; give auto, or HOST:PORT of the cluster's head node")
    with contextlib.suppress(ImportError, AttributeError):  # a cluster's Ray is at the machine's own address
        from ray._private.services import resolve_ip_for_localhost

        host = resolve_ip_for_localhost(host)
    return host, int(port)


def _judged(frames: Iterator[tuple[bytes, int, bytes]]) -> Access:
    """Return what the answer on stream 1 says: data for everybody, or a refusal."""
    for kind, flags, content in frames:
        if kind == _DATA:
            return "open"
        if kind == _HEADERS and flags & _END_STREAM:  # no data: the status comes with the headers, in plain text
            status = content.partition(_STATUS)[2]
            return "token" if status[1:3] == _UNAUTHENTICATED else "unknown"
        if kind == _GOAWAY:
            break
    return "unknown"


def _frames(connection: socket.socket) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield type, flags and content of the frames that come, until the other side has nothing more to say."""
    buffer = b""

    def have(size: int) -> bool:
        nonlocal buffer
        while len(buffer) < size:
            more = connection.recv(1 << 16)
            if not more:
                return False
            buffer += more
        return True

    while have(9):
        size, kind, flags = int.from_bytes(buffer[:3], "big"), buffer[3:4], buffer[4]
        if kind not in (_DATA, _HEADERS, _SETTINGS, _GOAWAY, b"\x06", b"\x08") or not have(9 + size):
            return  # not HTTP/2
        yield kind, flags, buffer[9 : 9 + size]
        buffer = buffer[9 + size :]


def _question(host: str, token: str | None) -> bytes:
    """Return the client's preface, its settings, and a call of `QUESTION` with an empty message."""
    headers = b"\x83\x86"  # of the table of known headers: POST, http
    headers += b"\x04" + _text(QUESTION) + b"\x01" + _text(host)  # path and authority, by their number there
    headers += b"\x00" + _text("content-type") + _text("application/grpc") + b"\x00" + _text("te") + _text("trailers")
    if token is not None:
        headers += b"\x00" + _text("authorization") + _text(f"Bearer {token}")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, b"")
    return preface + _frame(_HEADERS, _END_HEADERS, 1, headers) + _frame(_DATA, _END_STREAM, 1, bytes(5))


def _frame(kind: bytes, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + kind + bytes([flags]) + struct.pack(">I", stream) + content


def _text(text: str) -> bytes:
    content = text.encode()
    if len(content) < 127:
        return bytes([len(content)]) + content
    more, length = len(content) - 127, b"\x7f"  # the rest in groups of 7 bits, the smallest first
    while more >= 128:
        length, more = length + bytes([more % 128 + 128]), more // 128
    return length + bytes([more]) + content
