"""Peak of resident memory, as Linux counts it: what the examples measure steps with."""

from __future__ import annotations

from pathlib import Path


def clear_peak() -> float:
    """Let the peak begin here; returns MiB in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _mebibytes("VmRSS")


def peak() -> float:
    """MiB at the peak since then."""
    return _mebibytes("VmHWM")


def _mebibytes(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024
