"""The benchmark of many processes, at its smallest; no time is judged."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import ranks
from benchmarks.protocol import Suite
from benchmarks.steps import OURS

SMALL = {"network": "mlp-64", "forward_sparsity": 0.9, "backward_sparsity": 0.8, "compile": False}
DENSE = 4 * 3 * (64 * 64 + 64)
SENT = 2_000_000
SENDS = f"""
import socket, threading, time
server = socket.create_server(("127.0.0.1", 0))
def send():
    with socket.create_connection(server.getsockname()) as end:
        end.sendall(bytes({SENT}))
threading.Thread(target=send).start()
start, left = time.perf_counter(), {SENT}
end, _ = server.accept()
while left:
    left -= len(end.recv(left))
print(time.perf_counter() - start)
"""


EACH_STEP, REFRESH = {"step", "roll"}, {"refresh", "comparing", "choosing", "storing"}
SAVING = {"checkpoint", "stall"}


def test_steps_refreshes_checks_and_checkpoints_of_ranks_are_timed() -> None:
    found = ranks.SECONDS.work({**SMALL, "way": ranks.OWNERS, "ranks": 2})
    assert found.keys() == EACH_STEP | REFRESH | SAVING | {"sending"}
    assert 0 < found["roll"] < found["step"]
    assert all(found[part] > 0 for part in ("comparing", "choosing", "storing", "sending"))


def test_a_loopback_has_the_speed_that_it_is_to_have(tmp_path: Path) -> None:
    if missing := [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]:
        pytest.skip(f"a loopback interface of one's own needs {missing}")
    program = ranks.python_behind(20, str(tmp_path))
    tried = subprocess.run([program, "-c", SENDS], capture_output=True, text=True, check=False)
    if "unshare failed" in tried.stderr:
        pytest.skip(f"this system allows no loopback interface of one's own: {tried.stderr}")
    assert float(tried.stdout) > 0.8 * 8 * SENT / 20e6, tried.stderr


def test_bytes_of_ranks_are_counted() -> None:
    ways = (ranks.FSDP, ranks.OWNERS)
    dense, ours = (ranks.BYTES.work({**SMALL, "way": way, "ranks": 2}) for way in ways)
    assert dense["held"] == 2 * DENSE > ours["held"] > DENSE
    assert dense["sent in a step"] > 5 * ours["sent in a step"] > DENSE / 2


@pytest.mark.parametrize("suite", [ranks.SECONDS, ranks.BYTES])
def test_every_case_has_ddp_beside_ours(suite: Suite) -> None:
    for case, arms in suite.cases.items():
        ways = {p["way"] for p in arms.values()}
        assert ways in ({*ranks.WAYS}, {ranks.DDP, OURS})
        assert {f"{p['ranks']}" for p in arms.values()} == {case.split()[1]}
