"""How far the job is, told to whoever watches while it runs.

The pipeline keeps a `Status`; watchers read it. A watcher that fails is warned of once, and never
costs the job anything.

Imports: spec, storage.
"""

from job.telemetry.reporting import Reporting
from job.telemetry.status import Status, Step

__all__ = ["Reporting", "Status", "Step"]
