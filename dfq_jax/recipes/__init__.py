"""Which stages in which order, and the one call that runs them: `quantize`."""

from dfq_jax.recipes.images import is_synthesized
from dfq_jax.recipes.pipeline import quantize
from dfq_jax.recipes.quantized import Quantized, load, load_report
from dfq_jax.recipes.recipe import RECIPES, Recipe, get_recipe
from dfq_jax.recipes.steps import STAGES, remove_checkpoints

__all__ = [
    "RECIPES",
    "STAGES",
    "Quantized",
    "Recipe",
    "get_recipe",
    "is_synthesized",
    "load",
    "load_report",
    "quantize",
    "remove_checkpoints",
]
