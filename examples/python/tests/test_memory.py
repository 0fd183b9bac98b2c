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
BATCH, TOKENS, WIDTH = 32, 128, 128


def measure(way, depth, *flags, runs=2):
    """The run with the lowest peak: what else a process has may be in one run and not in the next."""
    return min((measure_once(way, depth, *flags) for _ in range(runs)), key=lambda m: m["peak"])


def measure_once(way, depth, *flags):
    sizes = ["--batch", str(BATCH), "--tokens", str(TOKENS), "--width", str(WIDTH), "--depths", str(depth)]
    command = [sys.executable, str(BENCH), *sizes, "--way", way, *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | MALLOC)
    return json.loads(done.stdout.splitlines()[-1])


def test_activation_memory_does_not_grow_with_depth():
    activation = BATCH * TOKENS * WIDTH * 4
    # Checkpointing keeps at least one activation a block; of forty, allocators may hide a few. They go as gradients
    # come, so gradients are there before.
    few, many = (measure("checkpoint 1", depth, "--hold-gradients")["peak"] for depth in (8, 48))
    assert many - few > 36 * activation
    # We keep side bits; one activation's worth of allocator noise is allowed. Gradients are what the pass returns.
    few, many = (measure("bdia", depth) for depth in (8, 48))
    growth = many["peak"] - many["gradients"] - (few["peak"] - few["gradients"])
    assert growth < many["side_bits"] - few["side_bits"] + activation
    assert many["peak"] < measure("checkpoint 1", 48)["peak"]
