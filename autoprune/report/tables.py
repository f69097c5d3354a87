"""A latency table in words."""

from __future__ import annotations

from autoprune.lut.table import LatencyTable
from autoprune.report.summary import percent, significant


def summary(table: LatencyTable) -> str:
    """Return the calibration of a table, in one line."""
    fit = table.calibration
    if fit is None:
        return "not calibrated: end-to-end latency is the plain sum of rows"
    line = f"end to end = {fit.slope:.3f} × sum of rows + {fit.intercept_us:.1f} µs"
    error = f"{percent(fit.mape)} mean error, Kendall τ {significant(fit.kendall_tau)} over {len(fit.points)} networks"
    return f"{line}; {error}"
