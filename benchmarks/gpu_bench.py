"""Where a part of ``gpu.py`` runs and writes, and what several parts share."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from autoprune.core.choices import Choice, Pattern
from autoprune.core.layers import LayerSpec
from autoprune.lut.bench import BenchRow, append_rows
from autoprune.lut.context import Context, current_context
from autoprune.lut.gpu_rows import GpuBench, cuda_bench
from autoprune.lut.gpu_timer import Backend, CudaBackend, Replay
from autoprune.lut.tile_model import DEVICES

# Entries kept of nine, and kernels: 2.25×, 4.5× and 9× fewer weights, shared as tensor cores want it.
COMPRESSIONS: dict[float, Choice] = {
    9.0 / 4.0 / kernels: Pattern(count=8, entries=4, kernels=kernels, share=(64, 8)) for kernels in (1.0, 0.5, 0.25)
}


def conv(channels: int, filters: int, size: int, window: int, stride: int = 1) -> LayerSpec:
    """Return a convolution with half of its window as padding."""
    pad = window // 2
    out = (size + 2 * pad - window) // stride + 1
    return LayerSpec(
        "x", "conv", (filters, channels, window, window), (stride, stride), (pad, pad), input_hw=(size, size),
        output_hw=(out, out),
    )


class NoClock:
    """Runs every call and takes no time: for a dry run."""

    cache_bytes = 1 << 16

    def warm_up(self, calls: Sequence[Callable[[], object]]) -> None:
        for call in calls:
            call()

    def capture(self, calls: Sequence[Callable[[], object]]) -> Replay:
        return lambda: float(len(calls))

    launch = capture

    def flush(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a part runs and writes.

    Attributes:
        out, work: Folders of results and of unfinished tables.
        dry: Tiny sizes on a CPU, no timing.
        seconds: What the part may take.
        failures: What was noted as failed so far.
    """

    out: Path
    work: Path
    dry: bool
    seconds: float
    started: float
    failures: list[str] = field(default_factory=list)

    @staticmethod
    def make(out: Path, work: Path, *, dry: bool, seconds: float) -> Bench:
        """Return a bench; a dry one writes below ``out/dry``."""
        out = out / "dry" if dry else out
        out.mkdir(exist_ok=True)
        return Bench(out, work, dry, seconds, time.monotonic())

    @property
    def left_s(self) -> float:
        """Seconds of the part's budget that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def context(self, batch: int, direction: str = "forward") -> Context:
        """Return the context of rows measured here."""
        if self.dry:
            return Context(device="cpu", cpu="dry run", batch=2, cache="network", direction=direction)  # type: ignore[arg-type]
        return current_context(batch, device="cuda", direction=direction)  # type: ignore[arg-type]

    def backend(self) -> Backend:
        """Return what times the calls."""
        return NoClock() if self.dry else CudaBackend()

    def layers(self, context: Context) -> GpuBench:
        """Return what measures rows."""
        return GpuBench(context, DEVICES[0], NoClock()) if self.dry else cuda_bench(context)

    def note(self, text: str) -> None:
        """Add to the file that says what failed, and print it; the part then ends as failed."""
        self.failures.append(text)
        print(text, flush=True)
        with (self.out / "gpu-failures.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Let a failure of one thing cost no other: it is noted, and the part goes on."""
        try:
            yield
        except Exception:  # whatever it was, it is for the file that says what failed
            self.note(f"{what}:\n{traceback.format_exc()}")

    def write(self, rows: Sequence[BenchRow]) -> None:
        """Append rows to the results, and print them."""
        append_rows(self.out / "gpu.csv", rows)
        for r in rows:
            print(f"{r.case} | {r.choice} | {r.metric}: {r.p50:g} {r.unit} (baseline {r.baseline_p50:g})", flush=True)
