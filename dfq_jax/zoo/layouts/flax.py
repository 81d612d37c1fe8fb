"""Our own names: the paths of the variables."""

from dfq_jax.zoo.layouts.table import Layout, Rule

FLAX = Layout(
    name="flax",
    description="Flax variables by their paths joined with '/': params/conv1/kernel",
    signature=(r"[^/]+/.+",),
    rules=(Rule(pattern=r"(.+)", target=r"\1"),),
)
