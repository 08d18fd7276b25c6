"""A real S3 server on loopback: Ceph's radosgw with one monitor and one OSD that keeps its data in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "monmaptool", "radosgw", "radosgw-admin")
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
_POOLS = (".rgw.root", *(f"default.rgw.{n}" for n in ("log", "control", "meta", "buckets.index", "buckets.data")))
_CONFIG = """
[global]
fsid = {fsid}
mon_host = [v1:127.0.0.1:{mon_port}/0]
mon_initial_members = a
ms_bind_msgr2 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
run_dir = {dir}/run
log_file = {dir}/log/$name.log
admin_socket = {dir}/run/$name.asok
pid_file = {dir}/run/$name.pid
keyring = {dir}/keyring
[mon]
mon_data = {dir}/mon
[osd]
osd_data = {dir}/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_class_update_on_start = false
osd_crush_update_on_start = false
[client.rgw]
rgw_data = {dir}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_enable_apis = s3
rgw_run_sync_thread = false
"""


def why_not() -> str | None:
    """Say why this machine cannot run the server, or return None."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: radosgw ceph-mon ceph-osd ceph-common)"
    return None if os.geteuid() == 0 else "Ceph's daemons need root here"


class Radosgw:
    """A running server with its files in `folder`. `stop` ends its daemons and no other process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        mon_port, self._port = _free_ports()
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir(parents=True)
        (folder / "keyring").touch()
        self._conf = folder / "ceph.conf"
        fsid = str(uuid.uuid4())
        self._conf.write_text(_CONFIG.format(fsid=fsid, mon_port=mon_port, dir=folder, port=self._port))
        try:
            self._start(fsid, mon_port)
        except BaseException as error:
            self.stop()
            if not isinstance(error, Exception):  # an interrupt: the logs do not explain it
                raise
            raise RuntimeError(f"no S3 server: {error}\n{self._log_tail()}") from error

    @property
    def endpoint(self) -> str:
        """The URL of the S3 API."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    def client(self) -> Any:
        """Return a boto3 client. Sightline's own store cannot make buckets."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        """Make an empty bucket, and return its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def stop(self) -> None:
        """End the daemons by the process ids in their pid files."""
        for file in (self._folder / "run").glob("*.pid"):
            pid = int(file.read_text().strip() or 0)
            if pid and self._is_ours(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _is_ours(self, pid: int) -> bool:
        """Whether the process was started with this server's configuration; another process may have the id by now."""
        try:
            return os.fsencode(self._conf) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False

    def _log_tail(self) -> str:
        logs = sorted((self._folder / "log").glob("*.log"), key=lambda log: log.stat().st_mtime)
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def _start(self, fsid: str, mon_port: int) -> None:
        folder, conf = self._folder, ["-c", str(self._conf)]
        monmap = folder / "monmap"
        address = f"[v1:127.0.0.1:{mon_port}]"
        self._run("monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", fsid, str(monmap))
        as_root = ["--setuser", "root", "--setgroup", "root"]
        self._run("ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", str(monmap), "--keyring", "/dev/null")
        self._run("ceph-mon", *conf, "-i", "a", *as_root)
        self._ceph("status")
        self._run("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", str(uuid.uuid4()), *as_root)
        self._ceph("osd", "new", (folder / "osd/fsid").read_text().strip())
        self._run("ceph-osd", *conf, "-i", "0", *as_root)
        self._ceph("osd", "crush", "add", "osd.0", "1", "host=h", "root=default")
        for pool in (*_POOLS, "default.rgw.buckets.non-ec"):
            self._ceph("osd", "pool", "create", pool, "4")
            self._ceph("osd", "pool", "application", "enable", pool, "rgw")
        user = ["--uid=test", "--display-name=test", f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        self._run("radosgw-admin", *conf, "user", "create", *user)
        self._run("radosgw", *conf, "-n", "client.rgw", *as_root)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.endpoint, timeout=2).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"radosgw did not answer on {self.endpoint}")

    def _ceph(self, *arguments: str) -> None:
        # The monitor sometimes refuses a client that connects before the monitor knows the cluster's id.
        for _ in range(4):
            with contextlib.suppress(RuntimeError):
                return self._run("ceph", "-c", str(self._conf), "--connect-timeout", "30", *arguments)
            time.sleep(0.5)
        return self._run("ceph", "-c", str(self._conf), "--connect-timeout", "30", *arguments)

    def _run(self, *command: str) -> None:
        # Output goes to a file: a daemon in the background would keep a pipe open, and `run` would not return.
        with open(self._folder / "log/commands.log", "ab") as log:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])} ... exited with {done.returncode}")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:  # both held, so that they differ
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])
