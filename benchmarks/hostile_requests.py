"""Requests for a tree as nobody should send them, seeded: bodies, headers, senders."""
from __future__ import annotations

import asyncio
import gzip
import json
import math
import random
import string
import time
import tracemalloc
import zlib

import torch
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from qtd_pack import preview

SETTINGS = {
    "detail_budget": 0.4, "content_threshold": 25.0, "min_leaf": 64, "max_leaf": 1024, "min_denoise": 0.0, "max_denoise": 1.0,
    "metric": "variance", "edits": ""}
JSON = {"Content-Type": "application/json"}
TAG = "<script>alert(1)</script>&\"'"
NASTY = [
    None, True, False, 0, -1, 1, 0.5, 7, 8, 9, 63, 64, 65, 8192, 8193, 1 << 63, -1 << 63, 10 ** 30, -10 ** 400, 10 ** 400, 1e308, -1e308, 1e-320, -0.0, math.nan, math.inf, -math.inf, "", "0.4", TAG,
    "../../../../etc/passwd", "file:///etc/passwd", "\x00", "\ud800", "\u202e", "A" * 5000, [], [[]], {}, {"a": TAG}, [1] * 100]
CODES = {200, 400, 404, 413, 415}
# How a body is said to be packed, and how it is.
PACKINGS = [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZip", gzip.compress), ("gzip, identity", gzip.compress), ("identity, gzip", gzip.compress)]
MANY = b"[" + b"[]," * 1_000_000 + b"[]]"


class Host:
    """What of the host's server a route needs; the routes and the handler are aiohttp's own."""

    def __init__(self):
        self.app = web.Application(client_max_size=1 << 30)
        self.routes = web.RouteTableDef()
        preview.add_route(self)
        self.app.add_routes(self.routes)

    @property
    def pictures(self) -> preview.Pictures:
        return self.app[preview.PICTURES]


def picture(seed: int, side: int = 256) -> torch.Tensor:
    return torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(seed))


def edits(draw: random.Random) -> str:
    """What may have been painted, and what may not."""
    squares = [[draw.choice((0, -5, 1e6, 3.5, 10 ** 9, math.nan, "x", None)) if draw.random() < 0.2 else draw.randrange(256) for _ in range(draw.choice((4, 4, 4, 3, 5)))] for _ in range(draw.choice((0, 1, 3, 300)))]
    for square in squares:
        if draw.random() < 0.8 and len(square) == 4:
            square[3] = draw.choice((0, 1, 0.5, None))
    size = draw.choice(([256, 256], [256, 256], [512, 512], [256, 128], [0, 0], [1e9, 1e9], None, "x"))
    text = json.dumps({"size": size, "squares": squares})
    return draw.choice((text, text, text, text[:-3], "[" * 5000, TAG, text * 2, " " * 3))


def body(draw: random.Random, key: str) -> bytes:
    """A request that is right, nearly right, or anything."""
    kind = draw.random()
    if kind < 0.1:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    if kind < 0.15:
        return draw.choice((b"[", b'{"a":', b"[{}", b'"')) * draw.randrange(1, 20_000)
    guess = "".join(draw.choice(string.hexdigits.lower()[:16]) for _ in range(64))
    given = {"picture": draw.choice((key, key, key, key, guess, key[:-1], key.upper(), TAG, None, 3)), **SETTINGS}
    for name in draw.sample(sorted(SETTINGS), draw.choice((0, 0, 0, 1, 1, 2))):
        given[name] = draw.choice(NASTY)
    if draw.random() < 0.3:
        given["edits"] = edits(draw)
    if draw.random() < 0.1:
        del given[draw.choice(sorted(given))]
    if draw.random() < 0.1:
        given |= {"path": "/etc/passwd", "filename": "../../x", "__proto__": {"a": 1}, TAG: TAG}
    text = json.dumps(given).encode()
    return text[:draw.randrange(len(text))] if draw.random() < 0.1 else text


def sent_as(draw: random.Random, plain: bytes) -> tuple[dict, object]:
    """The headers and the data of a request with this body: mostly as it is, sometimes packed, or without its length."""
    kind = draw.random()
    if kind < 0.9:
        return JSON, plain
    if kind < 0.95:
        return JSON, in_pieces(plain)
    name, pack = draw.choice(PACKINGS)
    return JSON | {"Content-Encoding": name}, pack(draw.choice((plain, MANY)))


async def in_pieces(plain: bytes):
    """A body whose length is not told before."""
    for start in range(0, len(plain), 1000):
        yield plain[start:start + 1000]


def check_answer(status: int, text: str, kind: str, sent: bytes, others: list[str]) -> None:
    """Raise AssertionError unless it is an answer of ours that gives nothing away."""
    assert status in CODES, (status, sent[:300])
    assert kind == "application/json" and not any(sign in text for sign in "<>&"), (text[:300], sent[:300])
    answer = json.loads(text, parse_constant=lambda name: AssertionError(name))
    assert ("leaves" in answer) == (status == 200) and ("error" in answer) == (status != 200)
    assert not any(secret in text for secret in ("/etc", "Traceback", ".py", *others)) or b"etc/passwd" in sent, (text[:300], sent[:300])
    assert len(text) < 5_000_000


def fuzzed(requests: int, seed: int = 0) -> dict:
    """Send so many bodies to the real handler. Returns how often each status came, the longest answer time and the bytes that were left and held at most."""
    return asyncio.run(_fuzzed(requests, seed))


async def _fuzzed(requests: int, seed: int) -> dict:
    draw, host = random.Random(seed), Host()
    keys = [host.pictures.keep(preview.measure(picture(number), 64)) for number in range(3)]
    counts: dict[int, int] = {}
    slowest, length = 0.0, 0
    async with TestServer(host.app) as server, ClientSession() as client:
        url = server.make_url(preview.ROUTE)
        tracemalloc.start()
        for number in range(requests):
            sent = body(draw, keys[0])
            headers, data = sent_as(draw, sent)
            start = time.monotonic()
            async with client.post(url, data=data, headers=headers) as response:
                text = await response.text()
            slowest, length = max(slowest, time.monotonic() - start), max(length, len(text))
            check_answer(response.status, text, response.content_type, sent, keys[1:])
            counts[response.status] = counts.get(response.status, 0) + 1
            if number == requests // 2:
                tracemalloc.reset_peak()
                half = tracemalloc.get_traced_memory()[0]
        left, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(host.pictures._kept) == 3
    return {"statuses": counts, "slowest": slowest, "longest": length, "grown": left - half, "peak": peak - half}


def route_part() -> list[tuple[str, int, str]]:
    """Hostile requests to the route that draws trees, through aiohttp's own server: what was answered, and what it took.

    Raises AssertionError for an answer that is not ours, echoes a tag, or tells of anything else.
    """
    requests = 10_000
    found = fuzzed(requests)
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(found["statuses"].items()))
    return [(
        "seeded bodies, from right to anything", requests,
        f"answers {statuses}; none with a tag, a path, a trace or another picture's key; the slowest took {found['slowest']:.2f} s, the longest has {found['longest'] / 1000:.0f} kB; "
        f"in the second half memory grew by {found['grown'] / 1000:.0f} kB and was at most {found['peak'] / 2 ** 20:.1f} MiB above")]
