"""What was decided and measured on the way to a quantized network."""

from dfq_jax.report.report import Report, doubtful_result, doubtful_structure, layer_reports, packed_size, report_from

__all__ = ["Report", "doubtful_result", "doubtful_structure", "layer_reports", "packed_size", "report_from"]
