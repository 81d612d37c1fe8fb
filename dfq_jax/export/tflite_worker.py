"""What runs in a process of its own, under an interpreter that has the LiteRT packages: no JAX, nothing of dfq_jax.

The converter brings its own copy of MLIR, which must not share a process with JAX's, can crash, and pins packages that
others need newer. So `export.tflite` talks to it by files:

    python tflite_worker.py check FOLDER      -> result.json
    python tflite_worker.py convert FOLDER    module.mlir, job.json, inputs.npz -> model.tflite, result.json
    python tflite_worker.py export FOLDER     module.mlir, inputs.npz -> float model.tflite, result.json
    python tflite_worker.py run FOLDER        model.tflite, inputs.npz -> outputs.npz
"""

import json
import pathlib
import re
import sys
import time

import numpy as np

SIGNATURE = "serving_default"


def check(folder):
    """That what the others import is here."""
    import ai_edge_litert.interpreter
    import ai_edge_quantizer.quantizer
    import litert_converter.converter_api_ext

    modules = ai_edge_litert, ai_edge_quantizer, litert_converter
    return {"packages": [module.__name__ for module in modules]}


def convert(folder):
    """StableHLO text to a LiteRT file, quantized with given ranges."""
    job = json.loads((folder / "job.json").read_text())
    model = to_float((folder / "module.mlir").read_text())
    inputs = np.load(folder / "inputs.npz")
    rules = recipe_of(model, inputs, job["modes"], static=job["static"])
    unmatched = []
    if job["static"]:
        model, unmatched = to_int8(model, inputs, rules, job["ranges"], job["headroom"])
    else:
        model = quantized(model, rules, None)
    (folder / "model.tflite").write_bytes(model)
    return {"unmatched": unmatched}


def export(folder):
    """StableHLO text to a float LiteRT file, and LiteRT's names of our tensors."""
    model = to_float((folder / "module.mlir").read_text())
    (folder / "model.tflite").write_bytes(model)
    return {"names": tensor_names(model, np.load(folder / "inputs.npz"))}


def to_float(text):
    """The text form: from bytecode the converter finds no entry function, or crashes."""
    from litert_converter import converter_api_ext as api
    from litert_converter.mlir import ir, passmanager

    context = ir.Context()
    api.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse(text)
        # Without a signature the calibrator finds no way to feed the model. There is one module: nothing to merge.
        api.set_signature(module.operation, SIGNATURE, ["x"], ["logits"])
        api.run_convert_to_tfl_passes(module, passmanager.PassManager(), api.ConvertToTFLConfig())
        return bytes(api.export_flatbuffer_to_bytes(module.operation))


def recipe_of(model, inputs, modes, *, static):
    """A recipe of ai-edge-quantizer, where later rules win: one for all operations, and those for single layers."""
    from ai_edge_quantizer import recipe

    (weights,) = recipe.weight_only_wi8_afp32()
    rules = recipe.static_wi8_ai8() if static else [weights]
    for layer, mode in modes.items():
        own = {**weights, "algorithm_key": "no_quantize"} if mode == "float" else weights
        rules += [{**own, "regex": f"^{re.escape(scope)}$"} for scope in scopes(model, inputs["kernel:" + layer])]
    return rules


def scopes(model, kernel):
    """What ai-edge-quantizer calls the operations that have these weights, in whatever order of elements."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as utils

    found, own = [], np.sort(kernel, axis=None)
    parsed = utils.read_model(bytearray(model))
    for graph in parsed.subgraphs:
        constants = {}
        for index, tensor in enumerate(graph.tensors):
            values = utils.get_tensor_data(tensor, parsed.buffers)
            if values is not None and values.size == own.size and values.dtype == np.float32:
                constants[index] = np.abs(np.sort(values, axis=None) - own).max()
        same = {index for index, error in constants.items() if error <= 1e-6 * np.abs(own).max()}
        found += [utils.get_op_scope(op, graph.tensors) for op in graph.operators if same.intersection(op.inputs)]
    if not found:
        raise ValueError("no operation has the weights of a layer that is not to be quantized")
    return found


def quantized(model, rules, ranges):
    """The file of a model quantized by a recipe."""
    from ai_edge_quantizer import quantizer

    job = quantizer.Quantizer(bytearray(model), rules)
    return bytes(job.quantize(ranges, enable_progress_report=False).quantized_model)


def to_int8(model, inputs, rules, ranges, headroom):
    """Full integer arithmetic: our ranges for tensors of ours, and for others those of the images times `headroom`."""
    from ai_edge_quantizer import quantizer

    job = quantizer.Quantizer(bytearray(model), rules)
    calibrated = {
        name: {end: np.float32(headroom) * value for end, value in own.items()} if own else own
        for name, own in extremes(job, inputs["images"]).items()
    }
    names = tensor_names(model, inputs)
    for tensor, (low, high) in ranges.items():
        for name in names[tensor]:
            if calibrated.get(name):
                shape = np.shape(calibrated[name]["min"])
                calibrated[name] = {
                    "min": np.full(shape, low, np.float32),
                    "max": np.full(shape, high, np.float32),
                }
    return quantized(model, rules, calibrated), [t for t in ranges if not names[t]]


def extremes(job, images):
    """The smallest and largest value of each tensor over all images.

    Calibration on several at once is a moving average that hardly moves from the first: it clips most images.
    """
    found = {}
    for image in images:
        for name, own in job.calibrate({SIGNATURE: [{"x": image[None]}]}, num_threads=1).items():
            if not found.get(name):
                found[name] = own
            elif own:
                found[name] = {
                    "min": np.minimum(found[name]["min"], own["min"]),
                    "max": np.maximum(found[name]["max"], own["max"]),
                }
    return found


def tensor_names(model, inputs):
    """LiteRT's names of our tensors: those that have the same values for the first image."""
    interpreter = load(model, preserve=True)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], inputs["images"][:1])
    interpreter.invoke()
    found = {key.removeprefix("tensor:"): [] for key in inputs.files if key.startswith("tensor:")}
    values = {}
    for detail in interpreter.get_tensor_details():
        if detail["dtype"] == np.float32 and detail["name"]:
            try:
                values[detail["name"]] = interpreter.get_tensor(detail["index"]).ravel()
            except ValueError:  # inside a fused operation, without memory of its own
                continue
    for key in found:
        own = inputs["tensor:" + key].ravel()
        for name, value in values.items():
            if value.size == own.size and np.abs(value - own).max() <= 1e-3 * max(np.abs(own).max(), 1e-6):
                found[key].append(name)
    return found


def load(model, preserve=False, threads=1):
    """An interpreter of a model."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # Delegates fuse operations away whose results are asked for.
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if preserve else OpResolverType.AUTO
    interpreter = Interpreter(
        model_content=bytes(model),
        num_threads=threads,
        experimental_preserve_all_tensors=preserve,
        experimental_op_resolver_type=resolver,
    )
    interpreter.allocate_tensors()
    return interpreter


def run(folder):
    """Logits of images, "batch" of them in a call on "threads" threads, and the seconds of each call."""
    inputs = np.load(folder / "inputs.npz")
    interpreter = load((folder / "model.tflite").read_bytes(), threads=int(inputs["threads"]))
    (source,), result = interpreter.get_input_details(), interpreter.get_output_details()[0]
    batch = int(inputs["batch"])
    if batch != source["shape"][0]:
        interpreter.resize_tensor_input(source["index"], (batch, *source["shape"][1:]))
        interpreter.allocate_tensors()
    outputs, seconds = [], []
    for start in range(0, len(inputs["images"]), batch):
        interpreter.set_tensor(source["index"], encode(inputs["images"][start : start + batch], source))
        began = time.perf_counter()
        interpreter.invoke()
        seconds.append(time.perf_counter() - began)
        outputs.append(decode(interpreter.get_tensor(result["index"]), result))
    np.savez(folder / "outputs.npz", logits=np.concatenate(outputs), seconds=seconds)
    return {}


def encode(values, detail):
    """Real numbers in the type of an input."""
    scale, zero = detail["quantization"]
    if detail["dtype"] == np.float32:
        return values.astype(np.float32)
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(detail["dtype"])


def decode(values, detail):
    """Values of a tensor in float."""
    scale, zero = detail["quantization"]
    if detail["dtype"] == np.float32:
        return values
    return (values.astype(np.float32) - zero) * np.float32(scale)


def main(command, folder):
    """Run one command; what went wrong stands in result.json."""
    try:
        result = {"check": check, "convert": convert, "export": export, "run": run}[command](folder)
    except ModuleNotFoundError as error:
        result = {"missing": error.name}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
