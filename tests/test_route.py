"""The route that draws trees, under whatever may be sent to it: bounded in time and memory, and silent about what it was not asked."""
from __future__ import annotations

import asyncio
import json
import threading

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
    assert sum(found["statuses"].values()) == 150 and {200, 400, 404} <= found["statuses"].keys()
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


@pytest.mark.parametrize("code", ["no_json", "busy", "slow"])
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
