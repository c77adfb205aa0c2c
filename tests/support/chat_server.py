"""A local server of OpenAI's chat protocol that answers by a rule and breaks as it is told to."""

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


class ChatServer(ThreadingHTTPServer):
    """Answers every question by a rule on its text and picture; the first requests are spoilt by `faults`, in order.

    Attributes:
        requests: Bodies received, in order.
        headers: Of each.
        answered: Questions that were answered well, as bytes of their body.
        faults: What to do with the next requests in place of an answer; see below.
        rule: (text, png) -> probabilities of the letters.
        says: Changes an answer before it is sent.
    """

    daemon_threads = True

    def __init__(self, rule: Callable[[str, bytes], np.ndarray]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule = rule
        self.requests, self.headers, self.answered = [], [], []
        self.faults: list[Callable] = []
        self.says: Callable[[dict, dict], dict] = lambda request, answer: answer
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that has stopped waiting is part of the game."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request, server = json.loads(body), self.server
        with server.lock:
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
        if fault is not None:
            return fault(self, request)
        with server.lock:
            server.answered.append(body)
            answer = server.says(request, answer_to(request, server.rule))
        send(self, 200, answer)

    def log_message(self, *words):
        pass


def answer_to(request, rule):
    picture, text = request["messages"][0]["content"]
    png = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    shares = rule(text["text"], png)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(shares)]
    choice = {"message": {"role": "assistant", "content": letters[int(np.argmax(shares))]}, "finish_reason": "stop"}
    if request.get("logprobs"):
        likely = [
            {"token": letter, "logprob": float(np.log(share))} for letter, share in zip(letters, shares, strict=True)
        ]
        best = max(likely, key=lambda one: one["logprob"])
        choice["logprobs"] = {"content": [best | {"top_logprobs": likely}]}
    return {"choices": [choice]}


def hashed_rule(number, mass=0.9):
    """Return a rule by which text and picture decide on `mass` of the probability; the rest is other tokens."""

    def rule(text, png):
        seed = int.from_bytes(hashlib.sha256(text.encode() + png).digest()[:4], "big")
        return np.random.default_rng(seed).dirichlet(np.ones(number)) * mass

    return rule


def send(handler, status, answer, *, headers=(), length=None, cut=None):
    body = json.dumps(answer).encode()[:cut]
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def status(code, *, error=None, headers=()):
    """Return a fault: an error of the server."""
    return lambda handler, request: send(handler, code, {"error": error or {"message": "no"}}, headers=headers)


def truncated(handler, request):
    """JSON that ends too early, in a reply that is whole."""
    send(handler, 200, answer_to(request, handler.server.rule), cut=-20)


def dropped(handler, request):
    """A reply that ends before its length."""
    send(handler, 200, answer_to(request, handler.server.rule), cut=-20, length=10_000)
    handler.close_connection = True


def silent(seconds):
    """Return a fault: no answer for so long."""

    def wait(handler, request):
        time.sleep(seconds)
        send(handler, 200, {"choices": []})

    return wait


def says(text, **more):
    """Return a fault: an answer of one's own."""
    message = {"role": "assistant", "content": text} | more.pop("message", {})
    return lambda handler, request: send(handler, 200, {"choices": [{"message": message, **more}]})


@contextlib.contextmanager
def serving(rule):
    """Run a server while the block does."""
    server = ChatServer(rule)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
