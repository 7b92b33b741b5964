"""As much of a gateway as the routes of deploy/kubernetes ask for: weights, and a mirror whose answers nobody sees."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TIMEOUT_SECONDS = 300.0
PASSED_HEADERS = ("Content-Type", "Authorization")


class Gateway:
    """Listens on loopback; requests are shared out by weight and mirrored by share, both evenly and not by chance.

    Args:
        addresses: Where each Service of the routes answers.
    """

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.served: Counter[str] = Counter()
        self.mirrored: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._addresses = addresses
        self._rule: dict[str, Any] = {}
        self._due: dict[str, float] = {}
        self._lock = threading.Lock()
        self._mirrors = ThreadPoolExecutor(4)
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                gateway._answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def do_GET(self) -> None:
                gateway._answer(self, None)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def apply(self, route: Mapping[str, Any]) -> None:
        """Follows an HTTPRoute with one rule from the next request on."""
        (rule,) = route["spec"]["rules"]
        with self._lock:
            self._rule, self._due = dict(rule), {}

    def close(self) -> None:
        """Waits for the mirrored requests and listens no more."""
        self._mirrors.shutdown()
        self._server.shutdown()
        self._server.server_close()

    def wait_for_mirrors(self) -> None:
        """Returns when every mirrored request so far was answered."""
        self._mirrors.shutdown()
        self._mirrors = ThreadPoolExecutor(4)

    def _chosen(self) -> tuple[str, list[str]]:
        """The Service that answers the next request, and those that get a copy."""
        with self._lock:
            backends = {each["name"]: each.get("weight", 1) for each in self._rule["backendRefs"]}
            total = sum(backends.values())
            for name, weight in backends.items():
                self._due[name] = self._due.get(name, 0.0) + weight / total
            chosen = max(backends, key=lambda name: self._due[name])
            self._due[chosen] -= 1.0
            copies = []
            for each in self._rule.get("filters", []):
                mirror = each["requestMirror"]
                name = mirror["backendRef"]["name"]
                share = f"mirror {name}"
                self._due[share] = self._due.get(share, 0.0) + mirror.get("percent", 100) / 100
                if self._due[share] >= 1.0 - 1e-9:
                    self._due[share] -= 1.0
                    copies.append(name)
        return chosen, copies

    def _answer(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> None:
        headers = {name: handler.headers[name] for name in PASSED_HEADERS if handler.headers[name]}
        if body is None:
            name, copies = self._rule["backendRefs"][0]["name"], list[str]()
        else:
            name, copies = self._chosen()
        for copy in copies:
            self.mirrored[copy] += 1
            self._mirrors.submit(_ask, self._addresses[copy] + handler.path, headers, body)
        status, content_type, content = _ask(self._addresses[name] + handler.path, headers, body)
        if body is not None:
            self.served[name] += 1
            self.statuses[status] += 1
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


def _ask(url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[int, str, bytes]:
    """Status, content type and body of an answer."""
    request = urllib.request.Request(url, data=body, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Content-Type", ""), error.read()
