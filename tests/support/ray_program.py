"""What the tests run in processes of their own: `python ray_program.py NAME ARGUMENT...`, everything told as JSON."""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import torch

from evomem.errors import EvomemError
from evomem.evaluation.measurement import LOGLIK
from evomem.evaluation.store import Reading
from evomem.memory import LayerView
from evomem.runs import Bench, search
from evomem.runs.bench import WorkerBench
from evomem.workers import Recipe, WorkerOptions
from evomem.workers.ray import address as ray_address
from evomem.workers.ray import local as ray_local
from tests.support.faulty_search import SETTINGS, Logged, logged, note
from tests.support.synthetic_search import ToyTask, experiment


def drive(folder, log):
    """A search that has a Ray of its own."""
    search(experiment(*SETTINGS), Path(folder), logged(log, 0.05), workers=WorkerOptions(2, cpus=0.5))


# ---- a cluster that loses a machine ---------------------------------------------------------------------------------


class Reads(Logged):
    """Reads a context of 1 MB before it evaluates, as a model does."""

    def __init__(self, log, readings):
        super().__init__(log, 0.03)
        self.readings = readings

    def evaluate(self, candidates, sample, task, measurement=LOGLIK):
        number = float(len(sample.id))
        view = self.readings.get(sample.id, lambda: self.read(sample, number)).views[0]
        assert (view.keys == number).all()
        return super().evaluate(candidates, sample, task, measurement)

    def read(self, sample, number):
        note(self.log.with_suffix(".reads"), sample.id)
        keys = torch.full((1, 1, 1 << 17, 2), number)
        slots, start = torch.zeros((1, 1, 1), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        return Reading((LayerView(keys, keys[:, :, :1], slots, start, 1, 1, 0, 1),), 1)


class ReadingBench:
    """Makes the bench here and, with the store of contexts, in workers."""

    def __init__(self, log):
        self.log = Path(log)

    def __call__(self, config):
        return self.make(config, {}, None, WorkerBench(dict, self.make))

    def make(self, config, parts, readings, in_workers=None):
        provenance = {"model_digest": "none"}
        return Bench(
            Reads(self.log, readings), lambda task: ToyTask(task.spec), provenance=provenance, in_workers=in_workers
        )


def lose_a_node(folder, log):
    """Two machines with a worker each; the second one vanishes, and later a third one comes. They ask for a token."""
    from ray.cluster_utils import Cluster

    from evomem.workers.ray import pool as ray_pool
    from evomem.workers.ray.cluster import library

    ray, pools, told = library(), [], {}
    quickly = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 200,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 10,
    }
    machine = {"num_cpus": 1, "object_store_memory": 128 << 20, "include_dashboard": False}
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(0o644)
    with ray_local.environment({"RAY_AUTH_MODE": "token"}):
        ray_local.forget_token()
        cluster = Cluster(True, head_node_args={**machine, "_system_config": quickly})
        second = cluster.add_node(**machine)

    class Seen(ray_pool.RayPool):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            pools.append(self)

    ray_pool.RayPool = Seen

    def run():
        options = WorkerOptions(2, address=cluster.address, cpus=1.0)
        search(experiment("generations=5", *SETTINGS[1:]), Path(folder), ReadingBench(log), workers=options)

    try:
        ray.__version__, version = "1.0.0", ray.__version__
        told["clash"] = error_of(WorkerOptions(1, address=cluster.address))
        ray.__version__ = version
        with ray_local.environment({"RAY_AUTH_TOKEN": "b" * 64}):
            told["wrong token"] = error_of(WorkerOptions(1, address=cluster.address))
        with ray_local.environment({"RAY_AUTH_TOKEN_PATH": "/nowhere"}):
            told["no token"] = error_of(WorkerOptions(1, address=cluster.address))
        told["too many"] = error_of(WorkerOptions(3, address=cluster.address, cpus=1.0))
        running = threading.Thread(target=run, daemon=True)
        running.start()
        wait_for(lambda: pools and len(pools[0].workers()) == 2 and lines(folder) > 20)
        told["nodes"] = [worker["node"] for worker in pools[0].workers()]
        told["lost"], told["workers"] = time.time(), pools[0].workers()
        cluster.remove_node(second, allow_graceful=False)
        wait_for(lambda: len(pools[0].workers()) == 1)
        told["noticed"] = time.time()
        with ray_local.environment({"RAY_AUTH_MODE": "token"}):
            cluster.add_node(**machine)
        running.join(120)
        told["stats"] = pools[0].stats
    finally:
        cluster.shutdown()
    print(json.dumps(told))


def lines(folder):
    journal = Path(folder) / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


# ---- errors ---------------------------------------------------------------------------------------------------------


PARTS = ((0, 4, 0), (1, 1, 1), (5, 0, 1))  # size, type, stream of HTTP/2 frames: settings, headers, data


def errors(folder):
    """Every way in which there is no Ray: the message, and how long it took."""
    told = {}
    ray_address.REACH_SECONDS = 1.0
    sys.modules["ray"] = None  # as if it were not installed
    told["missing"] = error_of(WorkerOptions(1))
    del sys.modules["ray"]
    from ray._private import services

    services.find_gcs_addresses = functools.cache(set)  # others may run Ray on this machine
    os.environ["RAY_TMPDIR"] = folder
    silent, web, everybody = (socket.create_server(("", 0)) for _ in range(3))

    def serve(server, answer):
        while True:
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(answer)

    settings, header, data = (bytes([0, 0, size, kind, 0, 0, 0, 0, stream]) for size, kind, stream in PARTS)
    answers = {web: b"HTTP/1.1 400 Bad Request\r\n\r\n", everybody: settings + header + b"\x88" + data + bytes(5)}
    for server, answer in answers.items():
        threading.Thread(target=serve, args=(server, answer), daemon=True).start()
    closed = socket.create_server(("", 0))
    port = closed.getsockname()[1]
    closed.close()
    addresses = {
        "auto": "auto",
        "client": "ray://127.0.0.1:10001",
        "nonsense": "nonsense",
        "closed": f"127.0.0.1:{port}",
        "silent": f"127.0.0.1:{silent.getsockname()[1]}",
        "web": f"127.0.0.1:{web.getsockname()[1]}",
        "open": f"127.0.0.1:{everybody.getsockname()[1]}",
    }
    told |= {name: error_of(WorkerOptions(1, address=address)) for name, address in addresses.items()}
    told["64"] = error_of(WorkerOptions(64))
    print(json.dumps(told))


def error_of(options):
    """Return the message of making a pool, its class, and seconds."""
    from evomem.workers.ray.pool import RayPool

    begin = time.monotonic()
    try:
        RayPool(Recipe({}, lambda parts, readings: None), options).close()
    except EvomemError as error:
        return [str(error), type(error).__name__, time.monotonic() - begin]
    return ["no error", "", 0.0]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
