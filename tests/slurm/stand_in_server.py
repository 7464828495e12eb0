"""A test double of a rollout server: answers /health on its --host and --port with its process id.
Nothing else.
"""

from __future__ import annotations

import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {os.environ['SPARK_NEMO_API_KEY']}"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())

    def log_message(self, *_: object) -> None:
        pass


words = sys.argv
if "--die" in words:
    sys.exit("told to die")
HTTPServer(
    (words[words.index("--host") + 1], int(words[words.index("--port") + 1])), Health
).serve_forever()
