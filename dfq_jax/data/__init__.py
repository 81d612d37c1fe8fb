"""Labeled images to measure accuracy on; quantization itself needs none."""

from dfq_jax.data.dataset import Dataset
from dfq_jax.data.evaluation import Accuracy, accuracy, predict
from dfq_jax.data.loading import load_data

__all__ = ["Accuracy", "Dataset", "accuracy", "load_data", "predict"]
