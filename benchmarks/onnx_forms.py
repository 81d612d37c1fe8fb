"""Forms of a quantized ONNX file in a plain session of ONNX Runtime on this CPU: what they compute, and how fast.

    python benchmarks/onnx_forms.py cifar_resnet20 --checkpoint resnet20-12fca82f.th --data npz:test.npz --limit 400
    python benchmarks/onnx_forms.py efficientnet_lite0 --data folder:imagenet --limit 64

Files of `export_onnx` of one W8A8 network, with `integers` of every kind and with biases in float; of the same network
with weights of 7 bits, whose int8 sums do not saturate; and of the float network. Printed are the images with the same
first choice as the simulation of the network that was written, the SQNR to that simulation in decibel, and
milliseconds of one call for each batch size: medians over rounds in which all take turns. `benchmarks/onnx_forms.txt`
has the output.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
from latency import in_process, play, processor
from served import serve

from dfq_jax import Convention
from dfq_jax.export.onnx import export_onnx, open_onnx
from dfq_jax.stages.comparison import sqnr

FORMS = {
    "u8u8": {},
    "u8u8, float bias": {"float_bias": True},
    "u8s8": {"integers": "u8s8"},
    "s8s8": {"integers": "s8s8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name in the zoo")
    parser.add_argument("--checkpoint", help="trained weights; without any, of most networks random ones")
    parser.add_argument("--data", help="images, as for `dfq-jax evaluate`; without any, the bundled ones or noise")
    parser.add_argument("--limit", type=int, default=64, help="number of images that are compared")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    served = serve(arguments.model, arguments.checkpoint)
    images, source = served.images(arguments.data, arguments.limit)
    batches = [images[i : i + 32] for i in range(0, len(images), 32)]
    seven = Convention.parse("w7a8", edge_bits=None, edge_input_bits=8, symmetric_weights=True)
    networks = {"w8a8": served.quantize("w8a8"), "w7a8": served.quantize("w7a8", convention=seven)}
    simulated = {
        bits: np.concatenate([np.asarray(net.graph.logits(net(x))) for x in batches]) for bits, net in networks.items()
    }
    floating = jax.jit(served.graph.apply_fn)
    simulated["float32"] = np.concatenate(
        [np.asarray(served.graph.logits(floating(served.variables, x))) for x in batches]
    )
    written = {f"W8A8, {form}": (networks["w8a8"], "w8a8", fields) for form, fields in FORMS.items()}
    written["W7A8, u8s8"] = (networks["w7a8"], "w7a8", FORMS["u8s8"])
    written["float32"] = ((served.graph, served.variables), "float32", {})

    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{served.name}, {served.weights} weights, {len(images)} images of {Path(source).name}")
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for number, (name, (network, _, fields)) in enumerate(written.items()):
            path = Path(folder, f"{number}.onnx")
            export_onnx(network, path, **fields)
            runs[name] = open_onnx(path)
    seconds = [
        play({name: in_process(lambda run=run, n=n: run(images[:n])) for name, run in runs.items()}, arguments.rounds)
        for n in arguments.batches
    ]
    print(f"  {'':<20}{'same class':>11}{'dB':>8}" + "".join(f"{f'ms, batch {n}':>14}" for n in arguments.batches))
    for name, (_, reference, _) in written.items():
        expected = simulated[reference]
        found = np.concatenate([runs[name](x) for x in batches])
        same = 100 * float((expected.argmax(1) == found.argmax(1)).mean())
        times = "".join(f"{1000 * statistics.median(own[name]):14.2f}" for own in seconds)
        print(f"  {name:<20}{same:9.2f} %{sqnr(expected, found):8.1f}{times}", flush=True)


if __name__ == "__main__":
    main()
