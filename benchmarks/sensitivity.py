"""Sensitivities of layers: seconds, compilations, and how well images made from the network stand in for real ones.

    python benchmarks/sensitivity.py --model mobilenet_v2 --checkpoint mobilenet_v2-b0353104.pth --data folder:imagenet

Prints the seconds of `sensitivity` in a new process, compilation included, on images made by the recipe fast; how often
the two programs that run the network were compiled; the seconds of some of the same numbers by `quantize_params` and
`compare`, and what all would take so. Then Spearman's rank correlation of the layers' divergences with those on real
images, width by width: on synthetic images of two keys, on noise of the moments that BatchNorms promise, and on other
real images, which is as well as so few images can tell. Real images serve to report, and for nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from dfq_jax import RECIPES, Convention, Sensitivity, as_function, sensitivity, synthesize, trace
from dfq_jax.data import load_data
from dfq_jax.quantizers import ActivationQuantizers, quantization, with_quantization
from dfq_jax.stages import compare, estimate_ranges, quantize_params
from dfq_jax.zoo import load_model

BITS = (2, 3, 4, 6, 8)
PARTS = ("weights", "input", "both", "without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--checkpoint", help="weights; left out where the zoo finds them itself")
    parser.add_argument("--data", required=True, help="images to compare with; labels are not used")
    parser.add_argument("--images", type=int, help="synthetic ones; by default as the command line has it")
    parser.add_argument("--real", type=int, default=32, help="real ones, and as many others")
    parser.add_argument("--keys", type=int, default=2)
    arguments = parser.parse_args()

    model = load_model(arguments.model, arguments.checkpoint)
    apply_fn, variables = as_function(model.module, model.variables)
    graph = trace(apply_fn, variables, model.input_shape)
    count = arguments.images or max(8, min(32, 8 * 224 * 224 * 3 // math.prod(model.input_shape[1:])))
    made = [images_of(graph, variables, count, key) for key in range(arguments.keys)]
    print(f"{arguments.model}: {len(graph.layers)} layers, {count} images made from the network, {len(BITS)} widths")

    compiled: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, fun_name="?", **__: compiled.update(
            [fun_name] if event == "/jax/core/compile/backend_compile_duration" else []
        )
    )
    began = time.perf_counter()
    found = [sensitivity(graph, variables, made[0], bits=BITS)]
    seconds = time.perf_counter() - began
    runs = sum(n for name, n in compiled.items() if "_outputs" in name or "_recorded" in name)
    print(f"{seconds:.1f} s for {len(BITS) * (4 * len(graph.layers) + 1)} networks; {runs} programs of the network")
    one = seconds_one_by_one(graph, variables, made[0])
    print(f"one by one: {one:.2f} s each, so {one * len(BITS) * 4 * len(graph.layers) / 60:.0f} min")
    began = time.perf_counter()
    found += [sensitivity(graph, variables, images, bits=BITS) for images in made[1:]]
    print(f"{(time.perf_counter() - began) / max(len(made) - 1, 1):.1f} s with all compiled")

    real, others = real_images(model, arguments)
    reference = sensitivity(graph, variables, real, bits=BITS)
    print(f"\nrank correlation with {len(real)} real images  | widths {', '.join(map(str, BITS))}")
    for key, other in enumerate(found):
        show(f"synthetic, key {key}", reference, other)
    show("noise", reference, sensitivity(graph, variables, bits=BITS))
    show(f"{len(others)} other real ones", reference, sensitivity(graph, variables, others, bits=BITS))


def images_of(graph: Any, variables: Any, count: int, key: int) -> Any:
    config = RECIPES["fast"].synthesis
    config = dataclasses.replace(config, num_images=count, batch_size=min(count, config.batch_size))
    return synthesize(graph, variables, jax.random.key(key), config).images


def real_images(model: Any, arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed images from all over the data, and as many others."""
    data, total = load_data(arguments.data), 2 * arguments.real
    images = np.stack([data[i * len(data) // total][0] for i in range(total)])
    preprocessing = model.preprocessing
    if images.shape[1:] == tuple(model.input_shape[1:]):  # resized and cropped already
        preprocessing = dataclasses.replace(preprocessing, resize=None, crop=None)
    images = np.asarray(preprocessing(images))
    return images[::2], images[1::2]


def seconds_one_by_one(graph: Any, variables: Any, images: Any, some: int = 3) -> float:
    """Of one network of which one layer alone is quantized, by the functions that quantize networks."""
    convention = Convention(edge_bits=None)
    ranges = estimate_ranges(graph, variables, images, convention)
    floats, times = graph.leaves_by_path(variables), []
    for layer in graph.layers[:: max(1, len(graph.layers) // some)]:
        began = time.perf_counter()
        whole = quantize_params(graph, variables, ranges, convention)
        others = {path: floats[path] for path in graph.kernels if path != layer.kernel}
        own = {n: p for n, p in quantization(whole).by_tensor.items() if n == layer.tensor}
        compare(graph, variables, with_quantization(graph.replace(whole, others), ActivationQuantizers(own)), images)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def show(name: str, reference: Sensitivity, other: Sensitivity) -> None:
    cells = []
    for part in PARTS:
        rows = zip(getattr(reference, part).T, getattr(other, part).T, strict=True)
        cells.append(f"{part} " + " ".join(f"{spearmanr(a, b)[0]:.2f}" for a, b in rows))
    print(f"{name:24} | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
