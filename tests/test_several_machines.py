"""Several processes train as one: same masks, kept gradients alone on the wire, and a kill costs one epoch at most."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoprune.core.choices import Fine
from autoprune.core.errors import AutopruneError
from autoprune.core.launch import launched_rank, launched_size
from autoprune.trainers.schedule import TrainerError
from autoprune.trainers.session import attach
from autoprune.trainers.team import PeerLost, Team, watched

WORKER = Path(__file__).with_name("team_worker.py")
SECONDS = 150


def command(runs: Path) -> list[str]:
    return ["train", "--model", "small", "--uniform", "fine(keep=0.25)", "--trainer", "campfire", "--epochs", "5",
            "--dense-kernels", "--run", "t", "--runs-dir", str(runs)]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    root = str(WORKER.parent.parent)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(*arguments: str) -> list[str]:
    """Run the worker in two processes, as torchrun would; return what each said on stderr."""
    port, call = free_port(), [sys.executable, str(WORKER), *arguments]
    processes = []
    for rank in ("0", "1"):
        env = environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes.append(subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[1][0] == ""
    return [err for _, err in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checks of both ranks, then an unbroken training by the command line below ``whole``."""
    folder = tmp_path_factory.mktemp("team")
    said = start("checks", str(folder), free_port(), *command(folder / "whole"))
    assert "epoch 5/5" in said[0]
    assert "epoch" not in said[1]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_bytes_on_the_wire_fall_by_the_compression_ratio(ranks: list[dict[str, Any]]) -> None:
    for record in (rank["compressed"] for rank in ranks):
        ratio = record["kept"] / record["parameters"]
        assert ratio < 0.5
        assert record["frozen"] == sorted(record["frozen"])
        assert set(record["frozen"]) == {False, True}
        for frozen, sent in zip(record["frozen"], record["sent"], strict=True):
            assert sent == 4 * (record["kept"] if frozen else record["parameters"])
        assert record["counted"] == [sum(record["sent"]), 4 * record["parameters"] * len(record["sent"])]


def test_packed_gradients_train_as_dense_ones(ranks: list[dict[str, Any]]) -> None:
    for record in (rank["compressed"] for rank in ranks):
        assert max(record["differences"]) <= 1e-6


@pytest.mark.parametrize("method", ["clicktrain", "campfire", "magnitude"])
def test_every_process_takes_the_masks_of_the_first(method: str, ranks: list[dict[str, Any]]) -> None:
    masks = [rank["masks"][method] for rank in ranks]
    assert masks[0] == masks[1]
    assert {1, 0} == set(masks[0][0])


def test_only_the_first_process_writes_files(folder: Path) -> None:
    names = {path.name for path in (folder / "whole" / "t").iterdir()}
    assert names >= {"config.json", "weights.safetensors", "metrics.csv", "training.json", "checkpoint.pt", "dense"}
    result = json.loads((folder / "whole" / "t" / "training.json").read_text())
    assert result["savings"]["prunable_sparsity"] == pytest.approx(0.75, abs=0.01)
    assert result["accuracy"]["validation"] > 0.8


def test_a_killed_process_ends_the_job_with_one_line_and_the_same_command_resumes(folder: Path) -> None:
    runs = folder / "killed"
    # After a bare --: torchrun would take --run for an abbreviation of an option of its own.
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    call += [str(WORKER), "cli", *command(runs)]
    ended = subprocess.run(
        call, env=environment(KILL_EPOCH="3"), capture_output=True, text=True, timeout=SECONDS
    )
    assert ended.returncode == 1, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("autoprune:")]
    assert lines == [
        "autoprune: rank 0: another process of this training has ended, so it cannot go on; the same command resumes "
        "from the last checkpoint."
    ]
    assert "epoch 3/5" in ended.stderr
    assert "epoch 4/5" not in ended.stderr
    start("cli", *command(runs))
    for part in ("t", "t/dense"):
        wanted, got = (load_file(folder / name / part / "weights.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_an_error_of_another_kind_is_not_taken_for_a_lost_process() -> None:
    with pytest.raises(RuntimeError, match="shapes"), watched(Team(0, 2)):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(PeerLost, match="same command resumes") as caught, watched(Team(0, 2)):
        raise RuntimeError("[../pair.cc:534] Connection closed by peer [127.0.0.1]:2733")
    assert isinstance(caught.value, AutopruneError)
    assert caught.value.exit_code == 1
    with pytest.raises(RuntimeError, match="Connection"), watched(Team()):
        raise RuntimeError("Connection closed by peer")


def test_a_process_alone_is_its_own_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_size()) == (0, 1)
    team, model = Team.current(), nn.Linear(2, 2)
    assert team.leads
    assert team.wrap(model) is model
    assert team.bytes_from_lead(b"a", torch.device("cpu")) == b"a"
    assert torch.equal(team.share(torch.arange(4)), torch.arange(4))
    assert torch.equal(Team(1, 2).share(torch.arange(5)), torch.tensor([1, 3]))
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 0, "one variable alone is no launcher"


def test_compressing_gradients_needs_a_data_parallel_model() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = attach(model, optimizer, {"": Fine(0.5)}, steps_per_epoch=1, epochs=5)
    with pytest.raises(TrainerError, match="DistributedDataParallel"):
        session.compress_gradients()
