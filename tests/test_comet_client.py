from __future__ import annotations

import base64
import gzip
import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from django.contrib.staticfiles import finders

NODE = shutil.which("node")
TSC = shutil.which("tsc")
ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).with_name("comet_client.mjs")

#: What a page may write, and what it may not.
USE = """
import {Comet, type Status} from "./comet.js"
const comet = new Comet("/comet/", {cursor: "x", transports: ["sse", "poll"], shared: false})
comet
  .on<{text: string}>("room:7", ({text}, {channel, event}) => console.log(text.length, channel.length, event?.length))
  .on("room:8", data => console.log(data), {gap: channel => location.assign(channel), refused: error => error.status, event: "new"})
  .off("room:7")
comet.onstatus = (status: Status, {delay, error}) => console.log(status, delay, error?.message)
comet.publish("room:7", {text: "Hello"}, "new").then(() => comet.close())
const tabs: number = comet.diagnostics().tabs
new Comet()
// @ts-expect-error
new Comet("/comet/", {transports: ["pigeon"]})
// @ts-expect-error
comet.on("room:7")
"""


def _node_version() -> int:
    if NODE is None:
        return 0
    shown = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    return int(shown.removeprefix("v").partition(".")[0])


def _static(name: str) -> bytes:
    found = finders.find(f"tornjango/{name}")
    assert isinstance(found, str)
    return Path(found).read_bytes()


@pytest.mark.parametrize("name", ["comet.js", "comet.classic.js"])
def test_client_is_small(name: str) -> None:
    assert len(gzip.compress(_static(name), mtime=0)) < 6000


def test_clients_are_made_from_their_source() -> None:
    """After a change of comet.source.js run bin/_comet_client.py."""
    make = runpy.run_path(str(ROOT / "bin" / "_comet_client.py"))
    source = _static("comet.source.js").decode()
    assert make["module"](source) == _static("comet.js").decode()
    assert make["classic"](source) == _static("comet.classic.js").decode()


@pytest.mark.skipif(
    TSC is None, reason="needs TypeScript's tsc on the PATH (npm install typescript)"
)
def test_types_fit_what_the_documentation_shows(tmp_path: Path) -> None:
    assert TSC is not None
    (tmp_path / "comet.d.ts").write_bytes(_static("comet.d.ts"))
    (tmp_path / "page.ts").write_text(USE)
    command = [TSC, "--noEmit", "--strict", "--target", "es2022", "--module", "es2022", "page.ts"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(_node_version() < 20, reason="needs Node.js (20 or later) on the PATH")
def test_client_follows_through_everything() -> None:
    """Runs comet_client.mjs, where each promise of the client has its own test."""
    assert NODE is not None
    # A .js file would be read as a CommonJS module; a data URL is a module as in a browser.
    module = f"data:text/javascript;base64,{base64.b64encode(_static('comet.js')).decode()}"
    done = subprocess.run(
        [NODE, "--test", str(TESTS)],
        env=os.environ | {"COMET_JS": module},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
