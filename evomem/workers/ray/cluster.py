"""Workers: a connection to Ray, on this machine or to a running cluster, or a clear word on why there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomem.errors import WorkerError
from evomem.installing import pip_install
from evomem.workers.ray.address import access
from evomem.workers.ray.local import LocalRay, environment, forget_token, signals_kept
from evomem.workers.units import WorkerOptions, cores

MEGABYTE = 1 << 20
TOKENS = "docs/distributed.md says how to give a cluster a token"
OPEN = (
    "asks for no token: whoever reaches its ports can run code as its user, on this machine and the others, and read "
    "all that workers hold"
)


class Connection:
    """Ray, connected.

    Parameters
    ----------
    options : how many workers, where, and what each asks for.
    threads : processor threads of a worker.
    shared_bytes : what the workers of a machine share in memory: weights and contexts.
    report : told, in a sentence, what a user should know of the cluster.

    Attributes
    ----------
    ray : the library.
    cpus, gpus : what every worker asks for.
    count : how many workers there are to be.
    own : whether Ray was started for this connection, and ends with it.
    node : Ray's name of this machine.

    Raises
    ------
    WorkerError : Ray is missing, cannot be started or reached, is of another version, or has not the resources.
    """

    def __init__(
        self,
        options: WorkerOptions,
        threads: int,
        shared_bytes: int,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.ray = library()
        self.cpus = float(threads) if options.cpus is None else options.cpus
        self._report, self._insecure = report, options.insecure
        self._close: Callable[[], None] = lambda: None
        self.own = False
        if self.ray.is_initialized():
            self._check_access(self.ray.get_runtime_context().gcs_address, "Ray, which ran already in this process,")
        elif options.address is None:
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
        try:
            self._close = LocalRay(self.ray, object_store_memory=_object_store(shared_bytes)).close
            self.own = True
        except Exception as error:
            raise WorkerError(
                f"Ray could not be started on this machine: {_first_line(error)}. Evaluations also run without it: "
                "--workers 0"
            ) from error

    def _join(self, address: str) -> None:
        head = _found() if address == "auto" else address
        if "://" in head:
            raise WorkerError(
                f"--address {head}: evomem runs on a machine of the cluster and not through Ray's client. Start Ray "
                "on this machine (ray start --address HEAD:6379), then take --address auto"
            )
        asked = self._check_access(head, f"--address {head}: the cluster")
        if asked == "token":
            self._check_token(head)
        try:
            with environment(_authentication(asked)), signals_kept(later=True):
                forget_token()
                self.ray.init(address=head, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            reason = _first_line(error)
            advice = "is its head node running?"
            if "ersion mismatch" in str(error):
                reason = " ".join(str(error).split())
                advice = "install the same versions of Ray and Python on every machine of the cluster"
            forget_token()
            raise WorkerError(f"--address {address}: no Ray cluster could be joined: {reason}; {advice}") from error
        self._close = self._leave

    def _leave(self) -> None:
        with signals_kept(later=False):
            self.ray.shutdown()
        forget_token()

    def _check_access(self, address: str, who: str) -> str:
        """Return whom the cluster lets in; one that lets in everybody is refused, or at least named.

        Raises
        ------
        WorkerError : nothing answers, or it lets in everybody and the user has not said that this is meant.
        """
        if os.environ.get("RAY_USE_TLS", "0") == "1":
            return "certificate"  # both sides show theirs
        asked = access(address)
        if asked == "token":
            return asked
        what = OPEN if asked == "open" else "does not say whether it asks for a token"
        if not self._insecure:
            raise WorkerError(
                f"{who} {what}. Give it one ({TOKENS}); or, where nobody else reaches it, say so with --insecure"
            )
        self._report(f"{who} {what} (--insecure)")
        return asked

    def _check_token(self, address: str) -> None:
        """Show the cluster this machine's token: Ray itself would try a wrong one for half a minute.

        Raises
        ------
        WorkerError : there is no token, it is another cluster's, or it is not to be shown.
        """
        what = f"--address {address}: the cluster asks for a token"
        if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            raise WorkerError(f"{what}, and RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']} here: unset it")
        place, token = _token()
        if not token:
            raise WorkerError(f"{what}, and {place} has none: copy the cluster's to this machine; {TOKENS}")
        if access(address, token) != "open":
            raise WorkerError(
                f"{what}, and that of {place} is another one: copy the cluster's to this machine; {TOKENS}"
            )
        with contextlib.suppress(OSError):
            if Path(place).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                self._report(f"{place}: other users of this machine can read the cluster's token; chmod 600 {place}")

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
        close, self._close = self._close, lambda: None
        close()


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


def _found() -> str:
    """Return the address of the cluster that this machine belongs to.

    Raises
    ------
    WorkerError : it belongs to none.
    """
    from ray._private import services

    try:
        getattr(services.find_gcs_addresses, "cache_clear", lambda: None)()
        address: str | None = services.canonicalize_bootstrap_address("auto")
    except Exception as error:
        raise WorkerError(
            f"--address auto: no Ray cluster could be joined: {_first_line(error)}; start one with: ray start --head"
        ) from error
    return address or "auto"


def _authentication(asked: str) -> dict[str, str | None]:
    """Return what Ray has to be told so that it shows the token that this machine has; a user's own word stands."""
    return {"RAY_AUTH_MODE": "token"} if asked == "token" and "RAY_AUTH_MODE" not in os.environ else {}


def _token() -> tuple[str, str]:
    """Return where Ray takes the token from, and the token; an empty one if it is not there."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", os.environ["RAY_AUTH_TOKEN"].strip()
    place = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return place, Path(place).read_text(encoding="utf-8").strip()
    return place, ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
