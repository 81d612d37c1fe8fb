"""What was decided and measured on the way to a quantized network, as text and as a page."""

from dfq_jax.report.details import Details, Picture, examine
from dfq_jax.report.page import sensitivity_page
from dfq_jax.report.pictures import image_grid, pictures, png
from dfq_jax.report.report import Report, doubtful_result, doubtful_structure, layer_reports, packed_size, report_from

__all__ = [
    "Details",
    "Picture",
    "Report",
    "doubtful_result",
    "doubtful_structure",
    "examine",
    "image_grid",
    "layer_reports",
    "packed_size",
    "pictures",
    "png",
    "report_from",
    "sensitivity_page",
]
