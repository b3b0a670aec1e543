#!/usr/bin/env python3
"""A forwarder in front of a registry that spoils the first requests that match, and nothing else.

usage: fault_proxy.py PORT UPSTREAM FAULT PATTERN [TIMES]

  UPSTREAM  http://HOST:PORT
  FAULT     truncate      half of the body under its full Content-Length, then the connection is closed
            status:NNN    that status, with Retry-After: 1 for 429
  PATTERN   regular expression that the request's path must match
  TIMES     how many matching requests are spoiled, one fault each (default 1)

One line on stdout for each request: `METHOD PATH STATUS`, with `fault` behind it where one was applied.
"""

import http.client
import json
import re
import socket
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, UPSTREAM, FAULT, PATTERN = sys.argv[1:5]
REMAINING = int(sys.argv[5]) if len(sys.argv) > 5 else 1
TARGET = urllib.parse.urlsplit(UPSTREAM)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer"}
LOCK = threading.Lock()


def spoil(path):
    """Whether this request is one to spoil; counts it when it is."""
    global REMAINING
    with LOCK:
        if REMAINING == 0 or not re.search(PATTERN, path):
            return False
        REMAINING -= 1
        return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        spoiled = spoil(self.path)
        if spoiled and FAULT.startswith("status:"):
            self.refuse(int(FAULT.removeprefix("status:")))
            return
        upstream = http.client.HTTPConnection(TARGET.hostname, TARGET.port, timeout=60)
        try:
            self.relay(self.ask(upstream), spoiled)
        finally:
            upstream.close()

    do_GET = do_HEAD = forward

    def ask(self, upstream):
        """The client's request as it came: header lines are not merged, for registries do look at each `Accept`."""
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.endheaders()
        return upstream.getresponse()

    def relay(self, answer, spoiled):
        self.note(answer.status, spoiled)
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if answer.headers.get("Content-Length") is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.copy(answer, spoiled)

    def copy(self, answer, spoiled):
        left = int(answer.headers.get("Content-Length", 0)) // 2 if spoiled else None
        while data := answer.read(65536 if left is None else min(65536, left)):
            self.wfile.write(data)
            left = None if left is None else left - len(data)
        if spoiled:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status):
        self.note(status, True)
        code = "TOOMANYREQUESTS" if status == 429 else "UNKNOWN"
        body = json.dumps({"errors": [{"code": code, "message": "a fault made by the test"}]}).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def note(self, status, spoiled):
        print(self.command, self.path, status, *(["fault"] if spoiled else []), flush=True)

    def log_message(self, format, *args):  # `note` writes what tests read
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):  # a client that hangs up is no news
        pass


Server(("127.0.0.1", int(PORT)), Handler).serve_forever()
