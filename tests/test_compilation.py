"""Options of XLA's compiler: taken where they can be, and never in the way."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations

from dfq_jax.base import NO_YNN, RUN_ONCE, compiles_ahead, compiling_ahead, cpu_jit

UNKNOWN = {"xla_no_jaxlib_has_this_option": 1}


def kernel_gradient(x, kernel):
    def product(kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    return jax.grad(product)(kernel)


@pytest.mark.parametrize("options", [RUN_ONCE, NO_YNN, UNKNOWN, {**RUN_ONCE, **UNKNOWN}], ids=str)
def test_same_result_whatever_is_known(options):
    x, kernel = np.random.default_rng(0).normal(size=(2, 6, 6, 3)), np.ones((3, 3, 3, 4))
    x, kernel = jnp.float32(x), jnp.float32(kernel)
    found = cpu_jit(kernel_gradient, options)(x, kernel)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.stack([[padded[:, i : i + 6, j : j + 6].sum((0, 1, 2)) for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(found, np.repeat(expected[..., None], 4, -1), rtol=1e-4, atol=1e-4)


def test_options_reach_the_compiler():
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: x, compiler_options={"xla_backend_optimization_level": "bad"})(1.0)
    assert float(cpu_jit(lambda x: x + 1, {"xla_backend_optimization_level": "bad"})(1.0)) == 2.0


def test_within_other_functions():
    twice = cpu_jit(lambda x: 2 * x, RUN_ONCE)
    constant = jnp.arange(3.0)
    assert jax.jit(lambda: twice(constant))().tolist() == [0, 2, 4]  # no argument is traced, and yet all is
    assert jax.jit(lambda: twice(np.arange(3.0, dtype=np.float32)))().tolist() == [0, 2, 4]
    assert jax.vmap(twice)(constant).tolist() == [0, 2, 4]
    assert jax.grad(lambda x: twice(x).sum())(constant).tolist() == [2, 2, 2]
    assert jax.eval_shape(twice, constant).shape == (3,)


def test_keywords_of_jit():
    @functools.partial(cpu_jit, options=RUN_ONCE, static_argnames="power", donate_argnames="x")
    def raised(x, *, power):
        """Says what it does."""
        return x**power

    given = jnp.arange(4.0)
    assert raised(given, power=2).tolist() == [0, 1, 4, 9]
    assert given.is_deleted()
    assert raised.__doc__ == "Says what it does."


def test_compiled_once_for_all_threads():
    def multiplied(x):
        return x * 3

    function, results = cpu_jit(multiplied, RUN_ONCE), {}
    function(jnp.float32(1))
    with Compilations() as compiled:
        threads = [threading.Thread(target=lambda i=i: results.update({i: function(jnp.float32(i))})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {i: float(v) for i, v in results.items()} == {0: 0, 1: 3, 2: 6, 3: 9}
    assert compiled["multiplied"] == 0


def test_no_transfer_is_needed():
    x = jnp.float32(2)
    halved = cpu_jit(lambda x: x / 2, RUN_ONCE)
    halved(x)
    with jax.transfer_guard("disallow"):
        result = halved(x)
    assert float(result) == 1


def test_compiled_ahead():
    def cubed(x, power):
        return x**power

    function = cpu_jit(cubed, RUN_ONCE, static_argnums=1)
    with Compilations() as compiled, jax.default_matmul_precision("float32"), compiling_ahead():
        assert compiles_ahead(jnp.float32(2))
        function.compile_ahead(jnp.float32(2), 3)
        function.compile_ahead(jax.ShapeDtypeStruct((4,), jnp.float32), 3)
        assert float(function(jnp.float32(2), 3)) == 8.0
        assert function(jnp.arange(4.0), 3).tolist() == [0, 1, 8, 27]
    assert compiled["cubed"] == 2


def test_an_error_ahead_is_one_of_the_call():
    function = cpu_jit(lambda x, y: x + y)
    with compiling_ahead():
        function.compile_ahead(jnp.ones(2), jnp.ones(3))
        with pytest.raises(TypeError, match="incompatible shapes"):
            function(jnp.ones(2), jnp.ones(3))
    assert function(jnp.ones(2), jnp.ones(2)).tolist() == [2, 2]


def test_nothing_is_compiled_ahead_on_one_core(monkeypatch):
    monkeypatch.setattr("dfq_jax.base.compilation.usable_cores", lambda: 1)

    def negated(x):
        return -x

    function = cpu_jit(negated)
    with Compilations() as compiled, compiling_ahead():
        assert not compiles_ahead(jnp.float32(2))
        function.compile_ahead(jnp.float32(2))
        jax.jit(lambda x: function.compile_ahead(x))(jnp.float32(2))
        assert compiled["negated"] == 0
