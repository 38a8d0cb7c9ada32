"""What operators see: logs and metrics. Consumes event records; nothing below imports it."""
