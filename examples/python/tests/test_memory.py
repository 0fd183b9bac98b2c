"""Measured peaks of a training step, each in a process of its own (bench/memory.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")

BENCH = Path(__file__).parent.parent / "bench" / "memory.py"


# Freed tensors go back to the system at once: what malloc keeps differs by megabytes from run to run.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure(way, depth, runs=3):
    """The run with the lowest peak: what else a process has may be in one run and not in the next."""
    return min((measure_once(way, depth) for _ in range(runs)), key=lambda m: m["peak"])


def measure_once(way, depth):
    sizes = ["--batch", "8", "--tokens", "128", "--width", "128"]
    command = [sys.executable, str(BENCH), *sizes, "--depths", str(depth), "--way", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | MALLOC)
    return json.loads(done.stdout.splitlines()[-1])


def test_activation_memory_does_not_grow_with_depth():
    peaks = {(way, depth): measure(way, depth) for way in ("checkpoint 1", "bdia") for depth in (8, 48)}
    activation = 8 * 128 * 128 * 4
    # Gradients, which both have, apart.
    beside = {key: m["peak"] - m["gradients"] for key, m in peaks.items()}
    growth = {way: beside[way, 48] - beside[way, 8] for way in ("checkpoint 1", "bdia")}
    side = peaks["bdia", 48]["side_bits"] - peaks["bdia", 8]["side_bits"]
    # Checkpointing keeps at least one activation a block; of forty, allocators may hide a few.
    assert growth["checkpoint 1"] > 36 * activation
    # We keep side bits; two activations' worth of allocator noise is allowed.
    assert growth["bdia"] < side + 2 * activation
    assert peaks["bdia", 48]["peak"] < peaks["checkpoint 1", 48]["peak"]
