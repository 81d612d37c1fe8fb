"""Train the two bundled Fashion-MNIST networks.

The weights in `dfq_jax/zoo/weights/` come from these commands (two CPU cores are enough), the second with one
deviation that the README.md there notes:

    python benchmarks/train_fashion.py resnet20 --data /usr/share/datasets/fashion-mnist --output OUT
    python benchmarks/train_fashion.py mobilenet --data /usr/share/datasets/fashion-mnist --output OUT
    python benchmarks/train_fashion.py mobilenet_distilled --start OUT/fashion_mobilenet.npz \
        --data /usr/share/datasets/fashion-mnist --output OUT2

The third goes on from the weights of the second, with the bundled ResNet-20 as the teacher.

`--data` is a folder with the four `*-ubyte.gz` files of Fashion-MNIST (the Debian package
`dataset-fashion-mnist` installs them). `--output` receives `fashion_NETWORK.npz` (the weights) and
`NETWORK.ckpt` (the training state, which `--resume` continues from), both rewritten after every epoch.

The last 5,000 training images are held out for validation; the test set is read once, at the end.
"""

import argparse
import gzip
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization, traverse_util

from dfq_jax.zoo import fashion, load_model

VALIDATION_IMAGES = 5_000
EVAL_BATCH = 500
CROP_PADDING = 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained."""

    epochs: int
    batch: int = 128
    peak_lr: float
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    warmup: float = 0.2
    # Early epochs see shrunken images: they cost half as much, and the network does not mind.
    small_size: int = 20
    small_fraction: float = 0.6
    # Share of the loss that is the divergence from what the bundled ResNet-20 makes of the image before it is shifted
    # and mirrored (Hinton et al., arXiv 1503.02531): its predictions are then computed once.
    teacher_share: float = 0.0
    temperature: float = 3.0


RECIPES = {
    "resnet20": Recipe(epochs=18, peak_lr=0.2),
    "mobilenet": Recipe(epochs=12, peak_lr=0.2, weight_decay=2e-4, small_fraction=0.7),
    "mobilenet_distilled": Recipe(
        epochs=6, peak_lr=0.06, weight_decay=1e-4, label_smoothing=0.0, small_fraction=0.0, teacher_share=0.8
    ),
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as pure functions of two trees: trained parameters and batch-norm statistics."""

    params: Any
    stats: Any
    forward: Callable[[Any, Any, jax.Array, bool], tuple[jax.Array, Any]]
    flatten: Callable[[Any, Any], dict[str, np.ndarray]]

    def started_from(self, path: Path) -> "Network":
        """The same network with the weights of a file that `save` wrote."""
        # Arrays are found by the names that `flatten` gives to leaf numbers.
        leaves, structure = jax.tree.flatten((self.params, self.stats))
        numbered = jax.tree.unflatten(structure, [np.full(leaf.shape, i) for i, leaf in enumerate(leaves)])
        with np.load(path) as arrays:
            for name, number in self.flatten(*numbered).items():
                leaves[number.flat[0]] = jnp.asarray(arrays[name])
        params, stats = jax.tree.unflatten(structure, leaves)
        return replace(self, params=params, stats=stats)


def linen_network(seed: int) -> Network:
    model = fashion.FashionResNet20()
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))

    def forward(params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return model.apply(variables, x), stats
        logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def flatten(params, stats):
        return flat_arrays({"params": params, "batch_stats": stats})

    return Network(params=variables["params"], stats=variables["batch_stats"], forward=forward, flatten=flatten)


def nnx_network(seed: int) -> Network:
    model = fashion.mobilenet(nnx.Rngs(seed))
    for index in range(model.block_count):
        getattr(model, f"block{index}").depthwise.conv_general_dilated = depthwise
    eval_graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    model.train()
    train_graph = nnx.graphdef(model)

    def forward(params, stats, x, train):
        model = nnx.merge(train_graph if train else eval_graph, params, stats, copy=True)
        return model(x), nnx.state(model, nnx.BatchStat)

    def flatten(params, stats):
        return flat_arrays(nnx.to_pure_dict(nnx.merge_state(params, stats)))

    return Network(params=params, stats=stats, forward=forward, flatten=flatten)


def depthwise(x: jax.Array, kernel: jax.Array, strides, *_, **__) -> jax.Array:
    """Depthwise convolution with "SAME" padding as a sum of shifted products, for `conv_general_dilated`.

    XLA's grouped convolutions, and above all their kernel gradients, are tens of times slower than this on
    CPUs. Same values: `[N, H, W, C]` and `[K, K, 1, C]` to `[N, ceil(H / stride), ceil(W / stride), C]`.
    """
    (size, _, _, _), stride = kernel.shape, strides[0]
    (top, bottom), (left, right) = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), strides, "SAME")
    # The barriers keep XLA from computing the layers before and after once for every shift.
    x = jax.lax.optimization_barrier(x)
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    return jax.lax.optimization_barrier(_shifted_products(x, kernel, stride))


def _plain_shifted_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    size = kernel.shape[0]
    height, width = ((length - size) // stride * stride + 1 for length in x.shape[1:3])
    return sum(
        x[:, i : i + height : stride, j : j + width : stride] * kernel[i, j, 0] for i, j in np.ndindex(size, size)
    )


_shifted_products = jax.custom_vjp(_plain_shifted_products, nondiff_argnums=(2,))


def _shifted_products_forward(x, kernel, stride):
    return _shifted_products(x, kernel, stride), (x, kernel)


def _shifted_products_backward(stride, saved, grad):
    x, kernel = saved
    size = kernel.shape[0]
    (grad_x,) = jax.vjp(lambda x: _plain_shifted_products(x, kernel, stride), x)[1](grad)
    # For the kernel, spread the gradient over the input's grid: padding it is far cheaper than slicing the
    # input. The barrier keeps XLA from sharing the padded copies with `grad_x`, which would be slow again.
    zero = jnp.zeros((), grad.dtype)
    inner = (0, 0, stride - 1)
    dilated = jax.lax.pad(grad, zero, ((0, 0, 0), inner, inner, (0, 0, 0)))
    x, dilated = jax.lax.optimization_barrier((x, dilated))
    rows, columns = x.shape[1] - dilated.shape[1], x.shape[2] - dilated.shape[2]
    grad_kernel = [
        jnp.sum(x * jnp.pad(dilated, ((0, 0), (i, rows - i), (j, columns - j), (0, 0))), (0, 1, 2))
        for i, j in np.ndindex(size, size)
    ]
    return grad_x, jnp.stack(grad_kernel).reshape(kernel.shape)


_shifted_products.defvjp(_shifted_products_forward, _shifted_products_backward)


def flat_arrays(tree: dict) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in traverse_util.flatten_dict(tree, sep="/").items()}


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: a big-endian header, then the array."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load(data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 28, 28, 1]` and labels `[N]`, both uint8."""
    images = read_idx(data / f"{split}-images-idx3-ubyte.gz")
    return images[..., None], read_idx(data / f"{split}-labels-idx1-ubyte.gz")


def augmented_batches(
    images: np.ndarray, targets: Any, batch: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, Any]]:
    """Shuffled full batches of images and of a tree of targets; each image is randomly shifted and mirrored."""
    count, height, width, _ = images.shape
    pad = CROP_PADDING
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    order = rng.permutation(count)
    rows, columns = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    for start in range(0, count - batch + 1, batch):
        index = order[start : start + batch]
        top, left = rng.integers(0, 2 * pad + 1, (2, batch, 1, 1))
        crops = padded[index[:, None, None], rows + top, columns + left]
        flip = rng.random((batch, 1, 1, 1)) < 0.5
        yield np.where(flip, crops[:, :, ::-1], crops), jax.tree.map(lambda t, index=index: t[index], targets)


def preprocess(pixels: jax.Array, size: int) -> jax.Array:
    """uint8 `[N, 28, 28, 1]` to normalized float32 `[N, size, size, 1]`."""
    x = (pixels.astype(jnp.float32) / 255 - fashion.MEAN) / fashion.STD
    if size != x.shape[1]:
        x = jax.image.resize(x, (x.shape[0], size, size, 1), "linear")
    return x


def make_steps(network: Network, recipe: Recipe, steps_per_epoch: int):
    """The optimizer and the two jitted functions: one training step, and counting correct answers."""
    schedule = optax.cosine_onecycle_schedule(
        recipe.epochs * steps_per_epoch, recipe.peak_lr, pct_start=recipe.warmup, final_div_factor=1e3
    )
    # Weight decay is for kernels, not for biases and batch-norm scales.
    decayed = jax.tree.map(lambda p: p.ndim > 1, network.params)
    optimizer = optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, mask=decayed),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )

    def loss_fn(params, stats, x, labels, teacher_logits):
        logits, stats = network.forward(params, stats, x, True)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, fashion.CLASSES), recipe.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        if recipe.teacher_share:
            found, wanted = (jax.nn.log_softmax(z / recipe.temperature) for z in (logits, teacher_logits))
            divergence = optax.losses.kl_divergence_with_log_targets(found, wanted).mean()
            loss = (1 - recipe.teacher_share) * loss + recipe.teacher_share * recipe.temperature**2 * divergence
        return loss, stats

    def train_step(state, pixels, targets, size):
        x = preprocess(pixels, size)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = grad_fn(state["params"], state["stats"], x, *targets)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "stats": stats, "opt": opt}, loss

    def count_correct(state, pixels, labels, size):
        logits, _ = network.forward(state["params"], state["stats"], preprocess(pixels, size), False)
        return jnp.sum(jnp.argmax(logits, -1) == labels)

    return (
        optimizer,
        jax.jit(train_step, static_argnums=3, donate_argnums=0),
        jax.jit(count_correct, static_argnums=3),
    )


def teach(images: np.ndarray) -> np.ndarray:
    """Logits `[N, 10]` of the bundled ResNet-20, averaged over each image and its mirror image."""
    teacher = load_model("fashion_resnet20")

    @jax.jit
    def logits(variables, pixels):
        x = preprocess(pixels, 28)
        return (teacher.module.apply(variables, x) + teacher.module.apply(variables, x[:, :, ::-1])) / 2

    parts = [images[start : start + EVAL_BATCH] for start in range(0, len(images), EVAL_BATCH)]
    return np.concatenate([np.asarray(logits(teacher.variables, part)) for part in parts])


def top1(count_correct, state, images: np.ndarray, labels: np.ndarray, size: int = 28) -> float:
    """Top-1 in percent."""
    correct = 0
    for start in range(0, len(labels), EVAL_BATCH):
        part = slice(start, start + EVAL_BATCH)
        correct += int(count_correct(state, images[part], labels[part], size))
    return 100 * correct / len(labels)


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Write to a temporary neighbor first, so that an interrupted run never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def save(output: Path, name: str, network: Network, state, epochs_done: int) -> None:
    # Leaves only: the tree is rebuilt from the code, and NNX states need no serialization of their own.
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    numbered = {str(i): leaf for i, leaf in enumerate(leaves)}
    blob = serialization.msgpack_serialize({"epochs": epochs_done, "leaves": numbered})
    write_atomically(output / f"{name}.ckpt", lambda file: file.write(blob))
    arrays = network.flatten(state["params"], state["stats"])
    write_atomically(output / f"fashion_{name}.npz", lambda file: np.savez_compressed(file, **arrays))


def restore(path: Path, state):
    blob = serialization.msgpack_restore(path.read_bytes())
    leaves = [jnp.asarray(blob["leaves"][str(i)]) for i in range(len(blob["leaves"]))]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), blob["epochs"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, help="override the recipe")
    parser.add_argument("--batch", type=int, help="override the recipe")
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    overrides = {k: v for k in ("epochs", "batch") if (v := getattr(args, k)) is not None}
    recipe = Recipe(**(vars(RECIPES[args.network]) | overrides))
    args.output.mkdir(parents=True, exist_ok=True)

    images, labels = load(args.data, "train")
    valid = images[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:]
    images, labels = images[:-VALIDATION_IMAGES], labels[:-VALIDATION_IMAGES]

    network = (linen_network if args.network == "resnet20" else nnx_network)(args.seed)
    if args.start is not None:
        network = network.started_from(args.start)
    steps_per_epoch = len(labels) // recipe.batch
    optimizer, train_step, count_correct = make_steps(network, recipe, steps_per_epoch)
    state = {"params": network.params, "stats": network.stats, "opt": optimizer.init(network.params)}
    done = 0
    if args.resume and (args.output / f"{args.network}.ckpt").exists():
        state, done = restore(args.output / f"{args.network}.ckpt", state)

    count = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    print(f"{args.network}: {count:,} parameters, {recipe}", flush=True)

    targets = (labels, teach(images) if recipe.teacher_share else np.zeros(len(labels), np.float32))
    small_epochs = round(recipe.small_fraction * recipe.epochs)
    sizes = [recipe.small_size if e < small_epochs else 28 for e in range(recipe.epochs)]
    start = time.perf_counter()
    for epoch in range(done, recipe.epochs):
        rng = np.random.default_rng((args.seed, epoch))
        losses = []
        epoch_start = time.perf_counter()
        for pixels, chosen in augmented_batches(images, targets, recipe.batch, rng):
            state, loss = train_step(state, pixels, chosen, sizes[epoch])
            losses.append(loss)
        loss = float(np.mean(losses))
        accuracy = top1(count_correct, state, *valid, sizes[epoch])
        seconds = time.perf_counter() - epoch_start
        # An epoch costs about as much as it has pixels.
        eta = seconds * sum((s / sizes[epoch]) ** 2 for s in sizes[epoch + 1 :])
        print(
            f"epoch {epoch + 1}/{recipe.epochs} size {sizes[epoch]} loss {loss:.4f} "
            f"validation {accuracy:.2f} % {seconds:.0f} s, {eta / 60:.1f} min left",
            flush=True,
        )
        save(args.output, args.network, network, state, epoch + 1)

    print(f"trained in {(time.perf_counter() - start) / 60:.1f} min")
    print(f"test top-1 {top1(count_correct, state, *load(args.data, 't10k')):.2f} %")


if __name__ == "__main__":
    main()
