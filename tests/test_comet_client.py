from __future__ import annotations

import base64
import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from django.contrib.staticfiles import finders

NODE = shutil.which("node")
TESTS = Path(__file__).with_name("comet_client.mjs")


def _node_version() -> int:
    if NODE is None:
        return 0
    shown = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    return int(shown.removeprefix("v").partition(".")[0])


def _client() -> bytes:
    found = finders.find("tornjango/comet.js")
    assert isinstance(found, str)
    return Path(found).read_bytes()


def test_client_is_small() -> None:
    assert len(gzip.compress(_client(), mtime=0)) < 3000


@pytest.mark.skipif(_node_version() < 20, reason="needs Node.js (20 or later) on the PATH")
def test_client_follows_through_everything() -> None:
    """Runs comet_client.mjs, where each promise of the client has its own test."""
    assert NODE is not None
    # A .js file would be read as a CommonJS module; a data URL is a module as in a browser.
    module = f"data:text/javascript;base64,{base64.b64encode(_client()).decode()}"
    done = subprocess.run(
        [NODE, "--test", str(TESTS)],
        env=os.environ | {"COMET_JS": module},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
