"""What the host does while a device works: one program a call, losses read behind the next one, nothing twice."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from dispatches import Dispatches

import dfq_jax
from dfq_jax.base import Loop, Plan, Together
from dfq_jax.base import loop as base_loop
from dfq_jax.stages.rounding import learned
from dfq_jax.synthesis import loop as synthesis_loop

# --- the loop ---


class Loss:
    """A loss that says when it is read, and is waited for."""

    def __init__(self, events, turn, wait):
        self.events, self.turn, self.wait = events, turn, wait

    def __float__(self):
        self.events.append(("read", self.turn.batch, self.turn.end))
        self.wait(self.turn.end - self.turn.begin)
        return 1.0


class Steps(Loop):
    """Work that notes what is done."""

    def __init__(self, wait=lambda steps: None, **plan):
        super().__init__(Plan(**plan), jax.random.key(0))
        self.events, self.lengths, self.wait = [], [], wait

    def begin(self, batch):
        return 0

    def advance(self, turn, work):
        self.events.append(("call", turn.batch, turn.end))
        self.lengths.append(turn.end - turn.begin)
        return work + 1, Loss(self.events, turn, self.wait)


@pytest.mark.untyped
def test_a_loss_is_read_behind_the_next_call():
    work = Steps(num_batches=2, steps=30, chunk=10)
    assert work.run()
    places = [(batch, step) for batch in (0, 1) for step in (10, 20, 30)]
    calls, reads = ([(kind, *place) for place in places] for kind in ("call", "read"))
    pairs = [event for pair in zip(calls[1:], reads[:-1], strict=True) for event in pair]
    assert work.events == [calls[0], *pairs, reads[-1]]


@pytest.mark.untyped
def test_a_plateau_is_noticed_before_the_next_call():
    work = Steps(num_batches=1, steps=100, chunk=10, patience=20)
    assert work.run()
    assert work.events == [(kind, 0, step) for step in (10, 20, 30) for kind in ("call", "read")]


@pytest.mark.untyped
def test_reports_are_of_what_was_read():
    reports = []
    Steps(num_batches=2, steps=20, chunk=10).run(on_progress=reports.append)
    assert [(report.batch, report.step, report.done) for report in reports] == [
        (1, 10, 10),
        (1, 20, 20),
        (2, 10, 30),
        (2, 20, 40),
    ]
    assert reports[-1].eta == 0 and all(report.eta > 0 for report in reports[:-1])


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(base_loop.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("pace", "expected"), [(1 / 64, [10, 10, 10, 20, 32]), (0.25, [10, 10, 10, 5, 2, 2]), (9, [10, 10, 10, 5, 2, 1])]
)
def test_calls_are_as_long_as_the_time_that_they_are_given(clock, pace, expected):
    plan = {"num_batches": 1, "steps": 1000, "chunk": 10, "report_every": 1, "seconds": 0.5}
    work = Steps(lambda steps: clock(pace * steps), **plan)
    assert work.run()
    assert work.lengths[: len(expected)] == expected and sum(work.lengths) == 1000
    assert set(work.lengths[len(expected) : -1]) == {expected[-1]}


@pytest.mark.untyped
def test_calls_of_several_loops_are_as_long_as_each_has_time(clock):
    fast, slow = (
        Steps(
            lambda steps, pace=pace: clock(pace * steps), num_batches=1, steps=320, chunk=8, report_every=1, seconds=1
        )
        for pace in (1 / 64, 1 / 4)
    )
    assert Together([fast, slow]).run()
    assert fast.lengths[-2] == 64 and slow.lengths[-2] == 4


# --- synthesis ---


@functools.cache
def network(layers=3):
    """Equal layers with BatchNorms, and one without."""
    rng = np.random.default_rng(0)

    def apply_fn(variables, x):
        for layer in variables["layers"]:
            x = x @ layer["kernel"] - layer["mean"]
            x = jax.nn.relu(x * jax.lax.rsqrt(layer["var"] + 1e-5) * layer["scale"] + layer["bias"])
        return x @ variables["head"]

    def layer():
        positive = {name: rng.uniform(0.5, 2, 8) for name in ("var", "scale")}
        return {
            "kernel": rng.normal(size=(8, 8)) / 3,
            "mean": 0.2 * rng.normal(size=8),
            "bias": rng.normal(size=8),
        } | positive

    variables = {"layers": [layer() for _ in range(layers)], "head": rng.normal(size=(8, 8))}
    variables = jax.tree.map(jnp.float32, variables)
    return dfq_jax.trace(apply_fn, variables, (2, 8)), variables


CONFIG = dfq_jax.SynthesisConfig(num_images=8, batch_size=4, steps=20, chunk=10)


def make(config=CONFIG, key=0):
    return dfq_jax.synthesize(*network(), jax.random.key(key), config)


def started(function):
    """What a function starts, once all is compiled."""
    function()
    with Dispatches() as found:
        function()
    return found


@pytest.fixture
def one_lane(monkeypatch):
    monkeypatch.setattr(synthesis_loop, "usable_cores", lambda: 1)


@pytest.mark.parametrize(("statistics", "others"), [("batch", {}), ("set", {"_scaled_sum": 1})])
def test_a_call_of_synthesis_is_one_program_and_one_read(one_lane, statistics, others):
    short, long = (
        started(functools.partial(make, dataclasses.replace(CONFIG, steps=steps, statistics=statistics)))
        for steps in (20, 60)
    )
    calls = 2 * 4  # more, of both batches
    expected = {"advance_batch": 1, Dispatches.READS: 1, **others}
    assert long - short == Counter({name: count * calls for name, count in expected.items()})


def guarded(monkeypatch):
    """Calls of programs that are compiled move nothing from the host; how many there were."""
    call, seen, count = Loop._call, set(), Counter()

    def inside(self, turn):
        first = (id(self), turn.batch) not in seen
        seen.add((id(self), turn.batch))
        count["first" if first else "guarded"] += 1
        with jax.transfer_guard("allow" if first or turn.end == self.plan.steps else "disallow"):
            return call(self, turn)

    monkeypatch.setattr(Loop, "_call", inside)
    return count


@pytest.mark.parametrize("statistics", ["batch", "set"])
def test_calls_of_synthesis_need_nothing_from_the_host(monkeypatch, one_lane, statistics):
    config = dataclasses.replace(CONFIG, steps=40, statistics=statistics)
    expected = make(config)
    count = guarded(monkeypatch)
    np.testing.assert_array_equal(make(config).images, expected.images)
    assert count == {"first": 2, "guarded": 6}


def test_images_are_the_same_wherever_calls_end(monkeypatch, one_lane):
    expected = make(dataclasses.replace(CONFIG, steps=60, chunk=60)).images
    lengths, length = [], Loop.length
    monkeypatch.setattr(Loop, "length", lambda self, turn: lengths.append(turn.end - turn.begin) or length(self, turn))
    monkeypatch.setattr(synthesis_loop, "default_seconds", lambda platform: 1e-9)
    found = make(dataclasses.replace(CONFIG, steps=60, chunk=0))
    assert lengths[0] == 25 and 12 in lengths and sum(lengths) == 2 * 60
    np.testing.assert_array_equal(found.images, expected)


def test_images_compile_once_for_all_batches_and_calls(one_lane):
    jax.clear_caches()
    with Compilations() as compiled:
        make(dataclasses.replace(CONFIG, steps=25))
    assert compiled["advance_batch"] == compiled["init_batch"] == compiled["batch_images"] == 1
    with Compilations() as compiled:
        make(dataclasses.replace(CONFIG, num_images=12, steps=25), key=1)
    assert not set(compiled) & {"advance_batch", "init_batch", "batch_images"}


# --- reconstruction ---


LEARNING = dfq_jax.ReconstructionConfig(steps=100, batch_size=4, chunk=10)


@functools.cache
def quantized(layers):
    graph, variables = network(layers)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(30, 8)), jnp.float32)
    convention = dfq_jax.Convention.parse("w3a4", edge_bits=None)
    ranges = dfq_jax.estimate_ranges(graph, variables, images, convention)
    return graph, variables, dfq_jax.quantize_params(graph, variables, ranges, convention), images


def learn(config=LEARNING, layers=3):
    return dfq_jax.reconstruct(*quantized(layers), jax.random.key(0), config)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_equal_blocks_compile_once():
    learn(layers=3)
    with Compilations() as compiled:
        learn(layers=5)
    assert not set(compiled) & {"advance_block", "_batch_outputs", "_with_batch", "choose_block", "hard_block"}


def test_a_call_of_reconstruction_is_one_program():
    short, long = (started(functools.partial(learn, dataclasses.replace(LEARNING, chunk=chunk))) for chunk in (20, 5))
    calls = 4 * (100 // 5 - 100 // 20)
    assert long - short == {"advance_block": calls}  # and no more reads
    assert short["advance_block"] == 4 * 5


def test_a_block_is_read_once():
    """A loss every 50 steps; and error before, error after and changed codes when the next block is on its way."""
    two, four = (started(functools.partial(learn, layers=layers)) for layers in (2, 4))
    assert four[Dispatches.READS] - two[Dispatches.READS] == 2 * (2 + 3)
    per_block = {name: count / 2 for name, count in (four - two).items() if name != Dispatches.READS}
    assert per_block.pop("advance_block") == 10
    batches = 8 + 2 * 1 + 8  # of targets, of images held out by both, and of what the next block sees
    assert per_block.pop("_batch_outputs") == per_block.pop("_with_batch") == batches
    assert sum(per_block.values()) <= 20, per_block


def test_calls_of_reconstruction_need_nothing_from_the_host(monkeypatch):
    expected, _ = learn()
    count = guarded(monkeypatch)
    found, _ = learn()
    same(found, expected)
    assert count == {"first": 4, "guarded": 36}


def test_the_network_is_the_same_wherever_calls_end(monkeypatch):
    expected, info = learn()
    monkeypatch.setattr(learned, "CALL_SECONDS", 1e-9)
    monkeypatch.setattr(learned, "ACCELERATOR_CHUNK", 30)
    monkeypatch.setattr(learned, "platform_of", lambda *_: "gpu")
    lengths, length = [], Loop.length
    monkeypatch.setattr(Loop, "length", lambda self, turn: lengths.append(turn.end - turn.begin) or length(self, turn))
    found, other = learn(dataclasses.replace(LEARNING, chunk=0))
    assert sum(lengths) == 4 * 100 and set(lengths) > {30, 15, 7}
    assert [block.after for block in other.blocks] == [block.after for block in info.blocks]
    same(found, expected)
