"""Start a server inside its own environment; run by path, so it imports nothing of spark_nemo.

    server_wrapper.py server ARGUMENTS          an SGLang server
    server_wrapper.py router ARGUMENTS          its router
    server_wrapper.py exec PROGRAM ARGUMENTS    any other server, such as vLLM's

The wrapper does three things that the servers do not:

* No process outlives its parent. This process dies with its parent, and a guard that is forked
  first kills the whole process group when this process dies, whatever killed it.
* SGLang's API key stays secret. SGLang 0.5.21 takes it only as ``--api-key``, which every user of
  the machine can read in the process list, and logs all its arguments. Here the key comes from the
  environment, goes into the arguments inside the process, and is removed from every log record.
* A server reaches itself, and a router its servers, past the proxies of the environment.
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
    """Become the server that the command line names."""
    _leave_own_folder()
    _die_with_parent()
    _fork_guard()
    what = sys.argv[1]
    arguments = sys.argv[2:]
    key = os.environ.pop(KEY_VARIABLE, None)
    sys.argv = [what, *arguments]
    if key:
        _remove_from_logs(key)
    _bypass_proxies(what, arguments)
    if what == "exec":
        os.execv(arguments[0], arguments)
    if what == "router":
        _run_router(arguments, key)
    else:
        _run_server(arguments, key)
    return 0


def _leave_own_folder() -> None:
    """Remove this script's folder from the search path: its modules would hide a server's."""
    here = os.path.dirname(__file__)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]


def _die_with_parent() -> None:
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The kernel sends no signal for a parent that was dead before the call above.
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def _fork_guard() -> None:
    """Fork a process that kills this process group when this process dies.

    SGLang's workers ask the kernel to die with their parent only after their imports, half a minute
    in.
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
    # A group of its own: a SIGSTOP to the server's group must not stop its guard.
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != guarded:
        kill_group()
    while True:
        signal.pause()


def _bypass_proxies(what: str, arguments: list[str]) -> None:
    """Keep proxies away from addresses inside the cluster.

    In its warm-up an SGLang server calls itself over HTTP, through a proxy of the environment if
    there is one, and exits when that fails. A router calls servers of this cluster only.
    """
    if what == "router":
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
    hosts = [value for flag, value in itertools.pairwise(arguments) if flag == "--host"]
    before = [os.environ[name] for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)]
    no_proxy = ",".join([*before, *hosts, "127.0.0.1", "localhost"])
    os.environ["no_proxy"] = no_proxy
    os.environ["NO_PROXY"] = no_proxy


def _remove_from_logs(key: str) -> None:
    """Hide the key by the record factory: SGLang replaces handlers and formatters, but not that."""
    import logging  # here, once this script's folder is off the search path

    make_record = logging.getLogRecordFactory()

    def make_record_without_key(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        text = record.getMessage()
        if key in text:
            record.msg = text.replace(key, "***")
            record.args = ()
        return record

    logging.setLogRecordFactory(make_record_without_key)


def _run_server(arguments: list[str], key: str | None) -> None:
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


def _run_router(arguments: list[str], key: str | None) -> None:
    from sglang_router.launch_router import launch_router, parse_router_args

    router_args = parse_router_args(arguments)
    router_args.api_key = key
    launch_router(router_args)


if __name__ == "__main__":
    sys.exit(main())
