"""Check this node for the job. Preflight runs it once per node; it prints ``NODE ok PORT`` or
``NODE REASON``.

Standard library only, so that it runs in every image. PORT is the first of ``--ports`` free ones in
a row, where ranks can meet and servers listen.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import subprocess
from pathlib import Path

TRIED_PORTS = 64


def main() -> None:
    """Print the answer for this node."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--canary", required=True, help="file that the batch script has just written"
    )
    parser.add_argument("--head", required=True, help="node where the ranks meet")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument(
        "--gpu-count", default="", help="shell command that prints the number of GPUs"
    )
    parser.add_argument("--first-port", type=int, required=True)
    parser.add_argument(
        "--ports", type=int, default=1, help="how many free ports are needed, in a row"
    )
    parser.add_argument(
        "--needs", action="append", default=[], help="file or folder that must be visible"
    )
    arguments = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    port = first_free(arguments.first_port, arguments.ports)
    print(node, trouble(arguments) or (f"ok {port}" if port else "has no free ports"), flush=True)


def trouble(arguments: argparse.Namespace) -> str:
    """Return what is wrong on this node, or an empty string."""
    for path in [arguments.canary, *arguments.needs]:
        if not Path(path).exists():
            return (
                f"does not see {path}: is it on a file system that all nodes share, "
                "and mounted in the image?"
            )
    try:
        socket.getaddrinfo(arguments.head, None)
    except OSError as error:
        return f"cannot resolve the head node {arguments.head}: {error}"
    if int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1 and (name := unreachable_name()):
        return (
            f"resolves its own name {name} to itself alone (127...), where servers and gloo would "
            "listen unreachable for the other nodes: correct /etc/hosts, or for gloo alone set "
            "GLOO_SOCKET_IFNAME in slurm/site.env"
        )
    if arguments.gpus:
        counted = subprocess.run(
            arguments.gpu_count, shell=True, capture_output=True, text=True, check=False
        )
        found = counted.stdout.strip()
        if found != str(arguments.gpus):
            return (
                f"has {found or 'no'} GPUs of GPUS_PER_NODE={arguments.gpus} "
                f"({arguments.gpu_count}; a step sees those that the job asked for, as with sbatch "
                "--gpus-per-node: --exclusive alone asks for none) "
                f"{counted.stderr.strip()}"
            )
    return ""


def unreachable_name() -> str:
    """Return a name of this node that resolves to itself alone, or an empty string.

    Servers listen at the node's name in Slurm, gloo at its host name: other nodes could not reach
    them. Debian's installer writes ``127.0.1.1 NAME`` into /etc/hosts.
    """
    names = [os.environ.get("SLURMD_NODENAME", "")]
    if not os.environ.get("GLOO_SOCKET_IFNAME"):
        names.append(socket.gethostname())
    for name in filter(None, names):
        try:
            found = {entry[4][0].partition("%")[0] for entry in socket.getaddrinfo(name, None)}
        except OSError:  # gloo then looks for another address, and a server says so itself
            continue
        if all(ipaddress.ip_address(address).is_loopback for address in found):
            return name
    return ""


def first_free(first: int, count: int) -> int:
    """Return the first of ``count`` free neighbouring ports near ``first``; 0 if there are none."""
    for start in range(first, first + TRIED_PORTS):
        if all(is_free(port) for port in range(start, start + count)):
            return start
    return 0


def is_free(port: int) -> bool:
    """Return whether a server could listen on this port."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    main()
