"""Networks, weights and images that cannot be used: every command says so in one line, and makes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_folders import flat_folder
from user_networks import small

from autoprune.cli.main import run as cli

SEARCH = ["search", "--budget", "latency=50%", "--runs-dir", "runs"]
OWN = ["--model", "user_networks:small"]
Refused = Callable[[list[str]], str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that gives a command in ``tmp_path`` and returns the one line it is refused by."""
    monkeypatch.chdir(tmp_path)
    state = small().state_dict()
    torch.save({key: value for key, value in state.items() if key != "2.bias"}, "missing.pt")
    torch.save(small(8).state_dict(), "narrow.pt")
    torch.save({**state, "0.weight": state["0.weight"] * float("nan")}, "nan.pt")
    torch.save(state, "good.pt")
    for name, part in (("headless", 0.3), ("cut", 0.7)):
        for picture in flat_folder(tmp_path / name, 40, suffix=".jpg").iterdir():
            content = picture.read_bytes()
            picture.write_bytes(content[: int(part * len(content))])

    def give(argv: list[str]) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert cli(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        line = err.splitlines()[-1]
        assert [part for part in err.splitlines() if part.startswith("autoprune: ")] == [line]
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return give


@pytest.mark.parametrize("command", [SEARCH, ["evaluate", "--images", "20"]], ids=["search", "evaluate"])
@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*OWN, "--weights", "missing.pt"], "weights missing.pt: key '2.bias' is missing"),
        ([*OWN, "--weights", "narrow.pt"], "'0.weight' has shape (8, 1, 3, 3), this model wants (16, 1, 3, 3)"),
        ([*OWN, "--weights", "nan.pt"], "returns NaN or infinite scores"),
        ([*OWN, "--weights", "absent.pt"], "weights absent.pt: cannot be read"),
        (["--model", "user_networks:Pair", "--weights", "good.pt"], "one batch of images alone"),
        (["--model", "user_networks:Broken", "--weights", "good.pt"], "NaN or infinite"),
    ],
)
def test_network_or_weights(refused: Refused, command: list[str], argv: list[str], part: str) -> None:
    assert part in refused([*command, *argv])


@pytest.mark.parametrize(("folder", "part"), [("headless", "no image (Truncated"), ("cut", "no complete image")])
def test_folder_of_broken_images(refused: Refused, folder: str, part: str) -> None:
    argv = [*OWN, "--weights", "good.pt", "--model-args", "channels=3", "--data", f"imagefolder:{folder}#size=16"]
    assert part in refused([*SEARCH, *argv])
