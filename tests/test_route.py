"""The route that draws trees, under whatever may be sent to it: bounded in time and memory, and silent about what it was not asked."""
from __future__ import annotations

import asyncio
import gzip
import json
import threading
import zlib

import pytest
import torch
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from conftest import ROOT, load_module

from qtd_pack import preview

hostile = load_module("qtd_hostile_requests", ROOT / "benchmarks" / "hostile_requests.py")
ASKED = json.dumps({"picture": "0" * 64, **hostile.SETTINGS}).encode()


def with_server(use):
    """Run use(host, url, client) beside a server of aiohttp's that has the route."""
    async def run():
        host = hostile.Host()
        async with TestServer(host.app) as server, ClientSession() as client:
            return await use(host, server.make_url(preview.ROUTE), client)

    return asyncio.run(asyncio.wait_for(run(), 120))


async def answered(client, url, data, headers=hostile.JSON) -> tuple[int, dict]:
    async with client.post(url, data=data, headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("seed", range(3))
def test_hostile_bodies_are_answered_and_give_nothing_away(seed):
    found = hostile.fuzzed(150, seed)
    assert sum(found["statuses"].values()) == 150 and {200, 400, 404, 413, 415} <= found["statuses"].keys()
    assert found["grown"] < 500_000 and found["peak"] < 20 << 20


@pytest.mark.parametrize("kind", ["text/plain", "text/html", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", "image/png", "x"])
def test_what_says_that_it_is_not_json_is_not_read(kind):
    assert with_server(lambda host, url, client: answered(client, url, ASKED, {"Content-Type": kind})) == (415, {"error": "expected JSON.", "code": "no_json", "values": {}})


def test_json_may_name_its_encoding():
    assert with_server(lambda host, url, client: answered(client, url, ASKED, {"Content-Type": "application/json; charset=utf-8"}))[0] == 404


def test_a_body_of_unknown_length_is_not_read():
    async def endless():
        while True:
            yield b" " * 1024

    async def use(host, url, client):
        return await answered(client, url, endless())

    assert with_server(use)[0] == 413


@pytest.mark.parametrize("name, pack", [
    ("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress), ("gzip, identity", gzip.compress), ("identity, gzip", gzip.compress), ("gzip", bytes), ("x", bytes), ("", bytes),
])
@pytest.mark.parametrize("plain", [ASKED, b"[" + b"[]," * 2_000_000 + b"[]]"], ids=["short", "long"])
def test_what_is_packed_is_not_read(name, pack, plain, monkeypatch):
    monkeypatch.setattr(preview, "_body_of", None)
    data = pack(plain if pack is not bytes else ASKED)
    answer = with_server(lambda host, url, client: answered(client, url, data, hostile.JSON | {"Content-Encoding": name}))
    assert answer == (415, {"error": "expected JSON that is not compressed.", "code": "packed", "values": {}})


@pytest.mark.parametrize("name", ["identity", "Identity"])
def test_what_says_that_it_is_not_packed_is_read(name):
    assert with_server(lambda host, url, client: answered(client, url, ASKED, hostile.JSON | {"Content-Encoding": name}))[0] == 404


def test_of_several_encodings_each_is_looked_at():
    async def use(host, url, client):
        return await answered(client, url, ASKED, [*hostile.JSON.items(), ("Content-Encoding", "identity"), ("Content-Encoding", "gzip")])

    assert with_server(use)[0] == 415


@pytest.mark.parametrize("name", ["br", "zstd"])
def test_what_is_packed_as_some_servers_know_it_is_not_answered_for(name):
    async def use(host, url, client):
        async with client.post(url, data=ASKED, headers=hostile.JSON | {"Content-Encoding": name}) as response:
            return response.status

    assert with_server(use) in (400, 415)  # 400 is aiohttp's own, where it cannot unpack it


@pytest.mark.parametrize("length, status", [(preview.LONGEST_REQUEST, 404), (preview.LONGEST_REQUEST + 1, 413), (50 << 20, 413)])
def test_no_more_is_read_than_may_be_sent_whatever_length_is_told(length, status, monkeypatch):
    read = []
    body_of = preview._body_of

    async def counted(request):
        body = await body_of(request)
        read.append(request.content.total_bytes)
        return body

    monkeypatch.setattr(preview, "_body_of", counted)
    monkeypatch.setattr(preview.web.Request, "content_length", property(lambda request: 10))

    async def pieces():
        for start in range(0, length, 1 << 14):
            yield (ASKED if start == 0 else b"").ljust(min(1 << 14, length - start))

    async def use(host, url, client):
        return await answered(client, url, pieces())

    assert with_server(use)[0] == status
    assert read[0] < 2 << 20


def test_a_length_beside_pieces_without_one_is_refused():
    async def use(host, url, client):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(f"POST {preview.ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode())
        line = await reader.readline()
        writer.close()
        return line

    assert with_server(use).startswith(b"HTTP/1.0 400 ")


def test_an_answer_says_that_it_is_no_page_and_holds_no_tag():
    async def use(host, url, client):
        key = host.pictures.keep(preview.measure(hostile.picture(0), 64))
        body = json.dumps({"picture": key, **hostile.SETTINGS, "metric": hostile.TAG})
        async with client.post(url, data=body, headers=hostile.JSON) as response:
            return response.headers["X-Content-Type-Options"], response.content_type, await response.text()

    options, kind, text = with_server(use)
    assert (options, kind) == ("nosniff", "application/json")
    assert "<" not in text and ">" not in text and "&" not in text
    assert json.loads(text)["values"]["got"] == hostile.TAG


def test_a_sender_that_is_too_slow_is_sent_away_and_others_are_answered_meanwhile(monkeypatch):
    monkeypatch.setattr(preview, "SECONDS_TO_ARRIVE", 0.5)

    async def use(host, url, client):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(f"POST {preview.ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
        await writer.drain()
        meanwhile = await answered(client, url, ASKED)
        line = await reader.readline()
        writer.close()
        return meanwhile[0], line

    assert with_server(use) == (404, b"HTTP/1.1 408 Request Timeout\r\n")


def test_senders_that_leave_in_the_middle_leave_nothing_open(monkeypatch):
    monkeypatch.setattr(preview, "MOST_OPEN", 3)

    async def use(host, url, client):
        for _ in range(10):
            _, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(f"POST {preview.ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
            await writer.drain()
            writer.transport.abort()
        for _ in range(200):
            status, _ = await answered(client, url, ASKED)
            if status == 404:
                return status
            await asyncio.sleep(0.05)

    assert with_server(use) == 404


def test_many_tabs_are_answered_two_at_once_and_no_more_than_may_wait(monkeypatch):
    monkeypatch.setattr(preview, "MOST_OPEN", 20)
    now, most, lock, go_on = 0, 0, threading.Lock(), threading.Event()
    answer = preview.answer_to

    def counted(pictures, body):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        go_on.wait(60)
        with lock:
            now -= 1
        return answer(pictures, body)

    monkeypatch.setattr(preview, "answer_to", counted)

    async def use(host, url, client):
        asked = [asyncio.ensure_future(answered(client, url, ASKED)) for _ in range(30)]
        refused, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        while len(refused) < 10:
            refused, _ = await asyncio.wait(asked, timeout=0.05)
        go_on.set()
        return sorted([status for status, _ in await asyncio.gather(*asked)]), {answer["code"] for status, answer in await asyncio.gather(*asked) if status == 503}

    statuses, codes = with_server(use)
    assert statuses == [404] * 20 + [503] * 10
    assert (most, codes) == (2, {"busy"})


@pytest.mark.parametrize("code", ["no_json", "packed", "busy", "slow"])
def test_these_refusals_are_said_in_other_languages(code):
    for locale in ("ja", "zh"):
        assert json.loads((ROOT / "locales" / locale / "main.json").read_text("utf-8"))["quadtreeTiledDiffusion"]["errors"][code]


def test_a_key_is_not_to_be_found_out_from_the_picture():
    cells = preview.measure(hostile.picture(0), 64)
    first, second = preview.Pictures(), preview.Pictures()
    assert first.keep(cells) == first.keep(preview.measure(hostile.picture(0), 64)) != second.keep(cells)
    assert first.find(second.keep(cells)) is None


def test_pictures_that_differ_only_in_their_texture_have_keys_of_their_own():
    cells = preview.measure(hostile.picture(0), 64)
    other = preview.dataclasses.replace(cells, gradients=cells.gradients + 1)
    pictures = preview.Pictures()
    assert pictures.keep(cells) != pictures.keep(other)


def test_any_number_of_small_squares_may_be_painted():
    pictures = preview.Pictures()
    key = pictures.keep(preview.measure(torch.zeros(1, 2048, 2048, 3), 8))
    edits = json.dumps({"size": [2048, 2048], "squares": [[8 * (number % 256), 8 * (number // 256), 8, 1] for number in range(20_000)]}, separators=(",", ":"))
    body = json.dumps({"picture": key, **hostile.SETTINGS, "min_leaf": 8, "max_leaf": 64, "edits": edits}).encode()
    assert preview.answer_to(pictures, body)[0] == 200


def test_more_painting_than_can_be_shown_at_once_is_refused_before_it_is_painted():
    pictures = preview.Pictures()
    key = pictures.keep(preview.measure(torch.zeros(1, 2048, 2048, 3), 8))
    edits = json.dumps({"size": [2048, 2048], "squares": [[0, 0, 2048, 1]] * 25_000}, separators=(",", ":"))
    body = json.dumps({"picture": key, **hostile.SETTINGS, "min_leaf": 8, "max_leaf": 64, "edits": edits}).encode()
    assert len(body) < preview.LONGEST_REQUEST
    assert preview.answer_to(pictures, body) == (400, {"error": "The settings are too long. Make `edits` shorter or empty.", "code": "too_long", "values": {}})


@pytest.mark.parametrize("value", [10 ** 400, -10 ** 400, 10 ** 309])
@pytest.mark.parametrize("name", preview.NUMBERS)
def test_a_number_that_no_computer_holds_is_refused(name, value):
    pictures = preview.Pictures()
    key = pictures.keep(preview.measure(hostile.picture(0), 64))
    status, answer = preview.answer_to(pictures, json.dumps({"picture": key, **hostile.SETTINGS, name: value}).encode())
    assert (status, answer["code"]) == (400, "not_a_number") and len(answer["error"]) < 200


SIZES = ["1" + "0" * 18, str(1 << 63), str(-1 << 63), str(8 << 64), "8" + "0" * 400, "-8" + "0" * 400, "9" * 4000, "9" * 5000, "1e308", "-1e308", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "-0.0", "-0", "1e-320", "true", "false", "null"]
SQUARES = ["[%s, 0, 8, 1]", "[0, %s, 8, 1]", "[0, 0, %s, 1]", "[0, 0, 8, %s]"]


def asked_as(place: str, text: str, **settings) -> tuple[int, dict]:
    """The answer to a request in which a value stands in JSON as this text. place: the name of a setting, or of edits the text around it."""
    pictures = preview.Pictures()
    given = {"picture": pictures.keep(preview.measure(hostile.picture(0), 64)), **hostile.SETTINGS, **settings}
    if place in given:
        return preview.answer_to(pictures, json.dumps(given | {place: "HERE"}).replace('"HERE"', text).encode())
    return preview.answer_to(pictures, json.dumps(given | {"edits": place % text}).encode())


@pytest.mark.parametrize("text", SIZES, ids=lambda text: text[:12] + f" of {len(text)}")
@pytest.mark.parametrize("place", [
    *preview.NUMBERS, *preview.SIDES, *('{"size": [256, 256], "squares": [' + square + "]}" for square in SQUARES), '{"size": [%s, 256], "squares": []}', '{"size": [256, %s], "squares": [[0, 0, 8, 1]]}'])
def test_any_number_anywhere_is_answered(place, text):
    for settings in ({}, {"detail_budget": 0.0, "max_leaf": 0}):
        status, answer = asked_as(place, text, **settings)
        assert (status, "leaves" in answer) in ((200, True), (400, False))
        said = json.dumps(answer, allow_nan=False)
        assert "leaves" in answer or len(said) < 800


@pytest.mark.parametrize("place, text, code", [
    ("min_leaf", str(1 << 63), "leaf_range"), ("max_leaf", str(1 << 63), "leaf_range"), ("max_leaf", str(-1 << 63), "leaf_range"), ("min_leaf", "8200", "leaf_range"),
    ("content_threshold", "-1e308", "not_negative"), ("detail_budget", "1" + "0" * 300, "share"), ("min_leaf", "true", "not_whole"),
])
def test_a_number_out_of_range_is_told_by_its_range(place, text, code):
    status, answer = asked_as(place, text, max_leaf=0)
    assert (status, answer["code"]) == (400, code)


@pytest.mark.parametrize("place, text", [
    ("content_threshold", str(1 << 70)), ("content_threshold", "442"), ("content_threshold", "1e308"), ("detail_budget", "1"), ("min_denoise", "-0.0"), ("min_leaf", "8192"), ("min_leaf", "64"), ("max_leaf", "8192"), ("max_leaf", "0")])
def test_a_number_that_a_run_takes_is_taken(place, text):
    status, answer = asked_as(place, text, **({"detail_budget": 0.0} if place == "content_threshold" else {"max_leaf": 0}))
    assert status == 200 and answer["leaves"]
