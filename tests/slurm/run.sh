#!/bin/bash
# Usage: tests/slurm/run.sh [pytest arguments]
# Installs Slurm when it is missing and runs tests/slurm in namespaces whose end takes every daemon and job along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PATH:/usr/sbin:/sbin
not_here() {
    echo "tests/slurm: NOT RUN: $1" >&2
    # A machine without a cluster proves nothing about the scripts; a caller that wants these tests gets an error.
    [[ ${SPARK_NEMO_SLURM_OPTIONAL:-} == 1 ]] && exit 0
    exit 1
}
for program in slurmctld slurmd munged shellcheck ip gcc; do
    command -v "$program" >/dev/null && continue
    sudo=(); [[ $EUID -eq 0 ]] || sudo=(sudo)
    # Debian does not start services in a container. The tests start their own.
    "${sudo[@]}" apt-get update -qq || true
    "${sudo[@]}" apt-get install -y -qq --no-install-recommends slurm-wlm munge shellcheck iproute2 gcc libc6-dev libslurm-dev ||
        not_here "Slurm is not installed and cannot be"
    break
done
# One at a time: node names are the same in every run, and with them the machine's cgroups.
exec {lock}> "/tmp/spark-slurm-$EUID.lock"
flock "$lock"
# Root needs no user namespace; an ordinary user gets the rights for the others in one of its own.
user=(); [[ $EUID -eq 0 ]] || user=(--user --map-current-user --keep-caps)
unshare "${user[@]}" --net --mount --pid --fork --kill-child --mount-proc true ||
    not_here "this machine gives no namespaces of their own to processes"
# munged rejects a folder that others may not enter, as pytest's own are.
SPARK_NEMO_SLURM=$(mktemp -d /tmp/spark-slurm-XXXXXX)
export SPARK_NEMO_SLURM
chmod 755 "$SPARK_NEMO_SLURM"
clean_up() {
    [[ -z ${space:-} ]] || kill -KILL "$space" 2>/dev/null || true
    rm -rf "$SPARK_NEMO_SLURM"
    find /sys/fs/cgroup/freezer -depth -type d -path '*/slurm_node*' -delete 2>/dev/null
    return 0
}
trap clean_up EXIT
trap 'exit 143' TERM INT
targets=(); [[ " $* " == *" tests/slurm"* ]] || targets=(tests/slurm)
unshare "${user[@]}" --net --mount --pid --fork --kill-child --mount-proc \
    "${PYTHON:-.venv/bin/python}" -m pytest "${targets[@]}" "$@" &
space=$!
wait "$space"
