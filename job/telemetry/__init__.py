"""Live status of a running job: to a Prometheus file or port, and to Kubeflow Trainer.

The pipeline updates a `Status`, which sinks read. A sink that fails causes one warning, and never
affects the job.

Imports: spec, storage.
"""

from job.telemetry.reporting import StatusReporter
from job.telemetry.status import Status, Step, Validation

__all__ = ["Status", "StatusReporter", "Step", "Validation"]
