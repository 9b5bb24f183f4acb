"""The pages in headless Chromium, if installed: nothing overflows on a phone, nothing is fetched, light or dark.

pytest -m slow tests/report/test_browser.py
"""

import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_kit import write_run
from typer.testing import CliRunner

from nvembed.commands.app import app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at the page with"),
]
# Measures the page in a frame of a phone's width and counts elements that overflow it, unless their box scrolls.
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe id="f" src="/PAGE" style="width:390px;height:800px;border:0">
</iframe><script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument, root = page.documentElement
  const out = [...page.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll") && e.getBoundingClientRect().right > root.clientWidth + 1)
  const back = getComputedStyle(page.body).backgroundColor
  document.title = `${root.scrollWidth - root.clientWidth} wider, ${out.length} out, on ${back}`
}</script></body>"""


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[str, list[str], Path]]:
    """Address of a server with the pages of one and of two runs, the requests it got, and its folder."""
    folder = tmp_path_factory.mktemp("site")
    make_run = request.getfixturevalue("make_run")
    runs = [write_run(folder / name, make_run) for name in ("one", "two")]
    arguments = ["report", *map(str, runs), "--out", str(folder / "two.html")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    shutil.copy(runs[0] / "report.html", folder / "one.html")
    for page in ("one.html", "two.html"):
        (folder / f"frame-{page}").write_text(FRAME.replace("PAGE", page))
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests, folder
        server.shutdown()


def browse(address: str, profile: Path, *options: str) -> str:
    """The document as Chromium has it after loading."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=5000", *options, "--dump-dom", address,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout


@pytest.mark.parametrize("page", ["one.html", "two.html"])
@pytest.mark.parametrize(
    ("scheme", "back"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(21, 23, 26)")], ids=["light", "dark"]
)
def test_a_page_on_a_phone(
    site: tuple[str, list[str], Path], tmp_path: Path, page: str, scheme: str, back: str
) -> None:
    address, requests, _ = site
    requests.clear()
    document = browse(f"{address}/frame-{page}", tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    title = re.search(r"<title>(.*?)</title>", document)
    assert title is not None and title[1] == f"0 wider, 0 out, on {back}"
    assert set(requests) - {"/favicon.ico"} == {f"/frame-{page}", f"/{page}"}, "the page fetches nothing"
