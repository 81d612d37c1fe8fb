"""Which stages in which order, and the one call that runs them: `quantize`."""

from dfq_jax.recipes.images import is_synthesized
from dfq_jax.recipes.pipeline import quantize
from dfq_jax.recipes.progress import Reporter, progress_bar
from dfq_jax.recipes.quantized import Quantized, load, load_report
from dfq_jax.recipes.recipe import RECIPES, ROUNDINGS, Recipe, get_recipe
from dfq_jax.recipes.steps import remove_checkpoints
from dfq_jax.recipes.target import Target

__all__ = [
    "RECIPES",
    "ROUNDINGS",
    "Quantized",
    "Recipe",
    "Reporter",
    "Target",
    "get_recipe",
    "is_synthesized",
    "load",
    "load_report",
    "progress_bar",
    "quantize",
    "remove_checkpoints",
]
