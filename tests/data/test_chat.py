"""Endpoints that speak OpenAI's protocol: faults are retried, refusals are answers, keys stay where they are."""

import base64

import numpy as np
import pytest
from chat_server import dropped, hashed_rule, says, serving, silent, status, truncated

from jaxmed.data import chat
from jaxmed.data.chat import ChatReply, ChatRequest, OpenAICompatible, body_of, converse, key_of, read_reply
from jaxmed.errors import InputError
from jaxmed.io.images import encode_png

KEY = "sk-this-is-secret"
PNG = encode_png(np.eye(4))


@pytest.fixture
def server():
    with serving(hashed_rule(3)) as one:
        yield one


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("JAXMED_ENDPOINT", "JAXMED_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def request(text="which?", logprobs=True):
    return ChatRequest(PNG, text, 0.0, 1.0, 8, 3, logprobs)


def ask(server, *requests, **more):
    options = {"model": "toy", "pause": 0.001, "timeout": 5.0, "concurrency": 1, "retries": 8}
    found = {}
    converse([lambda one=one: one for one in requests], OpenAICompatible(server.url, **(options | more)),
             found.__setitem__)  # fmt: skip
    return [found[place] for place in sorted(found)]


def test_what_passes_is_asked_again_until_it_is_answered(server):
    server.faults = [
        status(429, headers=[("Retry-After", "0.01")]), status(429, headers=[("Retry-After", "Mon, 1 Jan 2026")]),
        status(500), status(503), silent(2.0), truncated, dropped, status(408),
    ]  # fmt: skip
    (reply,) = ask(server, request(), timeout=1.0)
    assert isinstance(reply, ChatReply) and reply.text in "ABC" and not reply.is_refusal
    assert reply.tokens is not None
    ((token, likely),) = reply.tokens
    assert token == reply.text and set(likely) == set("ABC")
    assert sum(np.exp(value) for value in likely.values()) == pytest.approx(0.9)
    assert len(server.requests) == 9 and len(server.answered) == 1
    assert all(one == server.requests[0] for one in server.requests)


def test_a_server_that_names_a_pause_is_given_it(server, monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(chat.asyncio, "sleep", sleep)
    server.faults = [status(500), status(500), status(429, headers=[("Retry-After", "7")])]
    ask(server, request(), pause=1.0)
    for pause, wanted in zip(pauses, (1, 2, 7), strict=True):
        assert wanted <= pause <= 1.25 * wanted


def test_a_question_that_nobody_answers_fails_alone(server):
    server.faults = [status(400, error={"message": "picture too large"}), status(500), status(500)]
    found = ask(server, *(request(text) for text in "abcd"), retries=1)
    assert "status 400: picture too large" in found[0] and "status 500" in found[1]
    assert isinstance(found[2], ChatReply) and isinstance(found[3], ChatReply)
    assert len(server.requests) == 1 + 2 + 2


def test_refusals_are_answers_and_missing_logprobs_are_told(server):
    server.faults = [
        says(None, message={"refusal": "I will not say."}),
        says("", finish_reason="content_filter"),
        status(400, error={"code": "content_filter", "message": "filtered"}),
        says("B"), says("B", logprobs=None), says("B", logprobs={"content": []}),
        says([{"type": "text", "text": "A"}, {"type": "text", "text": " or B"}]),
    ]  # fmt: skip
    found = ask(server, *(request(str(place)) for place in range(7)))
    assert [reply.is_refusal for reply in found] == [True, True, True, False, False, False, False]
    assert [reply.text for reply in found] == ["I will not say.", "", "filtered", "B", "B", "B", "A or B"]
    assert all(reply.tokens is None for reply in found) and len(server.requests) == 7


def test_the_key_is_sent_and_shown_to_nobody_else(server, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMED_API_KEY", KEY)
    ask(server, request())
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    server.faults = [status(401, error={"message": f"wrong key {KEY}"})]
    with pytest.raises(InputError, match="status 401") as caught:
        ask(server, request("a"), request("b"))
    assert KEY not in str(caught.value) and "(the key)" in str(caught.value)
    (tmp_path / "key").write_text("another\n")
    assert key_of(OpenAICompatible(key_file=tmp_path / "key")) == "another"
    monkeypatch.delenv("JAXMED_API_KEY")
    ask(server, request())
    assert "Authorization" not in server.headers[-1]
    (tmp_path / "key").write_text("two words")
    with pytest.raises(InputError, match="printable characters in one line") as caught:
        key_of(OpenAICompatible(key_file=tmp_path / "key"))
    assert "two words" not in str(caught.value)


def test_redirections_are_not_followed_and_failures_in_a_row_end_the_run(server):
    server.faults = [status(302, headers=[("Location", "http://127.0.0.1:9/elsewhere")])]
    (reason,) = ask(server, request())
    assert "status 302" in reason
    server.faults = [status(422) for _ in range(40)]
    with pytest.raises(InputError, match="what was answered is kept"):
        ask(server, *(request(str(place)) for place in range(40)))
    assert len(server.requests) == 1 + chat.FAILURES_IN_A_ROW


def test_nothing_is_sent_without_an_address(monkeypatch):
    for config, words in (
        (OpenAICompatible(), "expected the address of a model, found nothing"),
        (OpenAICompatible("ftp://host/v1", "m"), "expected http://HOST/v1"),
        (OpenAICompatible("http://me:secret@host/v1", "m"), "expected http://HOST/v1"),
        (OpenAICompatible("http://host/v1"), "expected the name of the model"),
    ):
        with pytest.raises(InputError) as caught:
            chat.address_of(config)
        assert words in str(caught.value) and "secret" not in str(caught.value)
    monkeypatch.setenv("JAXMED_ENDPOINT", "http://host:1/v1/")
    assert chat.address_of(OpenAICompatible(model="m")) == "http://host:1/v1/chat/completions"


def test_a_question_is_a_picture_and_then_words():
    body = body_of(request("why?"), OpenAICompatible("http://host/v1", "toy", top_logprobs=5))
    picture, text = body["messages"][0]["content"]
    assert base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == PNG and text["text"] == "why?"
    assert (body["seed"], body["max_tokens"], body["temperature"], body["top_logprobs"]) == (3, 8, 0.0, 5)
    other = OpenAICompatible("http://host/v1", "toy", length="max_completion_tokens")
    newer = body_of(request(logprobs=False), other)
    assert newer["max_completion_tokens"] == 8 and not {"max_tokens", "logprobs", "top_logprobs"} & set(newer)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b"\xff", b"[" * 99_999])
def test_what_is_no_answer_is_a_value_error(body):
    with pytest.raises(ValueError):
        read_reply(body)


def test_of_a_token_listed_twice_the_likelier_counts():
    text = (
        b'{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "logprob": -1, '
        b'"top_logprobs": [{"token": "A", "logprob": -1}, {"token": "A", "logprob": -9}]}]}}]}'
    )
    assert read_reply(text).tokens == (("A", {"A": -1.0}),)
