"""Evaluation: a connection to Ray, on this machine or to a running cluster, or a clear word on why there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
from typing import Any

from evomem.errors import WorkerError
from evomem.installing import pip_install
from evomem.workers.base import WorkerOptions, cores

MEGABYTE = 1 << 20
REACH_SECONDS = 5.0
_SETTINGS = b"\x04"  # HTTP/2's type of frame; a frame begins with its length (3 bytes) and type
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)


class Connection:
    """Ray, connected.

    Parameters
    ----------
    options : how many workers, where, and what each asks for.
    threads : processor threads of a worker.
    shared_bytes : what the workers of a machine share in memory: weights and contexts.

    Attributes
    ----------
    ray : the library.
    cpus, gpus : what every worker asks for.
    count : how many workers there are to be.
    node : Ray's name of this machine.

    Raises
    ------
    WorkerError : Ray is missing, cannot be started or reached, is of another version, or has not the resources.
    """

    def __init__(self, options: WorkerOptions, threads: int, shared_bytes: int) -> None:
        self.ray = library()
        self.cpus = float(threads) if options.cpus is None else options.cpus
        self._own = False
        if not self.ray.is_initialized():
            if options.address is None:
                self._check_cores(options.count or 1)
                self._start(shared_bytes)
            else:
                self._join(options.address)
        try:
            self.gpus, self.count = self._check_resources(options)
            self.node: str = self.ray.get_runtime_context().get_node_id()
        except self.ray.exceptions.RayError as error:
            self.close()
            raise WorkerError(f"Ray, which ran already, does not answer: {_first_line(error)}") from error
        except BaseException:
            self.close()
            raise

    def _check_cores(self, count: int) -> None:
        """Refuse more workers than this machine has cores: Ray would wait for them for ever, in silence."""
        there = cores()
        if count * self.cpus > there + 1e-9:
            raise WorkerError(
                f"{count} workers of {self.cpus:g} cores need {count * self.cpus:g} cores; this machine has {there}. "
                f"Take at most --workers {max(int(there // self.cpus), 0)}, let them share cores "
                f"(--cpus-per-worker {there / count:.2g}), or join a cluster (--address)"
            )

    def _start(self, shared_bytes: int) -> None:
        memory = _object_store(shared_bytes)
        try:
            self.ray.init(
                address="local",  # a cluster that happens to run here is joined only by its address
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=memory,
            )
        except Exception as error:
            raise WorkerError(
                f"Ray could not be started on this machine: {_first_line(error)}. Evaluations also run without it: "
                "--workers 0"
            ) from error
        self._own = True

    def _join(self, address: str) -> None:
        if "://" in address:
            raise WorkerError(
                f"--address {address}: evomem runs on a machine of the cluster and not through Ray's client. Start Ray "
                "on this machine (ray start --address HEAD:6379), then take --address auto"
            )
        if address != "auto":
            _check_reachable(address)
        try:
            self.ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            reason = _first_line(error)
            advice = "start one with: ray start --head" if address == "auto" else "is its head node running?"
            if "ersion mismatch" in str(error):
                reason = " ".join(str(error).split())
                advice = "install the same versions of Ray and Python on every machine of the cluster"
            raise WorkerError(f"--address {address}: no Ray cluster could be joined: {reason}; {advice}") from error
        self._own = True

    def _check_resources(self, options: WorkerOptions) -> tuple[float, int]:
        there = self.ray.cluster_resources()
        gpus = options.gpus if options.gpus is not None else (1.0 if there.get("GPU", 0) >= 1 else 0.0)
        if options.count is None:
            room = there.get("CPU", 0.0) / self.cpus
            return gpus, max(1, int(min(room, there["GPU"] / gpus) if gpus else room))
        for name, each in (("CPU", self.cpus), ("GPU", gpus)):
            if options.count * each > there.get(name, 0.0) + 1e-9:
                most = int(there.get(name, 0.0) // each)
                raise WorkerError(
                    f"{options.count} workers need {options.count * each:g} {name}s, and Ray has "
                    f"{there.get(name, 0.0):g}. Take at most --workers {most}, ask for less with "
                    f"--{name.lower()}s-per-worker, or add machines to the cluster"
                )
        return gpus, options.count

    def node_is_dead(self, node: str) -> bool:
        """Tell whether Ray knows a machine to be gone."""
        try:
            return any(one["NodeID"] == node and not one["Alive"] for one in self.ray.nodes())
        except Exception:  # without an answer the worker is taken to have died alone
            return False

    def close(self) -> None:
        """Leave the cluster; Ray on this machine ends if it was started for this connection."""
        if self._own:
            self._own = False
            self.ray.shutdown()


def library() -> Any:
    """Return the module `ray`, told what to leave.

    Raises
    ------
    WorkerError : it is not installed.
    """
    # Read when Ray is imported. No usage reports; no warning about accelerators that a worker does not ask for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray gives its workers the lowest priority; but they are the run, as the process itself is with --workers 0.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray prints a paragraph for every worker that dies, whatever `log_to_driver` says. The pool says it in a line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError:
        raise WorkerError(f"workers need Ray: {pip_install('search')}") from None
    with contextlib.suppress(ImportError, AttributeError):  # if something (EvoTorch) had imported Ray before
        from ray._private.ray_logging import stdout_deduplicator

        stdout_deduplicator.skip_re = re.compile(os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"])
    return ray


def _object_store(shared_bytes: int) -> int:
    """Return how many bytes of shared memory to set aside: what is needed, within what the machine can give.

    Contexts that do not fit any more are written to disk by Ray.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = int(0.4 * free)
    if os.path.isdir("/dev/shm"):
        limit = min(limit, int(0.9 * shutil.disk_usage("/dev/shm").free))
    return max(128 * MEGABYTE, min(shared_bytes + 256 * MEGABYTE, limit))


def _check_reachable(address: str) -> None:
    """Raise `WorkerError` unless something at HOST:PORT speaks Ray's protocol: Ray itself would try for minutes.

    Ray's servers speak gRPC, which is HTTP/2 (RFC 9113): after the client's preface the server sends its settings.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise WorkerError(f"--address {address}: not an address; give auto, or HOST:PORT of the cluster's head node")
    with contextlib.suppress(
        ImportError, AttributeError
    ):  # Ray never asks at 127.0.0.1, but at the machine's own address
        from ray._private.services import resolve_ip_for_localhost

        host = resolve_ip_for_localhost(host)
    hint = "Is the head node running (ray start --head), is this its port, and is it open to this machine?"
    try:
        with socket.create_connection((host, int(port)), timeout=REACH_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(_PREFACE)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise WorkerError(f"--address {address}: nothing answers there ({error}). {hint}") from error
    if answer[3:4] != _SETTINGS:
        raise WorkerError(f"--address {address}: what answers there is not Ray. {hint}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
