"""Uploading to a hub of our own: a loopback server that speaks the calls of an upload without large files."""

import base64
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny import make

import mamba_rsst
from mamba_rsst.cli import main


class Hub(BaseHTTPRequestHandler):
    """POST /api/repos/create, .../preupload/main and .../commit/main; every file comes in the commit itself."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server = self.server
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.answer(200, {"url": f"{server.address}/someone/smaller", "name": "someone/smaller"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            return self.answer(200, {"files": modes})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            server.commits.append(lines)
            url = f"{server.address}/someone/smaller/commit/{'0' * 40}"
            return self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        if self.path.startswith("/api/models/someone/smaller"):
            return self.answer(200, {"id": "someone/smaller", "sha": "0" * 40, "siblings": []})
        return self.answer(404, {"error": self.path})

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.commits = [], []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_folder_reaches_the_hub_whole(hub, tmp_path):
    folder = tmp_path / "model"
    make("lm").save_pretrained(folder)
    for name in ("rsst_state.json", "training_args.bin", "stages/0-train/model/config.json", "start/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("# A card")
    options = ["someone/smaller", "--private", "--message", "Half of it"]
    # In a process of its own: the library reads its environment when it is imported.
    here = str(Path(mamba_rsst.__file__).parents[1])
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_right", "HF_HOME": str(tmp_path / "home")}
    env |= {"PYTHONPATH": here + os.pathsep + os.environ.get("PYTHONPATH", ""), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "mamba_rsst", "push", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Pushed to {hub.address}/someone/smaller.\n"
    (made,) = hub.created
    assert (made["name"], made["organization"]) == ("smaller", "someone")
    assert made.get("private") or made.get("visibility") == "private"  # the second since huggingface_hub 2
    (commit,) = hub.commits
    assert commit[0]["key"] == "header" and commit[0]["value"]["summary"] == "Half of it"
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit[1:]}
    assert {"config.json", "model.safetensors", "modeling_mamba_rsst.py", "README.md"} <= set(files)
    assert not [name for name in files if name.startswith(("stages", "start", "rsst_state", "training_args", "_"))]
    assert all((folder / name).read_bytes() == content for name, content in files.items())


def test_what_cannot_be_pushed_is_one_sentence(hub, tmp_path, capsys, monkeypatch):
    folder, bare = tmp_path / "model", tmp_path / "bare"
    make("lm").save_pretrained(folder)
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens
    for path, repo, address, token, said in (
        (folder, "someone/smaller", hub.address, "hf_wrong", "could not be pushed to 'someone/smaller'"),
        (folder, "someone/smaller", nobody, "hf_right", "could not be pushed to 'someone/smaller'"),
        (folder, "a/b/c", hub.address, "hf_right", "could not be pushed to 'a/b/c'"),
        (bare, "someone/smaller", hub.address, "hf_right", "has no weights"),
        (tmp_path / "absent", "someone/smaller", hub.address, "hf_right", "There is no model folder"),
    ):
        monkeypatch.setattr("mamba_rsst.hub.HfApi", partial(HfApi, endpoint=address, token=token))
        capsys.readouterr()
        assert main(["push", str(path), repo]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("mamba-rsst push: error: ") and err.count("\n") == 1, err
        assert said in err and str(path) in err
    assert hub.commits == []
