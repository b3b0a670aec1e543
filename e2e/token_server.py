#!/usr/bin/env python3
"""A token server for docker-registry's `auth: token`: RS256, a few seconds of life, one line on stdout for each token.

usage: token_server.py PORT KEY.pem CERT.pem USER PASSWORD|@FILE EXPIRES_IN [PUBLIC REPOSITORY | OTHER:PASSWORD]...

GET /token?service=S&scope=repository:NAME:ACTIONS answers {"token", "expires_in"}. Without the right Basic credentials the token
grants nothing but pulling from public repositories, and neither does it with those of another user. A password in a file is read for each request, so that it can be rotated. Signing is left to the openssl command, so that Python's standard library is enough.
While the file named by $TOKEN_STATUS exists, everybody is answered with the status that is written in it.
"""

import base64
import hmac
import json
import os
import subprocess
import sys
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ISSUER = "e2e"
# docker-registry still takes a token for so long after its `exp`: the life written into the token is shorter by as much,
# so that a token that is used too long really fails.
REGISTRY_LEEWAY = 60

STATUS_FILE = os.environ.get("TOKEN_STATUS", "")
PORT, KEY, CERT, USER, PASSWORD, EXPIRES_IN, *REST = sys.argv[1:]
PUBLIC = [one for one in REST if ":" not in one]
OTHERS = [one for one in REST if ":" in one]


def basic_of(login):
    return "Basic " + base64.b64encode(login.encode()).decode()


def basic():
    password = PASSWORD
    if password.startswith("@"):
        with open(password[1:], encoding="utf-8") as file:
            password = file.read().strip()
    return basic_of(f"{USER}:{password}")


def refusal():
    """The status for everybody, or None."""
    try:
        with open(STATUS_FILE, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def b64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def certificate():
    with open(CERT, encoding="ascii") as file:
        return "".join(line.strip() for line in file if "-----" not in line)


def access_of(scope):
    """`repository:some/name:pull,push` grants pull; the name may hold a colon, the actions may not."""
    kind, _, rest = scope.partition(":")
    name, _, actions = rest.rpartition(":")
    return {"type": kind, "name": name, "actions": [a for a in actions.split(",") if a == "pull"]}


def token(service, access):
    now = int(time.time())
    header = {"typ": "JWT", "alg": "RS256", "x5c": [certificate()]}
    claims = {
        "iss": ISSUER,
        "sub": USER,
        "aud": service,
        "iat": now,
        "nbf": now - 10,
        "exp": now + int(EXPIRES_IN) - REGISTRY_LEEWAY,
        "jti": str(time.monotonic_ns()),
        "access": access,
    }
    text = b".".join(b64url(json.dumps(part).encode()) for part in (header, claims))
    sign = ["openssl", "dgst", "-sha256", "-binary", "-sign", KEY]
    signature = subprocess.run(sign, input=text, stdout=subprocess.PIPE, check=True).stdout
    return (text + b"." + b64url(signature)).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        if url.path != "/token":
            self.answer(404, {"error": "not found"})
            return
        status = refusal()
        if status:
            print("refused", status, flush=True)
            self.answer(status, {"errors": [{"code": "DENIED", "message": "not today"}]})
            return
        known = hmac.compare_digest(self.headers.get("Authorization", ""), basic())
        scopes = [one for value in query.get("scope", []) for one in value.split()]
        access = [one for one in map(access_of, scopes) if known or one["name"] in PUBLIC]
        shown = self.headers.get("Authorization")
        others = [one.partition(":")[0] for one in OTHERS if basic_of(one) == shown]
        who = USER if known else others[0] if others else "anonymous" if shown is None else "unknown"
        print("token", who, *scopes, flush=True)
        if who == "unknown":
            self.answer(401, {"details": "incorrect username or password"})
            return
        body = {"token": token(query.get("service", [""])[0], access), "expires_in": int(EXPIRES_IN)}
        self.answer(200, body)

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):  # the request line would hold nothing that `token` lines do not
        pass


ThreadingHTTPServer(("127.0.0.1", int(PORT)), Handler).serve_forever()
