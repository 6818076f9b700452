"""Names that callers still import from here; goes with them."""

from spem.training.folder import METRICS, read_metrics
from spem.training.progress import PlainLines, Progress, Silent, Status, duration

__all__ = ["METRICS", "PlainLines", "Progress", "Silent", "Status", "duration", "read_metrics"]
