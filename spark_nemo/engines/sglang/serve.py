"""Runs in the server's own environment, by path: starts SGLang (or its router) with a key that no
command line shows.

SGLang 0.5.21 takes its key only as ``--api-key``, which every user of the machine can read in the
process list, and writes all its arguments, the key too, into its log. Here the key comes from the
environment, goes into the arguments inside the process, and is struck from every log record.

Nothing of what we start may outlive us: this process dies with its parent, and a guard forked first
kills the whole process group when this process dies, whatever killed it. Imports nothing of
spark_nemo.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys

KEY_VARIABLE = "SPARK_NEMO_API_KEY"
PARENT_VARIABLE = "SPARK_NEMO_PARENT"
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """``serve.py server ARGUMENTS``, ``serve.py router ARGUMENTS``, or ``serve.py exec PROGRAM
    ARGUMENTS``, which becomes any other program, guarded as well.
    """
    # A script's own folder comes first on the path, where protocol.py and the others would hide a
    # server's modules.
    sys.path[:] = [
        entry for entry in sys.path if os.path.abspath(entry or ".") != os.path.dirname(__file__)
    ]
    _die_with_parent()
    _fork_guard()
    what, arguments = sys.argv[1], sys.argv[2:]
    key = os.environ.pop(KEY_VARIABLE, None)
    sys.argv = [what, *arguments]
    if key:
        _strike_from_logs(key)
    _past_proxies(what, arguments)
    if what == "exec":
        os.execv(arguments[0], arguments)
    if what == "router":
        _route(arguments, key)
    else:
        _serve(arguments, key)
    return 0


def _die_with_parent() -> None:
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was dead before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _fork_guard() -> None:
    """SGLang's workers ask the kernel to die with their parent only after their imports, half a
    minute in.
    """
    if sys.platform != "linux" or os.getpgrp() != os.getpid():
        return
    guarded = os.getpid()
    if os.fork() != 0:
        return

    def kill_group(*_: object) -> None:
        try:
            os.killpg(guarded, signal.SIGKILL)
        finally:
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, kill_group)
    os.setpgid(0, 0)  # whoever stops the server's group must not stop its guard
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != guarded:
        kill_group()
    while True:
        signal.pause()


def _past_proxies(what: str, arguments: list[str]) -> None:
    """In its warm-up a server asks itself over HTTP, through a proxy of the environment if there is
    one, and ends itself when that fails. A router asks servers of this cluster only.
    """
    if what == "router":
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
    hosts = [value for flag, value in itertools.pairwise(arguments) if flag == "--host"]
    before = [os.environ[name] for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
        [*before, *hosts, "127.0.0.1", "localhost"]
    )


def _strike_from_logs(key: str) -> None:
    """Handlers and formatters are replaced by SGLang on the way; the record factory is not."""
    import logging

    make = logging.getLogRecordFactory()

    def without_key(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        text = record.getMessage()
        if key in text:
            record.msg, record.args = text.replace(key, "***"), ()
        return record

    logging.setLogRecordFactory(without_key)


def _serve(arguments: list[str], key: str | None) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(arguments)
    server_args.api_key = key
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _route(arguments: list[str], key: str | None) -> None:
    from sglang_router.launch_router import launch_router, parse_router_args

    router_args = parse_router_args(arguments)
    router_args.api_key = key
    launch_router(router_args)


if __name__ == "__main__":
    sys.exit(main())
