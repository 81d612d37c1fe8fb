"""Models to quantize: architectures, their preprocessing and trained weights, and files of weights of others."""

from dfq_jax.zoo.arrays import read_npz, read_torch
from dfq_jax.zoo.checkpoint import load_checkpoint
from dfq_jax.zoo.entry import Size, ZooEntry, abstract_model
from dfq_jax.zoo.layouts import LAYOUTS, Layout, Rule
from dfq_jax.zoo.loading import ZooModel, load_model
from dfq_jax.zoo.packaged import PackagedWeights
from dfq_jax.zoo.preprocessing import Preprocessing
from dfq_jax.zoo.registry import list_models

__all__ = [
    "LAYOUTS",
    "Layout",
    "PackagedWeights",
    "Preprocessing",
    "Rule",
    "Size",
    "ZooEntry",
    "ZooModel",
    "abstract_model",
    "list_models",
    "load_checkpoint",
    "load_model",
    "read_npz",
    "read_torch",
]
