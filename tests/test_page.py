"""The report as a page: what it measures, against NumPy; what it says; and how it behaves in a browser."""

import base64
import dataclasses
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import model_grid
import numpy as np
import pytest

import dfq_jax
from dfq_jax import RECIPES, Report, quantize
from dfq_jax.graph import record_tensors
from dfq_jax.quantizers import fake_quant, quantization
from dfq_jax.report import examine, report_from, sensitivity_page
from dfq_jax.report.details import BINS, LARGEST_SIDE, Details, LayerDetails, Picture, Spread, _smaller
from dfq_jax.report.page import report_page
from dfq_jax.report.report import LayerReport
from dfq_jax.stages import Convention, Sensitivity, compare_layers, estimate_ranges, quantize_params, sqnr

rng = np.random.default_rng(0)
EVIL = "<script>document.title='broken'</script>&amp;\"'"
BROWSER = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_figures = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("matplotlib", "PIL"))),
    reason="matplotlib or pillow is not installed: pip install 'dfq_jax[report]'",
)


# --- what is measured ---


@pytest.fixture(scope="module")
def measured():
    graph, variables, images = model_grid.network_of(model_grid.cifar_resnet8())
    convention = Convention(weight_bits=4, activation_bits=4)
    ranges = estimate_ranges(graph, variables, images, convention)
    ranges = {name: (0.5 * lo, 0.5 * hi) for name, (lo, hi) in ranges.items()}  # so that something is clipped
    qvariables = quantize_params(graph, variables, ranges, convention)
    return graph, variables, qvariables, images, examine(graph, variables, qvariables, images)


def in_bins(codes, spread, scale, zero):
    """Counts of codes in bins, in float64."""
    edges = np.linspace(spread.first, spread.last, BINS + 1) / scale + zero
    inner = np.clip(codes, edges[0] + 1e-9, edges[-1] - 1e-9)
    return np.histogram(inner, edges)[0]


@needs_figures
def test_inputs_against_their_steps(measured):
    graph, variables, qvariables, images, found = measured
    tensors, quantizers = record_tensors(graph, variables, images)[1], quantization(qvariables).by_tensor
    for layer, details in zip(graph.layers, found.layers, strict=True):
        values, params, spread = np.asarray(tensors[layer.tensor]), quantizers[layer.tensor], details.inputs
        scale = float(params.scale)
        zero = 0.0 if params.zero_point is None else float(params.zero_point)
        counts = in_bins(values.astype(np.float64) / scale + zero, spread, scale, zero)
        assert sum(spread.counts) == values.size
        # Values at the edge of a bin may fall to either side of it.
        assert np.abs(np.cumsum(counts) - np.cumsum(spread.counts)).max() <= 2 + values.size // 1000
        assert (spread.low, spread.high, spread.step) == pytest.approx((float(params.lo), float(params.hi), scale))
        beyond = (values < spread.low - scale / 2) | (values > spread.high + scale / 2)
        assert spread.clipped == pytest.approx(beyond.mean(), abs=2e-3)
        assert spread.sqnr == pytest.approx(sqnr(values, fake_quant(values, params)), abs=0.01)
    assert max(details.inputs.clipped for details in found.layers) > 0.01


@needs_figures
def test_weights_against_their_steps(measured):
    graph, variables, qvariables, _, found = measured
    kernels, qkernels = graph.leaves_by_path(variables), graph.leaves_by_path(qvariables)
    for layer, details in zip(graph.layers, found.layers, strict=True):
        kernel, quantized = np.asarray(kernels[layer.kernel], np.float64), qkernels[layer.kernel]
        zero = 0 if quantized.zero_point is None else np.asarray(quantized.zero_point)
        codes = kernel / np.asarray(quantized.scale, np.float64) + zero
        counts, spread = in_bins(codes, details.weights, 1, 0), details.weights
        assert sum(spread.counts) == kernel.size
        assert np.abs(np.cumsum(counts) - np.cumsum(spread.counts)).max() <= 2 + kernel.size // 1000
        assert details.scales == (float(quantized.scale.min()), float(quantized.scale.max()))
        assert spread.sqnr == pytest.approx(sqnr(kernel, quantized.dequantize()), abs=0.01)


@needs_figures
def test_errors_and_pictures(measured):
    graph, variables, qvariables, images, found = measured
    errors = compare_layers(graph, variables, qvariables, images)
    for error, details in zip(errors.layers, found.layers, strict=True):
        assert (details.sqnr, details.own) == pytest.approx((error.sqnr, error.own), abs=0.1)
    reference = np.asarray(graph.logits(dfq_jax.run(graph, variables, images)), np.float64)
    other = np.asarray(graph.logits(dfq_jax.apply_quantized(graph, qvariables, images)), np.float64)
    wanted = sorted(zip(reference.argmax(1).tolist(), other.argmax(1).tolist(), strict=True))
    assert sorted(picture.classes for picture in found.pictures) == wanted
    log = [z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (reference, other)]
    divergences = (np.exp(log[0]) * (log[0] - log[1])).sum(1)
    assert [p.divergence for p in found.pictures] == pytest.approx(sorted(divergences, reverse=True), rel=1e-3)
    assert all(base64.b64decode(p.png).startswith(b"\x89PNG") for p in found.pictures)


def test_large_pictures_are_made_smaller():
    tiles = rng.integers(0, 256, (1, 224, 448, 3), np.uint8)
    small = _smaller(tiles)
    assert small.shape == (1, 56, 112, 3) and max(small.shape) == LARGEST_SIDE
    assert small[0, 3, 5, 1] == np.rint(tiles[0, 12:16, 20:24, 1].mean())


# --- what the page says ---


def spread(bits=4):
    counts = tuple(int(n) for n in rng.integers(0, 10_000, BINS))
    return Spread(counts=counts, first=-4.5, last=19.5, low=0.0, high=2**bits - 1.0, step=1.0, clipped=0.01, sqnr=20.0)


def large_report(layers=53, **fields):
    """Of a network as deep as ResNet-50, with a name that is no name."""
    names = [EVIL, *(f"stages_{i // 10}/blocks_{i % 10}/a_long_name_of_a_convolution/conv" for i in range(1, layers))]
    figures = rng.uniform(5, 50, (layers, 4))
    reports = tuple(
        LayerReport(
            name=name, kind="depthwise", weight_bits=8 if i == 0 else 4, activation_bits=4,
            weight_sqnr=float(figures[i, 0]), low=-0.123456, high=12.3456, weights=1000 + i,
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    details = tuple(
        LayerDetails(
            name=name, sqnr=float(a), own=float(b), carried=float("inf") if i == 0 else float(c), weights=spread(),
            scales=(0.01, 0.02), inputs=dataclasses.replace(spread(), sqnr=float(a + 1)),
        )
        for i, (name, (a, b, c, _)) in enumerate(zip(names, figures, strict=True))
    )  # fmt: skip
    png = base64.b64encode(rng.bytes(30_000)).decode()
    shown = tuple(Picture(png=png, divergence=0.1 * i, classes=(3, i % 2 + 2)) for i in range(12))
    facts = dict(
        recipe="fast", settings={"name": EVIL}, convention=f"W4A4, {EVIL}", key=[0, 3], images="64 synthesized",
        seconds={"images": 3.0}, agreement=98.4, sqnr=21.0, layers=reports, skipped=((EVIL, EVIL),),
        steps=(f"{EVIL}: kept, held-out divergence 0.2 -> 0.1", "bits by layer: 2 widths changed together"),
        size={"float": 4_000_000, "quantized": 600_000}, warnings=(EVIL,), versions={"jax": EVIL}, command=EVIL,
        details=Details(measured_on=EVIL, layers=details, pictures=shown),
    )  # fmt: skip
    return Report(**{**facts, **fields})


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("matplotlib")
    return report_page(large_report(), EVIL)


def test_names_are_text(page):
    assert EVIL not in page and page.count("<script") == 1
    assert html.escape(EVIL) in page


def test_fifty_three_layers_are_small_and_load_nothing(page):
    assert len(page.encode()) < 2_000_000
    assert page.count('class="layer"') == 53 and page.count("<svg") == 2 * 53 + 2
    loaded = re.findall(r"""(?:src|href|action|data|poster)=["']?([^"'> ]+)|url\(([^)]*)\)|@import""", page)
    assert all(any(target.startswith(("data:", "#")) for target in found) for found in loaded)
    assert "default-src 'none'" in page


def test_the_page_says_what_was_done(page):
    text = html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "98.4 %", "6.7 times smaller", "0.60 MB in place of 4.00 MB", "Of 1 change tried, 1 was kept",
        "jnp.array([0, 3], jnp.uint32)", "class 3 became 2", "Furthest", "W4 A4", "2 widths changed together",
        "1 % of the values lie beyond the range",
    ):  # fmt: skip
        assert words in text, words


@needs_figures
def test_a_report_without_details_says_what_it_lacks():
    bare = dataclasses.replace(large_report(3), details=None, agreement=None, sqnr=None, skipped=())
    text = report_page(bare, "net")
    assert "no histograms and no pictures" in text and "Error along the network" not in text
    assert text.count('class="layer"') == 3 and "All products of the network are quantized." in text


@needs_figures
@pytest.mark.parametrize("budget", [None, dfq_jax.Budget(average_weight_bits=5.0)])
def test_quantize_keeps_details_that_a_file_keeps(tmp_path, budget):
    graph, variables, _ = model_grid.network_of(model_grid.cifar_resnet8())
    small = RECIPES["paper"].replace(synthesis_num_images=8, synthesis_steps=2, synthesis_batch_size=8)
    settings = {"input_shape": graph.input.shape, "recipe": small, "bits": "w4a4", "budget": budget}
    q = quantize(graph.apply_fn, variables, **settings, details=lambda pixels: pixels / 255.0)
    assert len(q.report.details.pictures) == 8 and len(q.report.details.layers) == len(graph.layers)
    assert (q.report.details.sensitivity is None) == (budget is None)
    again = report_from(json.loads(q.report.to_json()))
    assert again.to_dict() == q.report.to_dict() and again.details.pictures == q.report.details.pictures
    q.save(tmp_path / "net.safetensors")
    loaded = dfq_jax.load(tmp_path / "net.safetensors", graph.apply_fn, variables).report
    loaded.save_html(tmp_path / "net.html", title="net")
    text = (tmp_path / "net.html").read_text()
    assert text == report_page(q.report, "net") and ("What each layer costs" in text) == (budget is not None)
    with pytest.raises(ValueError, match="preprocessing: expected one that scales"):
        quantize(graph.apply_fn, variables, **settings, details=lambda pixels: pixels.astype(float) ** 2)


@needs_figures
def test_noise_is_not_shown_as_images():
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)

    def conv(v, x):
        return jax.lax.conv_general_dilated(x, v["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    noise = RECIPES["noise"].replace(synthesis_num_images=8)
    q = quantize(conv, {"k": kernel}, input_shape=(1, 6, 6, 2), recipe=noise, details=True)
    assert q.report.details.pictures == () and "Gaussian noise" in q.report.details.measured_on


@needs_figures
def test_in_a_notebook(monkeypatch):
    report = large_report(3)
    shown = report._repr_html_()
    source = re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', shown)
    assert html.unescape(source[1]) == report_page(report, "a network")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = report._repr_html_()
    assert shown.startswith("<pre>") and "dfq_jax[report]" in shown and "<script" not in shown
    with pytest.raises(ImportError, match=r"pip install 'dfq_jax\[report\]'"):
        report.save_html("page.html")


def test_the_table_fits_eighty_characters():
    lines = large_report().table().splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if "[-0.123, 12.3]" in line]) == 53
    brief = large_report().table(layers=False)
    assert "12.3]" not in brief and "not quantized: " in brief


def sensitivities(layers=20):
    values = {part: 10 ** rng.uniform(-7, 1, (layers, 3)) for part in ("weights", "input", "both", "without")}
    names = (EVIL, *(f"layer{i}" for i in range(1, layers)))
    return Sensitivity(layers=names, bits=(2, 4, 8), **values, total=np.ones(3), measured_on="8 images")


@needs_figures
def test_the_map_of_sensitivities():
    found = sensitivities()
    text = sensitivity_page(found, EVIL, command="dfq-jax sensitivity net", versions={"jax": "1"})
    assert EVIL not in text and text.count("<script") == 1
    colors = re.findall(r"background:(#\w{6});color:(#\w{6})", text)
    assert len(colors) == 20 * 9
    assert "layer1" in text and "dfq-jax sensitivity net" in text and f"{found.both[1, 0]:.6g}" in text


# --- in a browser ---


def open_page(text, folder, script=""):
    """The page after a script ran in it, and what the browser's console said."""
    if BROWSER is None:
        pytest.skip("no Chromium: `apt-get install chromium`, or name one in the environment variable CHROMIUM")
    (folder / "page.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'user'}",
    )
    command = [BROWSER, *flags, "--virtual-time-budget=2000", "--dump-dom", (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


SCRIPT = """
const said = {};
const rows = () => [...document.querySelectorAll("#layers > .layer")];
const press = (key) => document.querySelector(`button[data-key="${key}"]`).click();
const orders = (key) => rows().map((row) => row.dataset[key]);
said.orders = {};
for (const key of ["weights", "inputs", "own", "carried", "bits"]) { press(key); said.orders[key] = orders(key); }
press("own"); press("own"); said.turned = orders("own");
press("order"); said.back = orders("order");
const closed = rows().find((row) => !row.open);
closed.querySelector("summary").click();
said.chosen = closed.open;
said.height = closed.querySelector("svg").getBoundingClientRect().height;
said.names = document.querySelector(".layer .name").textContent;
said.title = document.title;
said.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.dataset.said = JSON.stringify(said);
"""


def test_sorting_and_choosing_in_a_browser(page, tmp_path):
    shown, console = open_page(page, tmp_path, SCRIPT)
    assert not console
    said = json.loads(html.unescape(re.search(r'data-said="([^"]*)"', shown)[1]))
    for key, values in said["orders"].items():
        known = [float(value) for value in values if value is not None]
        assert known == sorted(known) and len(known) == 53 - (key == "carried"), key
    assert said["orders"]["carried"][-1] is None  # what is exact comes last
    assert [float(v) for v in said["turned"]] == sorted((float(v) for v in said["turned"]), reverse=True)
    assert [int(v) for v in said["back"]] == list(range(1, 54))
    assert said["chosen"] and said["height"] > 100
    assert said["names"] == EVIL and said["title"] == f"Quantization of {EVIL}"
    assert said["overflow"] <= 0


@needs_figures
def test_the_map_in_a_browser(tmp_path):
    script = """
    document.querySelector('button[data-key="worst"]').click();
    const rows = [...document.querySelectorAll("#heat tbody tr")];
    document.body.dataset.said = JSON.stringify(rows.map((row) => Number(row.dataset.worst)));
    """
    shown, console = open_page(sensitivity_page(sensitivities(), "net"), tmp_path, script)
    assert not console
    said = json.loads(re.search(r'data-said="([^"]*)"', shown)[1])
    assert len(said) == 20 and said == sorted(said, reverse=True)


def test_the_browser_lets_nothing_out(page, tmp_path):
    """What the test above relies on: a page that asked for something would have said so on the console."""
    asking = page.replace("<main>", '<main><img src="http://127.0.0.1:9/picture.png">')
    assert any("Content Security Policy" in line for line in open_page(asking, tmp_path)[1])
