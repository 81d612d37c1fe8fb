"""Keras models on JAX, Haiku's transformed functions and Equinox modules.

None of these is imported here: an object of one of them can only exist where it has been imported already.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dfq_jax.graph.adapters.arguments import inference_call

ApplyFn = Callable[[Any, jax.Array], Any]


def is_keras(model: Any) -> bool:
    """Whether it is a Keras model or layer."""
    return _is_a(model, "keras", "Layer")


def is_haiku(model: Any) -> bool:
    """Whether it is what Haiku's `transform` and its relatives return."""
    return any(_is_a(model, "haiku", name) for name in ("Transformed", "TransformedWithState", "MultiTransformed"))


def is_equinox(model: Any) -> bool:
    """Whether it is an Equinox module."""
    return _is_a(model, "equinox", "Module")


def from_keras(model: Any, variables: Any) -> tuple[ApplyFn, Any]:
    """Of a Keras model; the variables are a dict by the variables' paths, without the states of random generators.

    Keras finds the value of a variable by the variable itself: the function keeps the model, and with it its weights.
    """
    keras = sys.modules["keras"]
    name = type(model).__name__
    if keras.config.backend() != "jax":
        raise TypeError(
            f"model: {name} runs on Keras' {keras.config.backend()} backend; set KERAS_BACKEND=jax before importing it."
        )
    if not model.built:
        raise TypeError(f"model: {name} has no variables yet; call it once on an input, or model.build(shape).")
    if len(getattr(model, "inputs", None) or ()) > 1:
        raise TypeError(
            f"model: {name} has {len(model.inputs)} inputs; build one of the image alone: "
            "keras.Model(image, model([image, constant]))."
        )
    groups = model.trainable_variables, model.non_trainable_variables
    names = iter(_distinct([variable.path for group in groups for variable in group]))
    named = [[(next(names), variable.value) for variable in group] for group in groups]
    # Dropout does not draw in inference; the state stays here, as that of NNX streams does.
    random = {name: value for group in named for name, value in group if name.endswith("seed_generator_state")}
    order = [[name for name, _ in group] for group in named]

    def apply_fn(variables: Any, x: jax.Array) -> Any:
        values = {**random, **variables}
        trained, others = ([values[name] for name in group] for group in order)
        return model.stateless_call(trained, others, x, training=False)[0]

    own = {name: value for group in named for name, value in group if name not in random}
    if variables is None:
        return apply_fn, own
    if not isinstance(variables, Mapping) or own.keys() - variables.keys():
        raise TypeError(
            f"variables: expected None for the model's own, or a dict by path like {next(iter(own), '')!r}, as "
            "as_function(model) returns."
        )
    return apply_fn, variables


def from_haiku(model: Any, variables: Any) -> tuple[ApplyFn, Any]:
    """Of `hk.transform` (variables: the parameters) or `hk.transform_with_state` (the parameters and the state)."""
    kind = type(model).__name__
    if kind == "MultiTransformed":
        raise TypeError("model: hk.multi_transform has several functions; pass one, lambda p, x: apply(p, None, x).")
    with_state = kind == "TransformedWithState"
    if variables is None:
        what = "(params, state)" if with_state else "params"
        raise TypeError(f"variables: a Haiku function needs its {what}, as from model.init(key, x) or training.")
    names = list(inspect.signature(model.apply).parameters)
    # hk.without_apply_rng takes the key away.
    no_key = (None,) if names[1 + with_state : 2 + with_state] == ["rng"] else ()
    skipped, between = 1 + with_state + len(no_key), "None, " * len(no_key)
    if not with_state:
        call = inference_call(
            model.apply, skipped, "the transformed function", f"lambda params, x: model.apply(params, {between}x{{}})"
        )

        def apply_fn(params: Any, x: jax.Array) -> Any:
            args, kwargs = call(x)
            return model.apply(params, *no_key, *args, **kwargs)

        return apply_fn, variables

    call = inference_call(
        model.apply,
        skipped,
        "the transformed function",
        f"lambda v, x: model.apply(v['params'], v['state'], {between}x{{}})[0]",
    )

    def apply_with_state(variables: Any, x: jax.Array) -> Any:
        args, kwargs = call(x)
        return model.apply(variables["params"], variables["state"], *no_key, *args, **kwargs)[0]

    if isinstance(variables, (tuple, list)) and len(variables) == 2:
        variables = {"params": variables[0], "state": variables[1]}
    if not (isinstance(variables, Mapping) and {"params", "state"} <= variables.keys()):
        raise TypeError("variables: expected (params, state) of hk.transform_with_state, or a dict of both by name.")
    return apply_with_state, variables


def haiku_shapes(model: Any, x: jax.ShapeDtypeStruct) -> Any:
    """Shapes of the variables of a transformed function for an input; None where it has several functions."""
    if _is_a(model, "haiku", "MultiTransformed"):
        return None
    # Haiku's BatchNorm makes its state in training mode only.
    call = inference_call(
        model.init, 1, "the transformed function", "lambda v, x: model.apply(v, None, x{})", inference=False
    )

    def init(key: jax.Array, x: jax.Array) -> Any:
        args, kwargs = call(x)
        return model.init(key, *args, **kwargs)

    return jax.eval_shape(init, jax.random.key(0), x)


def from_equinox(model: Any, variables: Any) -> tuple[ApplyFn, Any]:
    """Of an Equinox module written for one example, and its `eqx.nn.State` as `variables` if it has one.

    The variables are a dict of the module's arrays, in its own tree, and those of the state.
    """
    eqx = sys.modules["equinox"]
    name = type(model).__name__
    state = variables if isinstance(variables, eqx.nn.State) else None
    example = (
        "arrays, static = eqx.partition(model, eqx.is_array); variables = dict(model=arrays); "
        "lambda v, x: jax.vmap(lambda x: eqx.combine(v['model'], static)"
    )
    if not callable(model):
        raise TypeError(f"model: {name} has no __call__; pass a function: {example}.METHOD(x))(x).")
    if state is None and "state" in inspect.signature(type(model).__call__).parameters:
        raise TypeError(f"variables: {name} has a state; pass it, as eqx.nn.make_with_state returned it or as trained.")
    if state is None:
        call = inference_call(type(model).__call__, 1, f"{name}.__call__", example + "(x{}))(x)")
    whole = {"model": eqx.nn.inference_mode(model)} | ({} if state is None else {"state": state})
    own, static = eqx.partition(whole, eqx.is_array)

    def apply_fn(variables: Any, x: jax.Array) -> Any:
        whole = eqx.combine(variables, static)

        def one(x: jax.Array) -> Any:
            if "state" in whole:
                return whole["model"](x, whole["state"])[0]
            args, kwargs = call(x)
            return whole["model"](*args, **kwargs)

        return jax.vmap(one)(x)

    if variables is None or state is not None:
        return apply_fn, own
    return apply_fn, variables if isinstance(variables, Mapping) else {"model": eqx.filter(variables, eqx.is_array)}


def _is_a(model: Any, package: str, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == package for kind in type(model).__mro__)


def _distinct(names: list[str]) -> list[str]:
    """Names told apart: of those that come again, each has its number."""
    counts: Counter[str] = Counter()
    result = []
    for name in names:
        counts[name] += 1
        result.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return result
