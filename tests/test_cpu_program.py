"""A program runs a whole network as torch does, times itself, shares its work, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from autoprune.core.errors import ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.cpu.program import Epilogue, Program


def conv_spec(conv: nn.Conv2d, size: int) -> LayerSpec:
    """Return the spec of a square convolution on a square map."""
    s, p, k = conv.stride[0], int(conv.padding[0]), conv.kernel_size[0]
    out = (size + 2 * p - k) // s + 1
    return LayerSpec(
        "conv", "conv", tuple(conv.weight.shape), (s, s), (p, p), input_hw=(size, size), output_hw=(out, out)
    )


class SmallNet(nn.Module):
    """First layer, one residual block with a strided shortcut, pooling and a classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.b = nn.Conv2d(32, 32, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 32, 1, stride=2)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.first(x))
        x = functional.relu(self.b(functional.relu(self.a(x))) + self.shortcut(x))
        y: torch.Tensor = self.fc(x.mean((2, 3)))
        return y


def small_program(net: SmallNet, batch: int, threads: int, size: int = 12) -> Program:
    """Return ``net`` as a program that uses every kernel."""
    half = size // 2
    program = Program(batch, threads)
    image = program.buffer(net.first.in_channels, size, size, halo=1)
    one = program.buffer(16, size, size, halo=1)
    two, three, skip = (program.buffer(32, half, half, halo=1) for _ in range(3))
    mean, logits = program.buffer(32, 1, 1), program.buffer(10, 1, 1)
    relu = Epilogue(relu=True)
    program.conv(image, one, conv_spec(net.first, size), net.first.weight, net.first.bias, "dense", relu)
    program.conv(one, skip, conv_spec(net.shortcut, size), net.shortcut.weight, net.shortcut.bias, "csr")
    program.conv(one, two, conv_spec(net.a, size), net.a.weight, net.a.bias, "block", relu)
    program.conv(two, three, conv_spec(net.b, half), net.b.weight, net.b.bias, "csr", Epilogue(True, skip))
    program.global_avg_pool(three, mean)
    program.conv(mean, logits, LayerSpec("fc", "linear", (10, 32)), net.fc.weight, net.fc.bias, "dense")
    program.set_input(image)
    program.set_output(logits)
    program.finish()
    return program


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (3, 3), (9, 16)])
def test_network_equals_torch(batch: int, channels: int, threads: int) -> None:
    torch.manual_seed(0)
    net = SmallNet(channels)
    program = small_program(net, batch, threads)
    for _ in range(3):
        x = torch.randn(batch, channels, 12, 12)
        torch.testing.assert_close(program.run(x), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_result_is_new_every_time() -> None:
    program = small_program(SmallNet(1), 1, 1)
    first = program.run(torch.ones(1, 1, 12, 12))
    kept = first.clone()
    program.run(torch.zeros(1, 1, 12, 12))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_input_need_not_be_contiguous() -> None:
    program = small_program(SmallNet(3), 2, 1)
    x = torch.randn(2, 12, 12, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(program.run(x), program.run(x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [3, 16, 40])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2)])
def test_pools_equal_torch(kernel: int, stride: int, padding: int, channels: int) -> None:
    x = torch.randn(2, channels, 13, 9) - 3.0  # below zero: padding must not win
    for name in ("max_pool", "avg_pool"):
        program = Program(2, 2)
        truth = getattr(functional, f"{name}2d")(x, kernel, stride, padding)
        source = program.buffer(channels, 13, 9, halo=padding)
        out = program.buffer(channels, truth.shape[2], truth.shape[3], halo=1)
        getattr(program, name)(source, out, kernel, stride, padding)
        program.set_input(source)
        program.set_output(out)
        program.finish()
        program.memory.interior_NHWC(out)[:] = np.nan
        torch.testing.assert_close(program.run(x), truth)


@pytest.mark.parametrize("width", [1, 3, 5, 7, 10, 14, 23])
@pytest.mark.parametrize("window", [(3, 3), (5, 5), (3, 5), (7, 2)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_depthwise_equals_torch(window: tuple[int, int], width: int, stride: int, dilation: int) -> None:
    size = (9, width * stride)
    padding = dilation * (window[0] // 2), dilation * (window[1] // 2)
    weight, bias, x = torch.randn(20, 1, *window), torch.randn(20), torch.randn(2, 20, *size)
    truth = functional.conv2d(x, weight, bias, stride, padding, dilation, groups=20)
    program = Program(2)
    source, out = program.buffer(20, *size, halo=max(padding)), program.buffer(20, *truth.shape[2:], halo=1)
    layer = LayerSpec(
        "dw", "conv", tuple(weight.shape), (stride, stride), padding, (dilation, dilation), 20, size,
        (truth.shape[2], truth.shape[3]),
    )
    program.conv(source, out, layer, weight, bias, "dense", Epilogue(relu=True, cap=1.5))
    program.set_input(source)
    program.set_output(out)
    program.finish()
    program.memory.interior_NHWC(out)[:] = np.nan
    torch.testing.assert_close(program.run(x), truth.clamp(0, 1.5))
    assert not program.memory.whole_NHWC(out)[:, 0].any()


@pytest.mark.parametrize("relu", [False, True])
def test_add_and_relu_equal_torch(relu: bool) -> None:
    program = Program(3, 2)
    x, y, total, positive = (program.buffer(20, 5, 7, halo=h) for h in (0, 1, 2, 1))
    program.add(x, y, total, relu)
    program.relu(total, positive)
    program.finish()
    a, b = program.memory.interior_NHWC(x).copy(), program.memory.interior_NHWC(y).copy()
    program.time_us(1)
    truth = np.maximum(a + b, 0) if relu else a + b
    np.testing.assert_array_equal(program.memory.interior_NHWC(total), truth)
    np.testing.assert_array_equal(program.memory.interior_NHWC(positive), np.maximum(a + b, 0))
    assert not program.memory.whole_NHWC(total)[:, :2].any()


def test_map_output_keeps_its_shape() -> None:
    program = Program(2)
    x, out = program.buffer(5, 4, 6), program.buffer(5, 4, 6, halo=1)
    program.relu(x, out)
    program.set_input(x)
    program.set_output(out)
    program.finish()
    image = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(program.run(image), image.relu())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 8])
def test_profile_has_every_operation_and_sums_to_the_whole(batch: int, threads: int) -> None:
    program = small_program(SmallNet(1), batch, threads, size=56)
    program.time_us(3)
    repeats = 300 if threads == 1 else 20
    before = time.perf_counter()
    parts = program.profile_us(repeats)
    elapsed_us = (time.perf_counter() - before) * 1e6
    total_us = sum(float(part.sum()) for part in parts)
    assert len(parts) == 6
    assert all(part.shape == (repeats,) and part.min() > 0 for part in parts)
    assert total_us <= elapsed_us
    # With several threads the caller also waits for the others before a run begins, as long as the machine likes.
    assert threads > 1 or total_us > 0.7 * elapsed_us


@pytest.mark.parametrize("batch", [1, 8])
def test_times_of_runs_add_up_to_the_time_that_passed(batch: int) -> None:
    program = small_program(SmallNet(1), batch, 1, size=56)
    program.time_us(3)
    before = time.perf_counter()
    times = program.time_us(300)
    elapsed_us = (time.perf_counter() - before) * 1e6
    assert times.shape == (300,)
    assert 0.7 * elapsed_us < times.sum() <= elapsed_us


def test_larger_work_takes_longer() -> None:
    def least_us(size: int) -> float:
        return float(np.min(small_program(SmallNet(1), 1, 1, size).time_us(200)))

    assert least_us(48) > 2 * least_us(12)


def test_programs_and_callers_do_not_disturb_each_other() -> None:
    torch.manual_seed(1)
    net = SmallNet(1)
    programs = [small_program(net, 2, 2), small_program(net, 2, 1)]
    failures: list[str] = []

    def call(seed: int) -> None:
        x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
        truth = net(x).detach()
        for _ in range(20):
            y = programs[seed % 2].run(x)
            if not torch.allclose(y, truth, rtol=1e-4, atol=1e-5):
                failures.append(f"caller {seed}")

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failures == []


def test_idle_program_uses_no_processor_time() -> None:
    program = small_program(SmallNet(1), 1, 2)
    program.run(torch.zeros(1, 1, 12, 12))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be placed on this system")
def test_a_worker_wakes_on_another_core_than_the_caller_and_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[set[int]] = []
    allowed, place = os.sched_getaffinity(0), os.sched_setaffinity

    def record(thread: int, cores: set[int]) -> None:
        placed.append(set(cores))
        place(thread, cores)

    program = small_program(SmallNet(1), 1, 2)
    image = torch.randn(1, 1, 12, 12)
    program.run(image)
    monkeypatch.setattr(os, "sched_setaffinity", record)
    time.sleep(0.05)  # by now the worker sleeps
    place(0, {min(allowed)})
    program.run(image)
    assert placed == [], "the caller has one core: nothing to choose"
    place(0, allowed)
    time.sleep(0.05)
    program.run(image)
    time.sleep(0.05)
    if len(allowed) > 1:
        chosen, freed = placed
        assert len(chosen) == 1
        assert freed == allowed


def test_programs_take_turns_on_one_team_and_run_side_by_side_on_two() -> None:
    def workers() -> int:
        return sum(thread.name.startswith("kernel-") for thread in threading.enumerate())

    x = torch.randn(1, 1, 12, 12)
    programs = [small_program(SmallNet(1), 1, 3) for _ in range(2)]  # of different random weights
    truths = [program.run(x) for program in programs]
    before = workers()
    for _ in range(20):
        for program, truth in zip(programs, truths, strict=True):
            assert torch.equal(program.run(x), truth)
            program.time_us(2)
            program.profile_us(2)
    assert workers() == before

    same = [True, True]

    def often(which: int) -> None:
        for _ in range(200):
            same[which] &= torch.equal(programs[which].run(x), truths[which])

    users = [threading.Thread(target=often, args=(which,)) for which in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert same == [True, True]
    assert workers() <= before + 2


FORK = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
from tests.test_cpu_program import SmallNet, small_program
program = small_program(SmallNet(1), 1, 2)
x = torch.ones(1, 1, 12, 12)
truth = program.run(x)
child = os.fork()
same = torch.equal(program.run(x), truth)
if child == 0:
    os._exit(0 if same else 1)
print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_python(code: str, **environment: str) -> str:
    """Run ``code`` in a new interpreter at the repository root; return what it prints."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_forked_child_and_parent_go_on_and_the_interpreter_ends_with_a_live_program() -> None:
    assert run_python(FORK) == "True 0"


def test_second_process_loads_the_compiled_code() -> None:
    code = "from autoprune.kernels.cpu.engine import ENTER; print(sum(ENTER.stats.cache_hits.values()))"
    assert run_python(code) == "1"


def test_importing_the_package_imports_no_compiler() -> None:
    code = "import sys, autoprune, autoprune.kernels, autoprune.kernels.cpu; print('numba' in sys.modules)"
    assert run_python(code) == "False"


def test_weight_bytes_fall_with_the_blocks() -> None:
    def size(density: float) -> int:
        weight = torch.ones(32, 16, 3, 3) * (torch.rand(1, 16, 3, 3) < density)
        program = Program(1)
        x, out = program.buffer(16, 8, 8, halo=1), program.buffer(32, 8, 8)
        spec = LayerSpec("l", "conv", (32, 16, 3, 3), padding=(1, 1), input_hw=(8, 8), output_hw=(8, 8))
        program.conv(x, out, spec, weight, None, "block")
        program.finish()
        return program.weight_bytes

    assert size(0.1) < size(0.5) < size(1.0)
    assert size(1.0) >= 32 * 16 * 9 * 4


def test_workspace_is_counted() -> None:
    assert small_program(SmallNet(1), 2, 1).workspace_bytes > 2 * 4 * (16 * 14 * 14 + 3 * 32 * 8 * 8)


def test_wrong_input_is_refused() -> None:
    program = small_program(SmallNet(1), 1, 1)
    with pytest.raises(ModelError, match="it takes float32 of 1×1×12×12"):
        program.run(torch.zeros(2, 1, 12, 12))
    with pytest.raises(ModelError, match="float64"):
        program.run(torch.zeros(1, 1, 12, 12, dtype=torch.float64))


def test_run_needs_input_and_output() -> None:
    program = Program(1)
    program.relu(program.buffer(4, 4, 4), program.buffer(4, 4, 4))
    program.finish()
    with pytest.raises(ModelError, match="set_input"):
        program.run(torch.zeros(1, 4, 4, 4))


def test_order_of_calls_is_enforced() -> None:
    program = Program(1)
    x, out = program.buffer(4, 4, 4), program.buffer(4, 4, 4)
    with pytest.raises(ModelError, match="finish"):
        program.time_us(1)
    program.relu(x, out)
    program.finish()
    with pytest.raises(ModelError, match="finished"):
        program.relu(x, out)


@pytest.mark.parametrize(("batch", "threads"), [(0, 1), (1, 0), (1, 1000)])
def test_impossible_sizes_are_refused(batch: int, threads: int) -> None:
    with pytest.raises(ModelError, match="at least 1"):
        Program(batch, threads)


def test_maps_that_differ_are_refused() -> None:
    program = Program(1)
    x, y = program.buffer(4, 4, 4), program.buffer(4, 4, 5)
    with pytest.raises(ModelError, match="differ in size"):
        program.add(x, x, y, relu=False)
    with pytest.raises(ModelError, match="pool"):
        program.max_pool(x, y, 2, 2, 0)
