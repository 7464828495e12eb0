"""A real Slurm on one machine: a controller and several node daemons, each node in namespaces of
its own.

A node has its own network address, host name, /dev/shm and process table, and a folder that no
other node sees; the rest of the file system is the shared one. Killing a node's init is a node
crash: everything on it is gone at once. Needs the rights to make namespaces; ``tests/slurm/run.sh``
starts pytest with them, inside one more set of namespaces whose end takes every process along.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SEARCH = "/usr/local/sbin:/usr/sbin:/sbin:" + os.environ.get("PATH", "")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
SUBNET = "10.213.77"
FREEZER = Path("/sys/fs/cgroup/freezer")

CONF = """ClusterName=spark
SlurmctldHost={host}({subnet}.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=8
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
KillWait=8
MinJobAge=900
GresTypes=gpu
"""


def best_proctrack() -> str:
    """Return production's plugin if this machine allows it (root and a writable freezer)."""
    return "cgroup" if os.geteuid() == 0 and os.access(FREEZER, os.W_OK) else "linuxproc"


class Cluster:
    """``start`` it, submit jobs, crash and restart nodes, ``stop`` it."""

    def __init__(
        self,
        folder: Path,
        nodes: int,
        gpus: int,
        cpus: int,
        proctrack: str,
        plugins: Sequence[Path],
    ) -> None:
        self.folder, self.gpus, self.cpus, self.proctrack = folder, gpus, cpus, proctrack
        self.names = [f"node{i}" for i in range(nodes)]
        self.plugins = plugins
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.private = folder / "private"
        """Every node sees its own empty folder here."""

    # --- commands

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a user's shell on the login node."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}

    def run(
        self,
        *command: object,
        check: bool = True,
        timeout: float = 60,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **(env or {})},
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def sbatch(
        self, *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> int:
        """Submit and return the job id."""
        cwd = cwd or self.folder / "home"
        return int(
            self.run("sbatch", "--parsable", *arguments, env=env, cwd=cwd).stdout.split(";")[0]
        )

    def job(self, job_id: int) -> dict[str, str]:
        """``scontrol show job`` as a dict; of an array, its first record."""
        text = self.run("scontrol", "-o", "show", "job", job_id, check=False).stdout
        return dict(
            re.findall(
                r"(\S+?)=(.*?)(?=\s+[A-Za-z/:]+=|\s*$)", text.splitlines()[0] if text else ""
            )
        )

    def array_states(self, job_id: int) -> list[str]:
        """The state of every task of an array."""
        text = self.run("scontrol", "-o", "show", "job", job_id, check=False).stdout
        return re.findall(r"JobState=(\w+)", text)

    def wait_state(
        self, job_id: int, states: set[str] = ENDED, timeout: float = 120
    ) -> dict[str, str]:
        """Poll until the job is in one of ``states`` (``sbatch --wait`` polls every 10 s)."""
        self.until(
            lambda: self.job(job_id).get("JobState") in states, f"job {job_id} in {states}", timeout
        )
        return self.job(job_id)

    def until(self, condition: Callable[[], object], what: str, timeout: float = 120) -> None:
        """Wait for ``condition``; on a timeout show queue and logs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {timeout:.0f} s\n{self._state()}"
            time.sleep(0.1)

    def processes_of_jobs(self) -> list[str]:
        """Command lines of what Slurm's step daemons have left running anywhere on the cluster."""
        parents: dict[int, int] = {}
        lines: dict[int, str] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                )
                lines[int(entry.name)] = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except (OSError, ValueError):
                continue
        daemons = {
            pid
            for pid, line in lines.items()
            if line.startswith("slurmd ") or "unshare" in line.split(" ")[0]
        }
        daemons |= {child for child, parent in parents.items() if parent in daemons}
        steps = {pid for pid, line in lines.items() if "slurmstepd" in line.split(" ")[0]}
        orphans = {
            pid for pid, parent in parents.items() if parent in daemons and pid not in daemons
        }
        return [
            lines[pid]
            for pid in steps | {p for p in orphans if lines[p] and "slurmd" not in lines[p]}
        ]

    # --- nodes

    def start_node(self, name: str) -> None:
        """Boot a node: fresh namespaces, a network card, its daemon."""
        number = self.names.index(name) + 11
        script = f"""set -e
hostname {name}
mount --bind {self.folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs {self.private}
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add {SUBNET}.{number}/24 dev eth0
ip link set eth0 up
trap '' TERM
slurmd -D -f {self.folder}/slurm.conf -N {name} &
wait"""
        process = self._spawn(
            name,
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            "bash",
            "-c",
            script,
        )
        here = os.readlink("/proc/self/ns/net")
        self.until(
            lambda: (i := self._init(process.pid)) and os.readlink(f"/proc/{i}/ns/net") != here,
            "namespace",
            20,
        )
        # A fixed hardware address: with a new one the others' ARP entries are stale and steps fail
        # to start.
        subprocess.run(
            [
                "ip",
                "link",
                "add",
                f"veth{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "address",
                f"02:51:00:00:00:{number:02x}",
                "netns",
                str(self._init(process.pid)),
            ],
            check=True,
        )
        subprocess.run(["ip", "link", "set", f"veth{number}", "master", "spark0", "up"], check=True)

    def crash_node(self, name: str) -> None:
        """Everything on the node is gone at once, as after a power cut."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        subprocess.run(
            ["ip", "link", "del", f"veth{self.names.index(name) + 11}"],
            capture_output=True,
            check=False,
        )

    def on_node(self, name: str, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a command inside a node's namespaces."""
        init = self._init(self.processes[name].pid)
        return self.run("nsenter", "-t", init, "-n", "-u", "-m", "-p", *command, check=False)

    def wait_idle(self, timeout: float = 40) -> None:
        """Wait until every node is up and empty."""
        self.until(lambda: self._node_states() == {"idle"}, "idle nodes", timeout)

    def clear(self) -> None:
        """After a test: no jobs, and every node up again."""
        if jobs := self.run("squeue", "-h", "-o", "%A", check=False).stdout.split():
            self.run("scancel", "--full", "-s", "KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
        for name in self.names:
            if name not in self.processes:
                self.start_node(name)
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        self.wait_idle()

    # --- start and stop

    def start(self) -> None:
        """Bring everything up; about a second."""
        for name in ("state", "spool", "log", "run", "dev", "home", "private"):
            (self.folder / name).mkdir()
        self._write_files()
        run = self.folder / "run"
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "link", "add", "spark0", "type", "bridge"], check=True)
        subprocess.run(["ip", "addr", "add", f"{SUBNET}.1/24", "dev", "spark0"], check=True)
        subprocess.run(["ip", "link", "set", "spark0", "up"], check=True)
        self._spawn(
            "munged",
            "munged",
            "-F",
            "--force",
            f"--socket={run}/munge.sock",
            f"--key-file={self.folder}/munge.key",
            f"--log-file={self.folder}/log/munged.log",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munged.seed",
        )
        self.until((run / "munge.sock").exists, "munge socket", 20)
        self._spawn(
            "slurmctld", "slurmctld", "-D", "-c", "-i", "-f", str(self.folder / "slurm.conf")
        )
        for name in self.names:
            self.start_node(name)
        self.wait_idle()

    def stop(self) -> None:
        """Kill jobs, nodes and daemons, and remove what they left in the machine's cgroups and
        network.
        """
        if "slurmctld" in self.processes and (
            jobs := self.run("squeue", "-h", "-o", "%A", check=False).stdout.split()
        ):
            self.run("scancel", "--full", "-s", "KILL", *jobs, check=False)
        for name in list(self.processes):
            process = self.processes.pop(name)
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "del", "spark0"], capture_output=True, check=False)
        for name in self.names if self.proctrack == "cgroup" else ():
            for path, _, _ in os.walk(FREEZER / f"slurm_{name}", topdown=False):
                self.until(lambda path=path: _removed(path), f"end of the processes in {path}", 10)

    def _write_files(self) -> None:
        folder = self.folder
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        hosts = [f"127.0.0.1 localhost\n{SUBNET}.1 login {socket.gethostname()}"]
        hosts += [f"{SUBNET}.{11 + i} {name}" for i, name in enumerate(self.names)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "gres.conf").write_text(
            f"NodeName={','.join(self.names)} Name=gpu File={self._gpu_files()}\n"
        )
        if self.proctrack == "cgroup":
            (folder / "cgroup.conf").write_text(
                "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
            )
        (folder / "plugstack.conf").write_text(
            "".join(f"required {path}\n" for path in self.plugins)
        )
        text = CONF.format(
            host=socket.gethostname(),
            subnet=SUBNET,
            user=getpass.getuser(),
            folder=folder,
            proctrack=self.proctrack,
        )
        for i, name in enumerate(self.names):
            text += (
                f"NodeName={name} NodeHostname={name} NodeAddr={SUBNET}.{11 + i} "
                f"CPUs={self.cpus} RealMemory=8000 Gres=gpu:{self.gpus}\n"
            )
        text += (
            f"PartitionName=main Nodes={','.join(self.names)} Default=YES MaxTime=INFINITE "
            "State=UP\n"
        )
        (folder / "slurm.conf").write_text(text)

    def _gpu_files(self) -> str:
        # Slurm sets CUDA_VISIBLE_DEVICES only for character devices.
        try:
            for i in range(self.gpus):
                os.mknod(self.folder / f"dev/gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            return f"{self.folder}/dev/gpu[0-{self.gpus - 1}]"
        except PermissionError:
            return f"/dev/tty[0-{self.gpus - 1}]"

    def _spawn(self, key: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log" / f"{key}.out").open("ab") as output:
            self.processes[key] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
            )
        return self.processes[key]

    def _init(self, unshare_pid: int) -> int:
        children = Path(f"/proc/{unshare_pid}/task/{unshare_pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _node_states(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split())

    def _state(self) -> str:
        parts = [
            self.run("squeue", check=False).stdout,
            self.run("sinfo", "-N", "-l", check=False).stdout,
        ]
        for path in sorted((self.folder / "log").glob("*.log")):
            parts.append(
                f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            )
        return "\n".join(parts)


def _removed(cgroup: str) -> bool:
    """Processes that were killed a moment ago may still be in it."""
    try:
        os.rmdir(cgroup)
    except OSError:
        return False
    return True
