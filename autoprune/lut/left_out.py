"""What a latency table leaves out, and why, in sentences for a terminal and a report."""

from __future__ import annotations

from autoprune.lut.table import LatencyTable

_SHOWN = 3


def left_out(table: LatencyTable) -> list[str]:
    """Return a sentence for each reason why choices were not measured; empty where all were."""
    lines = []
    words = {
        "floor": "cannot beat the dense layer even at their floor on this device, and are not searched",
        "limit": "were not measured within the time given, and are not searched",
        "kernel": "have no kernel that runs them here, and are not searched",
    }
    for reason, clause in words.items():
        keys = [key for key, why in table.unmeasured.items() if why.reason == reason]
        if not keys:
            continue
        names = ", ".join(f"{signature} {choice}" for signature, choice in keys[:_SHOWN])
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        lines.append(f"{len(keys)} choices {clause}: {names}{more}.")
    launched = sum(not row.captured for row in table.rows.values())
    if launched:
        lines.append(f"{launched} rows could not be replayed as CUDA graphs and hold the host's gaps between launches.")
    return lines
