"""Files are whole or not there, whoever writes them and whatever goes wrong."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from evomem.errors import RunError
from evomem.files.atomic import is_temporary, replacing, sweep, write_atomically
from evomem.models.pretrained.files import write_json


@pytest.mark.parametrize("durable", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, durable):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path, durable=durable) as temporary:
            temporary.write_bytes(b"half")
            assert is_temporary(temporary)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a.json", b"old")]
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a.json", b"new")]


def test_many_writers_of_one_file_leave_what_one_of_them_wrote(tmp_path):
    path = tmp_path / "memo.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_json(path, {"n": n, "more": "x" * 5000}), range(60)))
    assert json.loads(path.read_text())["n"] in range(60)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_swept(tmp_path):
    with replacing(tmp_path / "b") as temporary:
        left = temporary.with_name(temporary.name.replace(".b.", ".c."))
        left.write_bytes(b"half")
        temporary.write_bytes(b"whole")
    sweep(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["b"]


def test_a_disk_that_refuses_is_named(tmp_path):
    with pytest.raises(RunError, match="none/a: cannot be written: No such file"):
        write_atomically(tmp_path / "none" / "a", b"")
