"""Which stages in which order, and the one call that runs them: `quantize`."""

from dfq_jax.recipes.pipeline import quantize
from dfq_jax.recipes.quantized import Quantized, load
from dfq_jax.recipes.recipe import RECIPES, Recipe, get_recipe

__all__ = ["RECIPES", "Quantized", "Recipe", "get_recipe", "load", "quantize"]
