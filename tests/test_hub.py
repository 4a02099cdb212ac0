"""Paths and repository ids; the hub is a local server that counts its requests."""

import hashlib
import http.server
import json
import sys
import threading

import pytest

from internvl_rt.hub import resolve_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "internvl_chat"}',
    "model.safetensors": b"weights" * 1000,
    "merges.txt": b"#version: 0.2\n",
    "tokenizer.model": b"pieces",
    "README.md": b"# not needed",
    "modeling_internvl_chat.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
}
WANTED = {"config.json", "model.safetensors", "merges.txt", "tokenizer.model"}


class _Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        status, headers, data = self._find(path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _find(self, path):
        api = "/api/models/org/tiny"
        if path == api or path.startswith(f"{api}/revision/"):
            if path.endswith("/nothing"):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            names = [{"rfilename": name} for name in FILES]
            data = {"id": "org/tiny", "sha": COMMIT, "siblings": names, "private": False}
            return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()
        if path.startswith(f"{api}/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in FILES.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        prefix = f"/org/tiny/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and name in FILES:
            etag = hashlib.sha1(FILES[name]).hexdigest()
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, FILES[name]
        if path.startswith("/api/models/org/gated"):
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if path.startswith("/api/models/org/broken"):
            return 400, {}, b"{}"
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _endpoint(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def _get(server, repo_id, tmp_path, **options):
    return resolve_path(repo_id, endpoint=_endpoint(server), cache_dir=tmp_path / "hub", **options)


def test_folder(tmp_path):
    assert resolve_path(tmp_path) == tmp_path
    assert resolve_path(str(tmp_path)) == tmp_path


def test_file_for_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match="is a file, expected a checkpoint folder"):
        resolve_path(file)


@pytest.mark.parametrize(
    "name", ["nowhere", "./a/b", "/a/b", "a/b/c", "../b", "a/..", "a b/c", "", "a\0/b", "a/b\n"]
)
def test_neither_folder_nor_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder, and not an 'org/name' id"):
        resolve_path(name)


@pytest.mark.parametrize("source", [b"folder", 5, ["folder"], None])
def test_neither_text_nor_path(source):
    with pytest.raises(
        TypeError, match=r"^path_or_repo_id is .*, expected a path or an 'org/name'"
    ):
        resolve_path(source)


def test_download(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    folder = _get(hub, "org/tiny", tmp_path)
    assert {p.name for p in folder.iterdir()} == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert len(hub.requests) <= 2 + 2 * len(WANTED) + 2
    asked = {path.rsplit("/", 1)[1] for _, path in hub.requests}
    assert not asked & (set(FILES) - WANTED)
    hub.requests.clear()
    assert _get(hub, "org/tiny", tmp_path) == folder
    assert not [path for command, path in hub.requests if command == "GET" and "resolve" in path]


@pytest.mark.parametrize(
    ("repo_id", "options", "error", "match"),
    [
        ("org/absent", {}, FileNotFoundError, "org/absent: no such folder or repository"),
        ("org/gated", {}, PermissionError, "must be asked for"),
        ("org/tiny", {"revision": "nothing"}, FileNotFoundError, "no revision 'nothing'"),
        ("org/broken", {}, OSError, "org/broken: the download failed"),
    ],
)
def test_download_errors(hub, tmp_path, repo_id, options, error, match):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(error, match=match) as caught:
        _get(hub, repo_id, tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert len(hub.requests) <= 4


def test_no_server(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    endpoint = _endpoint(hub)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(OSError, match="org/tiny: the download failed") as caught:
        resolve_path("org/tiny", endpoint=endpoint, cache_dir=tmp_path / "hub")
    assert "\n" not in str(caught.value)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'internvl-rt\[hub\]'"):
        resolve_path("org/tiny")
