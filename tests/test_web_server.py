"""The server of pages and actions: who may act, and what a wrong request is answered."""

from __future__ import annotations

import gzip
import http.client
from contextlib import AbstractContextManager
from typing import Any

import pytest
from servers import running

from textrl_gym.web.server import MOST_BYTES, PageServer, Reply, json_reply

JSON = {"Content-Type": "application/json"}


def double(asked: dict[str, Any]) -> Reply:
    if asked.get("disk") == "full":
        raise OSError("no space left on device")
    if "number" not in asked:
        raise ValueError("number is missing")
    return json_reply({"number": 2 * asked["number"]})


def serving(host: str = "127.0.0.1") -> AbstractContextManager[PageServer]:
    return running(PageServer(host, 0, {"/": lambda: Reply(b"page", "text/plain")}, {"/double": double}))


def ask(server: PageServer, path: str, body: str | None, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_an_action_answers_json() -> None:
    with serving() as server:
        assert ask(server, "/double", '{"number": 4}', JSON) == (200, '{"number": 8}')
        assert ask(server, "/", None, {}) == (200, "page")


@pytest.mark.parametrize(
    ("path", "body", "headers", "code", "words"),
    [
        ("/double", '{"number": 4}', {}, 415, "send application/json"),
        ("/double", '{"number": 4}', {"Content-Type": "text/plain"}, 415, "send application/json"),
        ("/double", "{", JSON, 400, "Expecting property name"),
        ("/double", "[" * 100_000, JSON, 400, "recursion"),
        ("/double", "[1]", JSON, 400, "send an object, not list"),
        ("/double", "{}", JSON, 400, "number is missing"),
        ("/double", '{"disk": "full"}', JSON, 500, "no space left on device"),
        ("/double", "x", JSON | {"Content-Length": str(MOST_BYTES + 1)}, 413, "at most 1,048,576 bytes"),
        ("/double", '{"number": 4}', JSON | {"Content-Length": "-1"}, 411, "send a Content-Length"),
        ("/double", '{"number": 4}', JSON | {"Host": "evil.example"}, 403, "forbidden"),
        ("/double", '{"number": 4}', JSON | {"Origin": "http://evil.example"}, 403, "forbidden"),
        ("/double", '{"number": 4}', JSON | {"Origin": "null"}, 403, "forbidden"),
        ("/double", '{"number": 4}', JSON | {"Origin": "http://127.0.0.1:1"}, 403, "forbidden"),
        ("/double", None, {}, 404, "not found"),
        ("/", "{}", JSON, 405, ""),
        ("/nowhere", "{}", JSON, 405, ""),
    ],
)
def test_what_is_refused(path: str, body: str | None, headers: dict[str, str], code: int, words: str) -> None:
    with serving() as server:
        status, answer = ask(server, path, body, headers)
    assert status == code and words in answer


def test_a_page_of_the_server_itself_may_act() -> None:
    with serving() as server:
        origin = {"Origin": f"http://127.0.0.1:{server.port}"}
        assert ask(server, "/double", '{"number": 4}', JSON | origin)[0] == 200


def test_beyond_this_machine_a_token_is_asked_for() -> None:
    with serving("0.0.0.0") as server:
        bearer = {"Authorization": f"Bearer {server.token}"}
        own = {"Origin": f"http://127.0.0.1:{server.port}"}
        assert ask(server, "/double", '{"number": 4}', JSON)[0] == 403
        assert ask(server, "/double", '{"number": 4}', JSON | {"Authorization": f"Basic {server.token}"})[0] == 403
        assert ask(server, "/double", '{"number": 4}', JSON | bearer)[0] == 200
        assert ask(server, f"/double?token={server.token}", '{"number": 4}', JSON | own)[0] == 200
        foreign = {"Origin": "http://evil.example"}
        assert ask(server, "/double", '{"number": 4}', JSON | bearer | foreign)[0] == 403
        assert ask(server, "/", None, {})[0] == 403 and ask(server, "/", None, bearer)[0] == 200


def test_large_pages_are_packed_for_those_who_take_it() -> None:
    page = b"a line of a page\n" * 10_000
    pages = {"/": lambda: Reply(page, "text/html"), "/small": lambda: Reply(b"small", "text/html")}
    with running(PageServer("127.0.0.1", 0, pages, {})) as server:
        for path, accepted, packed in (("/", "gzip, br", True), ("/", "identity", False), ("/small", "gzip", False)):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", path, headers={"Accept-Encoding": accepted})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            assert answer.getheader("Content-Encoding") == ("gzip" if packed else None)
            assert int(answer.getheader("Content-Length") or 0) == len(content)
            assert (gzip.decompress(content) if packed else content) == (page if path == "/" else b"small")
            assert not packed or len(content) < len(page) / 10
