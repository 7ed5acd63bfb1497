"""A driver that is killed takes its workers along, leaves nothing behind, and is resumed."""

from __future__ import annotations

import time
from pathlib import Path

from evomem.runs import search
from evomem.workers import WorkerOptions
from evomem.workers.ray.janitor import processes
from tests.support.faulty_search import SETTINGS, begun, entries, logged, names_of_units, units_in
from tests.support.interrupted_search import outcome, same
from tests.support.ray_processes import PROGRAM, alive, begin, lines, under
from tests.support.synthetic_search import experiment
from tests.workers.test_faults import nothing_again
from tests.workers.test_ray_pool import until


def token_of(family):
    """The token that Ray's processes ask for: it is in their environment."""
    (server,) = (pid for pid, command in family.items() if "gcs_server" in command.split(" ", 1)[0])
    variables = Path(f"/proc/{server}/environ").read_bytes().decode().split("\0")
    return dict(one.split("=", 1) for one in variables if one)["RAY_AUTH_TOKEN"]


def listening(pids):
    """The addresses at which processes listen."""
    import psutil

    return {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in pids}


def test_a_driver_that_is_killed_takes_its_workers_along_and_is_resumed(tmp_path, ray_here):
    """And what it starts is nobody else's: it has a token, listens on this machine only, and leaves nothing behind.

    With a home folder that cannot be written to, and a temporary one whose path is too long for sockets.
    """
    search(experiment(*SETTINGS), tmp_path / "whole", logged(tmp_path / "log0"))
    names, folder, log = names_of_units(tmp_path / "whole", tmp_path / "log0"), tmp_path / "run", tmp_path / "log"
    (tmp_path / "home").touch()
    temporary = tmp_path / ("t" * (100 - len(str(tmp_path))))
    temporary.mkdir()
    before = set(Path("/tmp").glob("evomem-ray-*"))
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(temporary)}
    process = begin(tmp_path, *PROGRAM, "drive", folder, log, **places)
    until(lambda: lines(folder) > 25 or process.poll() is not None, 60)
    family = under(process)
    assert listening(family) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert len(listening(family)) > 0
    made = [one for one in set(Path("/tmp").glob("evomem-ray-*")) - before if processes(str(one))]
    assert [one.stat().st_mode & 0o777 for one in made] == [0o700]
    assert len(list(temporary.glob("evomem-ray-*"))) == 1  # what does not fit into memory
    token = token_of(family)
    assert len(token) == 64
    assert not any(token in command for command in family.values())
    assert not any(token.encode() in file.read_bytes() for file in made[0].rglob("*") if file.is_file())
    process.kill()
    process.wait()
    finished, now = units_in(folder), time.time()
    assert 20 < len(finished) < len(names)
    workers = {pid for _, pid, _ in entries(log)}
    assert len(workers) == 2
    assert workers < family.keys()
    assert any("Agent" in name for name in family.values())
    until(lambda: not alive(family), 20)
    until(lambda: not made[0].exists() and not list(temporary.glob("evomem-*")), 5)
    search(experiment(*SETTINGS), folder, logged(log), resume=True, workers=WorkerOptions(1))
    same(outcome(folder), outcome(tmp_path / "whole"))
    nothing_again(log, names, dict.fromkeys(finished, now))
    assert max(begun(log).values()) <= 2
