"""A private SLURM of two nodes on this machine, without systemd, started and stopped by a test."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

_CONF = """\
ClusterName=ds_kd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ReturnToService=2
KillWait=30
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES DefaultTime=20 State=UP
"""


def missing() -> str | None:
    """Return why there can be no cluster here; None if there can."""
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed: bash launch/test.sh --system-packages"
    return None if os.getuid() == 0 else "SLURM's daemons are started as root"


class Cluster:
    """Running between `start` and `stop`.

    Args:
        root: a short path (munge's socket is below it) that all daemons may write.
    """

    def __init__(self, root: Path):
        self.root = root
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        self._nodes: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        for name in ("munge", "state", "spool.n1", "spool.n2"):
            (self.root / name).mkdir(parents=True)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.root / "munge").chmod(0o711)
        conf = _CONF.format(ports=_free_ports(3), user=getpass.getuser(), root=self.root)
        (self.root / "slurm.conf").write_text(conf)
        munge = self.root / "munge"
        self._daemon("munged", "-F", "--force", f"--key-file={key}", f"--socket={munge}/socket",
                     f"--pid-file={munge}/pid", f"--log-file={munge}/log",
                     f"--seed-file={munge}/seed")  # fmt: skip
        self._until(lambda: (munge / "socket").exists(), "munged's socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._nodes[node] = self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "idle nodes")

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """The output of one of SLURM's commands; empty where it fails."""
        done = subprocess.run(
            words, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    def about(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", job))
        return found[1] if found else ""

    def finish(self, job: str, seconds: float = 150) -> str:
        """The job's last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._until(lambda: self.about(job, "JobState") in over, f"the end of job {job}", seconds)
        return self.about(job, "JobState")

    def start_again_now(self, job: str) -> None:
        """Skip the two minutes that SLURM lets a requeued job wait."""
        self._until(lambda: self.about(job, "JobState") == "PENDING", "the requeued job", 90)
        # Those two minutes let the nodes clear up; started before, the attempt would be killed too.
        self._until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "idle nodes")
        # A node counts in whole seconds: what starts in the one that ended the attempt is refused.
        time.sleep(2)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def lose(self, node: str, ranks: list[psutil.Process]) -> None:
        """Take a node and the ranks on it away at once, as a power failure would."""
        self._nodes[node].kill()
        for rank in ranks:
            rank.suspend()  # no rank tells srun of its end, as SLURM would take it for the job's
        # The controller finds it out by itself too, a minute later.
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
        for rank in ranks:
            rank.kill()

    def bring_back(self, node: str) -> None:
        """Start a lost node again."""
        self._nodes[node] = self._daemon("slurmd", "-D", "-N", node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _daemon(self, *words: str) -> subprocess.Popen:
        with (self.root / f"{words[0]}.out").open("ab") as out:
            made = subprocess.Popen(words, env=self.environment, stdout=out, stderr=out)
        self._daemons.append(made)
        return made

    def _until(self, true, what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what}: not seen in {seconds} s"
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
