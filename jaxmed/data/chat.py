"""Endpoints that speak OpenAI's chat protocol: questions about a picture go out, answers come back, faults are retried.

asyncio and the standard library alone. What passes (429, 5xx, time-outs, dropped connections, truncated JSON) is tried
again after a pause that doubles, or that the server names. What does not pass (a wrong key or address) ends the run. A
refusal, as a field of the answer or as the filter's error, is an answer. Redirections are not followed: they would take
pictures and key elsewhere.

The key comes from an environment variable or a file. It is no option, since options are kept in config.json; it is
struck out of whatever a server says.
"""

import asyncio
import base64
import dataclasses
import http.client
import json
import os
import random
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from jaxmed.config import Bounds, Positive, Size, checked
from jaxmed.errors import InputError
from jaxmed.files import require_file

ADDRESS = "JAXMED_ENDPOINT"
PASSING = (408, 409, 425, 429)
"""With all of 500 and above: what may be over when it is tried again."""
FATAL = (401, 403, 404)
"""What every further question would get too."""
FILTERED = ("content_filter", "content_policy_violation")
LONGEST_PAUSE = 120.0  # seconds
FAILURES_IN_A_ROW = 10
"""So many questions that fail one after another end the run."""


@dataclasses.dataclass(frozen=True)
@checked
class OpenAICompatible:
    """A model behind an endpoint.

    Attributes:
        url: Its base, such as http://localhost:8000/v1; by default what the environment says in JAXMED_ENDPOINT.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; none is sent where it is not set.
        key_file: File that holds the key, in place of the variable.
        concurrency: Questions under way at once.
        timeout: Seconds of silence after which a question is asked again.
        retries: Times that a question is asked again.
        pause: Seconds before the first of them; doubles each time.
        top_logprobs: Likely tokens whose probabilities are asked for: at most 20, some servers give 5.
        length: Name of the field with the longest answer; newer models of OpenAI want max_completion_tokens.
    """

    url: str = ""
    model: str = ""
    key_variable: str = "JAXMED_API_KEY"
    key_file: Path | None = None
    concurrency: Size = 4
    timeout: Positive = 60.0
    retries: Annotated[int, Bounds(0, 100)] = 6
    pause: Positive = 1.0
    top_logprobs: Annotated[int, Bounds(1, 20)] = 20
    length: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


class ChatRequest(NamedTuple):
    """One question.

    Attributes:
        png: Of the picture.
        text: Of the question.
        temperature: Of decoding; 0 takes the likeliest token.
        top_p: Mass of likely tokens that one is drawn of.
        max_tokens: Of the answer.
        seed: Of decoding; a server may ignore it.
        logprobs: Whether probabilities of tokens are asked for.
    """

    png: bytes
    text: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    logprobs: bool


class ChatReply(NamedTuple):
    """One answer.

    Attributes:
        text: What was said.
        tokens: Its tokens in order, and log-probabilities of what might have stood there; None where not told.
        is_refusal: Whether the model or a filter says that it will not answer.
    """

    text: str
    tokens: tuple[tuple[str, dict[str, float]], ...] | None
    is_refusal: bool


class Trouble(NamedTuple):
    """Why there is no answer.

    Attributes:
        reason: In words.
        passes: Whether to ask again.
        pause: Seconds to wait that the server names.
        is_fatal: Whether all questions would end so.
    """

    reason: str
    passes: bool
    pause: float | None = None
    is_fatal: bool = False


Outcome: TypeAlias = ChatReply | Trouble
Tell = Callable[[int, ChatReply | str], None]


def address_of(config: OpenAICompatible) -> str:
    """Return where questions are sent.

    Raises:
        InputError: Neither the configuration nor the environment names an address, or no model is named.
    """
    url = (config.url or os.environ.get(ADDRESS, "")).rstrip("/")
    if not url:
        advice = f"give --endpoint.url http://HOST:PORT/v1, or set {ADDRESS}"
        raise InputError("endpoint.url", "the address of a model", "nothing", advice)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise InputError("endpoint.url", "http://HOST/v1 or https://HOST/v1, without user or query", "something else")
    if not config.model:
        raise InputError("endpoint.model", "the name of the model at that address", "nothing", "give --endpoint.model")
    return url if url.endswith("/chat/completions") else f"{url}/chat/completions"


def key_of(config: OpenAICompatible) -> str:
    """Return the key; empty where there is none.

    Raises:
        InputError: The file cannot be read, or what it or the variable holds is no key.
    """
    where: object = f"${config.key_variable}"
    key = os.environ.get(config.key_variable, "").strip()
    if config.key_file is not None:
        where = require_file(config.key_file, "a file with the key")
        try:
            key = where.read_text(encoding="ascii").strip()
        except UnicodeDecodeError as error:
            raise InputError(where, "a key in ASCII", "other bytes") from error
    if not all("!" <= character <= "~" for character in key):
        raise InputError(where, "a key of printable characters in one line", "other characters")
    return key


def converse(requests: Sequence[Callable[[], ChatRequest]], config: OpenAICompatible, tell: Tell) -> None:
    """Ask every question, several at a time.

    Args:
        requests: Each makes a question when its turn comes, so that pictures are not all in memory.
        config: Of the endpoint.
        tell: Called from this thread, as soon as there is one, with the place of a question and its answer, or the
            reason why there is none.

    Raises:
        InputError: No question can be answered: a wrong address or key, or many failures in a row.
    """
    url, key = address_of(config), key_of(config)
    asyncio.run(_converse(requests, config, url, key, tell))


async def _converse(
    requests: Sequence[Callable[[], ChatRequest]], config: OpenAICompatible, url: str, key: str, tell: Tell
) -> None:
    loop, places, failures = asyncio.get_running_loop(), iter(range(len(requests))), 0
    ended: list[InputError] = []  # answers under way when a run ends are waited for: they may have been paid for

    async def work(pool: ThreadPoolExecutor) -> None:
        nonlocal failures
        for place in places:  # shared by all workers
            request, attempt = requests[place](), 0
            while True:
                found = await loop.run_in_executor(pool, _post, request, config, url, key)
                if isinstance(found, ChatReply) or not found.passes or attempt == config.retries or ended:
                    break
                pause = found.pause if found.pause is not None else config.pause * 2**attempt
                await asyncio.sleep(min(pause, LONGEST_PAUSE) * random.uniform(1.0, 1.25))
                attempt += 1
            failures = 0 if isinstance(found, ChatReply) else failures + 1
            if not isinstance(found, ChatReply):
                if found.is_fatal or failures >= FAILURES_IN_A_ROW:
                    advice = "what was answered is kept: the same command goes on from there"
                    ended.append(InputError(url, "answers of the model", found.reason, advice))
                found = found.reason
            if isinstance(found, ChatReply) or not ended:
                tell(place, found)
            if ended:
                return

    with ThreadPoolExecutor(config.concurrency) as pool:
        await asyncio.gather(*(work(pool) for _ in range(config.concurrency)))
    if ended:
        raise ended[0]


def body_of(request: ChatRequest, config: OpenAICompatible) -> dict[str, Any]:
    """Return the JSON of a question; the picture stands first, so that servers share what they compute of it."""
    picture = "data:image/png;base64," + base64.b64encode(request.png).decode()
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": request.text}]
    body: dict[str, Any] = {
        "model": config.model, "messages": [{"role": "user", "content": content}], "n": 1,
        "temperature": request.temperature, "top_p": request.top_p, config.length: request.max_tokens,
        "seed": request.seed,
    }  # fmt: skip
    return body | ({"logprobs": True, "top_logprobs": config.top_logprobs} if request.logprobs else {})


def read_reply(body: bytes) -> ChatReply:
    """Read a server's answer.

    Raises:
        ValueError: It is truncated, or no answer.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        is_refusal = bool(message.get("refusal")) or choice.get("finish_reason") in FILTERED
        listed = (choice.get("logprobs") or {}).get("content")
        tokens = None
        if listed:
            tokens = tuple((str(one["token"]), _likely(one)) for one in listed)
        return ChatReply(str(text or message.get("refusal") or ""), tokens, is_refusal)
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"an answer without {error}") from error


def _likely(one: Mapping[str, Any]) -> dict[str, float]:
    """Return log-probabilities by token; of those listed twice, as bytes of one spelling are, the likelier."""
    found: dict[str, float] = {}
    for other in one.get("top_logprobs") or [one]:
        token, value = str(other["token"]), float(other["logprob"])
        found[token] = max(value, found.get(token, value))
    return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


def _post(request: ChatRequest, config: OpenAICompatible, url: str, key: str) -> Outcome:
    """Ask once, on a thread."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body_of(request, config)).encode()
    try:
        made = urllib.request.Request(url, data, headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(made, timeout=config.timeout) as response:
            status, wait, body = response.status, None, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, wait = error.code, error.headers.get("Retry-After")
            try:
                body = error.read()
            except (OSError, http.client.HTTPException):
                body = b""
    except (OSError, http.client.HTTPException) as error:
        return Trouble(_without_key(f"{type(error).__name__}: {error}", key), passes=True)
    if status == 200:
        try:
            return read_reply(body)
        except ValueError as error:
            return Trouble(_without_key(f"no whole answer in JSON ({error})", key), passes=True)
    return _trouble(status, wait, body, key)


def _trouble(status: int, wait: str | None, body: bytes, key: str) -> Outcome:
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        code, words = str(error.get("code")), str(error.get("message"))
    except (ValueError, KeyError, TypeError, AttributeError):
        code, words = "", text
    if status == 400 and code in FILTERED:
        return ChatReply(_without_key(words, key), None, is_refusal=True)
    reason = _without_key(f"status {status}: {' '.join(words.split())[:200]}", key)
    if code == "insufficient_quota" or status in FATAL:
        return Trouble(reason, passes=False, is_fatal=True)
    return Trouble(reason, passes=status in PASSING or status >= 500, pause=_seconds(wait))


def _seconds(word: str | None) -> float | None:
    """Return the seconds that a server names; dates, which it may name too, are left to our own pauses."""
    try:
        return max(0.0, float(word or ""))
    except ValueError:
        return None


def _without_key(text: str, key: str) -> str:
    return text.replace(key, "(the key)") if key else text
