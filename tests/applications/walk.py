"""Two servers of the same project, visited side by side by the same client."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import urlencode

HOST = "shop.example"

#: The hop's own (RFC 9110, 7.6.1), and what names the server and the moment. Where a content ends is said by
#: Transfer-Encoding, by Content-Length, or by the connection's end: Django leaves it to the server when it does not know.
IGNORED = {"connection", "keep-alive", "transfer-encoding", "date", "server"}

#: What tornjango says and Django does not: that of a file any part may be asked for (RFC 9110, 14.3).
ADDED = ("accept-ranges", "bytes")

_CLOCK = [
    (re.compile(pattern), word)
    for pattern, word in (
        (r"/applications/(runserver|ours|gunicorn|serve)/", "/FOLDER/"),
        (r"\w{3}, \d\d[ -]\w{3}[ -]\d{4} \d\d:\d\d:\d\d GMT", "HTTP-DATE"),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+00:?00)?", "MOMENT"),
        (r"\b\d{1,2}(:\d\d){0,2}(\s|&nbsp;|\xa0)?([ap]\.m\.)", "CLOCK"),
        (r"\b\d{1,2}:\d\d(:\d\d)?\b", "CLOCK"),
        (r"\b\d+(\s|&nbsp;|\xa0)(second|minute)s?\b", "A-WHILE"),
        (r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}", "UUID"),
        (r"\b[A-Za-z0-9]{64}\b", "TOKEN"),
        (r"\b[A-Za-z0-9]{6}-[0-9a-f]{32}\b", "RESET"),
        (r":[A-Za-z0-9]{6}:[A-Za-z0-9_-]{43}", ":SIGNATURE"),
        (r'"(csrf_token|csrfToken|csrfmiddlewaretoken|CSRF_TOKEN)": "[^"]+"', "CSRF"),
    )
]
_TECHNICAL = re.compile(
    r"<title>.*?</title>|<h1>.*?</h1>|<pre class=\"exception_value\">.*?</pre>", re.S
)


@dataclass
class Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def text(self) -> str:
        """The content without its gzip coding."""
        coded = ("content-encoding", "gzip") in [(n.lower(), v) for n, v in self.headers]
        return (gzip.decompress(self.body) if coded else self.body).decode("utf-8", "replace")

    def find(self, pattern: str) -> str:
        found = re.search(pattern, self.text)
        assert found, f"no {pattern} in:\n{self.text}"
        return found[1]


@dataclass
class Side:
    """A client of one of the servers, with cookies of its own."""

    port: int
    cookies: dict[str, str] = field(default_factory=dict)

    def visit(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Host": HOST, **headers}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        try:
            connection.request(method, target, body, sent)
            response = connection.getresponse()
            answer = Answer(
                response.status, response.reason, response.getheaders(), response.read()
            )
        finally:
            connection.close()
        self._keep(answer)
        return answer

    def _keep(self, answer: Answer) -> None:
        for name, value in answer.headers:
            if name.lower() == "set-cookie":
                for key, cookie in SimpleCookie(value).items():
                    self.cookies[key] = cookie.coded_value
                    if cookie["max-age"] == "0":
                        del self.cookies[key]


@dataclass
class Visit:
    """What a comparison is of, and what differed."""

    line: str
    differences: list[str]


@dataclass
class Walk:
    """Sends every request to both servers, with each one's own cookies and tokens, and notes what differs."""

    reference: Side
    ours: Side
    #: Whether the pages are those of DEBUG: a traceback shows the server's own frames.
    debug: bool = False
    visits: list[Visit] = field(default_factory=list)

    def get(self, target: str, **headers: str) -> Answer:
        return self.send("GET", target, **headers)

    def post(
        self,
        target: str,
        data: dict[str, Any],
        files: dict[str, tuple[str, bytes, str]] | None = None,
        **headers: str,
    ) -> Answer:
        """A form as a browser sends it, with the token that Django's cookie has."""
        return self.send("POST", target, data=data, files=files, **headers)

    def send(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        data: dict[str, Any] | None = None,
        files: dict[str, tuple[str, bytes, str]] | None = None,
        **headers: str,
    ) -> Answer:
        """Returns the reference's answer. Keywords are headers, with underscores for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answers = []
        for side in (self.reference, self.ours):
            content, typed = body, named
            if data is not None:
                given = {"csrfmiddlewaretoken": side.cookies.get("csrftoken", ""), **data}
                content, content_type = _form(given, files)
                typed = {"Content-Type": content_type, **named}
            elif "X-CSRFToken" in named:
                typed = {**named, "X-CSRFToken": side.cookies.get("csrftoken", "")}
            answers.append(side.visit(method, target, content, typed))
        self.visits.append(Visit(f"{method} {target}", self._differences(*answers)))
        return answers[0]

    def _differences(self, reference: Answer, ours: Answer) -> list[str]:
        found: list[str] = []
        line, our_line = (reference.status, reference.reason), (ours.status, ours.reason)
        if line != our_line:
            found.append(f"status {line} / {our_line}")
        # What the moment is in, a digest of it is in too.
        same = reference.body == ours.body
        technical = self._is_technical(reference)
        framed = not technical and all(
            "content-length" in (n.lower() for n, _ in a.headers) for a in (reference, ours)
        )
        headers, our_headers = (
            _headers(a, self._side(a is ours), same, same and framed) for a in (reference, ours)
        )
        if ADDED not in headers:
            our_headers = [pair for pair in our_headers if pair != ADDED]
        if headers != our_headers:
            only = [pair for pair in headers if pair not in our_headers]
            our_only = [pair for pair in our_headers if pair not in headers]
            found.append(f"headers {only} / {our_only}")
        if not same:
            text, our_text = (self._text(a, a is ours) for a in (reference, ours))
            if text != our_text:
                found.append(f"body {_first_difference(text, our_text)}")
        return found

    def _side(self, ours: bool) -> Side:
        return self.ours if ours else self.reference

    def _is_technical(self, answer: Answer) -> bool:
        """Whether it shows a traceback, with the frames, the environment and the sys.path of its server."""
        traceback = not answer.body or b"traceback" in answer.body
        return self.debug and (answer.status == 500 or (answer.status == 400 and traceback))

    def _text(self, answer: Answer, ours: bool) -> str:
        text = answer.text
        if self._is_technical(answer):
            text = "\n".join(_TECHNICAL.findall(text))
        return _timeless(text, self._side(ours))


def _headers(answer: Answer, side: Side, same: bool, same_size: bool) -> list[tuple[str, str]]:
    kept = []
    coded = any(name.lower() == "content-encoding" for name, _ in answer.headers)
    for name, value in answer.headers:
        lower = name.lower()
        if lower in IGNORED or (not same_size and lower == "content-length"):
            continue
        if not same and lower == "etag":
            continue
        if coded and lower == "content-length":  # Django adds a random number of bytes
            continue
        kept.append((lower, _timeless(value, side)))
    return sorted(kept, key=lambda pair: pair[0])


def _timeless(text: str, side: Side) -> str:
    for name, value in side.cookies.items():
        if len(value) >= 20:
            text = text.replace(value, f"<{name}>")
    text = re.sub(r"(csrftoken|sessionid|messages)=[^;]{20,};", r"\1=VALUE;", text)
    for pattern, word in _CLOCK:
        text = pattern.sub(word, text)
    return text


def _first_difference(text: str, our_text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, our_text, strict=False)) if a != b), -1)
    at = min(len(text), len(our_text)) if at < 0 else at
    around = slice(max(0, at - 80), at + 120)
    return f"at {at}: {text[around]!r} / {our_text[around]!r}"


def _form(
    data: dict[str, Any], files: dict[str, tuple[str, bytes, str]] | None
) -> tuple[bytes, str]:
    if files is None:
        return urlencode(data, doseq=True).encode(), "application/x-www-form-urlencoded"
    boundary = "----a-boundary-of-the-tests"
    parts = []
    for name, value in data.items():
        for item in value if isinstance(value, list) else [value]:
            head = f'Content-Disposition: form-data; name="{name}"'
            parts.append(f"{head}\r\n\r\n{item}".encode())
    for name, (filename, content, content_type) in files.items():
        head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"'
        parts.append(f"{head}\r\nContent-Type: {content_type}\r\n\r\n".encode() + content)
    between = f"\r\n--{boundary}\r\n".encode()
    content = between[2:] + between.join(parts) + f"\r\n--{boundary}--\r\n".encode()
    return content, f"multipart/form-data; boundary={boundary}"
