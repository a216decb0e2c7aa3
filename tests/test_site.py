"""The site: built strictly, whole, without a network, and looked at in a browser."""

import http.server
import os
import re
import subprocess
import sys
import threading
import zlib
from functools import partial
from pathlib import Path

import pytest

import gradclip as gc
import gradclip.jax
import gradclip.torch
from test_docs import offered

ROOT = Path(__file__).parent.parent


def build(out, config=ROOT / "mkdocs.yml"):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "-d", out], capture_output=True, text=True, env=env, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert "WARNING" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    return out


def test_dead_links_would_fail(tmp_path):
    pages = tmp_path / "docs"
    pages.mkdir()
    dead = ("nowhere.md", "#nowhere", "/nowhere", "nowhere")
    (pages / "index.md").write_text("".join(f"[here]({link})\n" for link in dead))
    config = tmp_path / "mkdocs.yml"
    own = "docs_dir: docs\nnav: [index.md]\nplugins: []\nhooks: []\nextra_css: []\n"
    config.write_text(f"INHERIT: {ROOT}/mkdocs.yml\n{own}")
    done = build(tmp_path / "site", config)
    assert done.returncode != 0
    assert done.stderr.count("WARNING") == len(dead), done.stderr


def documented(site):
    """Return the names in the site's inventory, as other sites would link to them."""
    packed = (site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def test_every_public_name_is_in_the_reference(site):
    names = documented(site)
    for module in (gc, gradclip.torch, gradclip.jax):
        assert set(offered(module)) <= names
    index = (site / "reference/index.html").read_text("utf-8")
    called = {n: x.__name__ for n, x in vars(gc).items() if callable(x)}
    aliases = {name for name, own in called.items() if name != own}
    assert {"AGC", "AutoClip", "ZClip", "AdaGC"} <= aliases
    assert all(f"<code>{alias}</code>" in index for alias in aliases)


def test_every_trainer_is_in_the_reference(site):
    prefix = "gradclip.integrations."
    told = {name.split(".")[2] for name in documented(site) if name.startswith(prefix)}
    files = {path.stem for path in (ROOT / "src/gradclip/integrations").glob("*.py")}
    assert told == files - {"__init__", "alone", "tracking", "variables"}


def test_pages_load_nothing_from_elsewhere(site):
    asked = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=.?https?:[^>]*>")
    for page in site.rglob("*.html"):
        assert asked.findall(page.read_text("utf-8")) == [], page.name


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


CONTRAST = """() => {
  const part = x => x > 0.03928 ? ((x + 0.055) / 1.055) ** 2.4 : x / 12.92;
  const light = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(x => part(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const colour = (name, of) => getComputedStyle(document.querySelector(of))[name];
  const text = light(colour("color", ".md-content a[href]:not(.headerlink)"));
  const paper = light(colour("backgroundColor", "body"));
  return Math.max(text, paper) / Math.min(text, paper);
}"""
PAGES = (
    "index",
    "choose",
    "faq",
    "methods",
    "method.zh",
    "rules/ema",
    "reference/torch",
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_in_both_colours(browser, address, scheme):
    size = {"width": 390, "height": 844}
    tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    wrong = []
    tab.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: r.url.startswith(address) or wrong.append(r.url))
    for page in PAGES:
        tab.goto(f"{address}/{page}.html")
        width = tab.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"], page
        assert tab.evaluate(CONTRAST) >= 4.5, page
        assert tab.locator(".arithmatex").count() == 0, "an equation was not set"
        if folder := os.environ.get("GRADCLIP_SCREENSHOTS"):
            name = f"{page.replace('/', '-')}-{scheme}.png"
            tab.screenshot(path=f"{folder}/{name}", full_page=True)
    assert wrong == []
