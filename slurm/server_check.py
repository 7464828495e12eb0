"""Check that servers respond: print those that do not, exit with 0 when all do.

Standard library only, so that it runs in every image.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

PROBE_S = 5.0
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Bypasses the proxy that a cluster may have for outgoing connections."""


def trouble(url: str) -> str:
    """Return why the server is not ready, or an empty string.

    The API key comes from the environment: other users can read command lines.
    """
    request = urllib.request.Request(f"{url}/health")
    if key := os.environ.get("SPARK_NEMO_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with DIRECTLY.open(request, timeout=PROBE_S):
            return ""
    except (urllib.error.URLError, OSError) as error:
        return str(error)


def main() -> int:
    """Send one request to every URL."""
    troubles = {url: text for url in sys.argv[1:] if (text := trouble(url))}
    for url, text in troubles.items():
        print(f"{url} does not respond: {text}")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
