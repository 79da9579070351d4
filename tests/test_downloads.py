"""Weights from the network, from a server on this machine: only where allowed, whole, checked, and kept."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from robustbench_diffaug import downloads, weight_files
from robustbench_diffaug.downloads import allowing, cached, remote
from robustbench_diffaug.files import Weights, path_of
from tests.hostile_files import good, saved

Rdiff = Callable[..., tuple[int, str, str]]
GOOD = saved(good())
DIGEST = hashlib.sha256(GOOD).hexdigest()
PAGE = b"<!DOCTYPE html><title>Sign in</title>" + b" " * 600


class Server(ThreadingHTTPServer):
    """Answers by path, and keeps the paths that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.bodies = {"/good.pth": GOOD, "/page.pth": PAGE, "/empty.pth": b""}

    def url(self, path: str) -> str:
        """The address of a path."""
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Answer(BaseHTTPRequestHandler):
    """One answer."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        kind, _, rest = self.path.lstrip("/").partition("/")
        if kind in ("to", "code"):
            self.send_response(302 if kind == "to" else int(rest))
            if kind == "to":
                self.send_header("Location", rest)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"40\r\n" + GOOD[:20])
        elif kind == "says":
            self.send_header("Content-Length", rest)
            self.end_headers()
            self.wfile.write(GOOD)
        elif kind == "slow":
            self.send_header("Content-Length", str(len(GOOD)))
            self.end_headers()
            self.wfile.write(GOOD[:100])
            self.wfile.flush()
            time.sleep(20)
        else:
            body = self.server.bodies[self.path]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    made = Server()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    """The names of all files in the cache, parts of files too."""
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_nothing_is_asked_for_without_leave(server: Server, cache: Path) -> None:
    weights = Weights(uri=server.url("/good.pth"), sha256=DIGEST)
    for look in (weights.check, weights.pinned, weights.path, Weights(uri=weights.uri).contents):
        with pytest.raises(ValueError, match=r"good\.pth (is on the network, .*add --allow-download|can be changed)"):
            look()
    assert not server.asked and not cache.exists()


def test_a_file_is_fetched_once(server: Server, cache: Path) -> None:
    weights = Weights(uri=server.url("/good.pth"), sha256=DIGEST)
    with allowing(True):
        path = weights.check()
        assert path.read_bytes() == GOOD and path.parent == cache and path.name.endswith("-good.pth")
        weights.check()
    assert (weights.pinned(), weights.contents()) == (path, DIGEST)  # without leave, since it is there
    assert server.asked == ["/good.pth"] and kept(cache) == [path.name]


def test_a_new_digest_fetches_anew(server: Server, cache: Path) -> None:
    server.bodies["/a.pth"] = GOOD
    with allowing(True):
        cached(server.url("/a.pth"), DIGEST)
    server.bodies["/a.pth"] = other = saved({"more": good()["bias"]})
    digest = hashlib.sha256(other).hexdigest()
    with pytest.raises(ValueError, match=r"the file that was fetched before has another sha256; .*--allow-download"):
        cached(server.url("/a.pth"), digest)
    with allowing(True):
        assert cached(server.url("/a.pth"), digest).read_bytes() == other
    assert len(kept(cache)) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/code/404", "cannot be fetched: the server says 404 Not Found$"),
        ("/code/500", "cannot be fetched: the server says 500 "),
        ("/good.pth", "has sha256 .*, not 00*: another file, or a damaged one; nothing was kept$"),
        ("/says/900000", rf"broke off after {len(GOOD)} of 900000 bytes; try again$"),
        ("/chunked", "cannot be fetched: IncompleteRead"),
        (f"/says/{10**18}", "is larger than 20 GiB, the most that is fetched$"),
        (f"/says/{19 * 2**30}", f"has {19 * 2**30} bytes, and .* has room for 7; set RDIFF_CACHE to another$"),
        ("/to/file:///etc/passwd", "cannot be fetched: the server says 302 .*file:///etc/passwd"),
        ("/to/ftp://127.0.0.1/weights", "ftp://127.0.0.1/weights is not fetched; needed is https"),
        ("/to/http://user:word@127.0.0.1/weights", "holds a user's name, which reports would show"),
        ("/to//to//to/", "cannot be fetched: the server says (302|404)"),
    ],
)
def test_what_fails_leaves_nothing(
    path: str, message: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "room" in message:
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=7))
    server.bodies["/"] = GOOD
    with allowing(True), pytest.raises(ValueError, match=message) as caught:
        cached(server.url(path), "0" * 64)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not kept(cache)


@pytest.mark.parametrize(
    ("path", "message"),
    [("/page.pth", r"page\.pth is an HTML page, not weights"), ("/empty.pth", "holds only 0 bytes, no weights")],
)
def test_a_page_is_no_file(path: str, message: str, server: Server, cache: Path) -> None:
    """Even with the digest of the page: it is of whatever the user saw."""
    weights = Weights(uri=server.url(path), sha256=hashlib.sha256(server.bodies[path]).hexdigest())
    for look in (weights.check, weights.pinned):
        with allowing(True), pytest.raises(ValueError, match=message):
            look()
    assert not kept(cache)


def test_hostile_bytes_are_not_kept(server: Server, cache: Path) -> None:
    from tests.hostile_files import cases

    found = cases(cache.parent / "canary")
    with allowing(True):
        for name in ("os.system-2-root", "eval-4-weights", "slip-../evil", "storage-of-1e9", "safetensors-header"):
            server.bodies["/bad.pth"] = found[name]
            with pytest.raises(ValueError, match=r"bad\.pth "):
                Weights(uri=server.url("/bad.pth"), sha256=hashlib.sha256(found[name]).hexdigest()).check()
    assert not kept(cache) and not (cache.parent / "canary").exists()


def test_without_a_digest_only_https(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Weights(uri=server.url("/good.pth"))
    with allowing(True):
        with pytest.raises(ValueError, match=r"can be changed on its way; write https://, or pin its sha256$"):
            weights.check()
        monkeypatch.setattr(downloads, "UNPINNED", downloads.PINNED)  # as if this server spoke https
        assert weights.check().read_bytes() == GOOD
    assert f"pin it: sha256: {DIGEST}" in caplog.text
    assert weights.contents() == DIGEST and server.asked == ["/good.pth"]


def test_a_redirect_is_followed(server: Server, cache: Path) -> None:
    with allowing(True):
        assert cached(server.url(f"/to/{server.url('/good.pth')}"), DIGEST).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:///etc/passwd", "is not fetched; needed is https://..., or the path of a file"),
        ("ftp://127.0.0.1/w", "is not fetched"),
        ("s3://bucket/w", "is not fetched"),
        ("https://", "is no address"),
        ("https://[::1/w", "is no address"),
        ("https://127.0.0.1:port/w", "is no address"),
        ("https://127.0.0.1/a b", "with %20 for a space"),
        ("https://127.0.0.1/\u00e9", "is no address"),
        ("https://127.0.0.1/a\nb", "is no address"),
        ("https://me:word@127.0.0.1/w", "the address at 127.0.0.1 holds a user's name"),
        ("https://127.0.0.1/" + "x" * 9999, r"xxx\.\.\. is on the network"),
        ("timm:no_such_network", "timm has no weights called 'no_such_network'"),
        ("timm:resnet18.a1_in1k", "is not in the Hugging Face cache; to fetch it, add --allow-download"),
        ("timm:" + "x" * 9999, "timm has no weights called"),
    ],
)
def test_addresses(uri: str, message: str, cache: Path) -> None:
    assert remote(uri)
    with pytest.raises(ValueError, match=message) as caught:
        Weights(uri=uri).check()
    assert len(str(caught.value)) < 500 and "word" not in str(caught.value)


def test_weights_of_timm_come_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of huggingface_hub, made by hand: models--OWNER--NAME, refs, snapshots."""
    root = tmp_path / "models--timm--resnet18.a1_in1k"
    (root / "snapshots/abc").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("abc")
    (root / "snapshots/abc/model.safetensors").write_bytes(
        path_of("rdiff:zoo/resnet-standard.safetensors").read_bytes()
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = Weights(uri="timm:resnet18.a1_in1k").check()
    assert found == root / "snapshots/abc/model.safetensors"
    with pytest.raises(ValueError, match=r"has sha256 .*, not 0000"):
        Weights(uri="timm:resnet18", sha256="0" * 64).check()


def test_a_killed_process_leaves_no_file(server: Server, cache: Path) -> None:
    url = server.url("/slow")
    code = (
        f"from robustbench_diffaug.downloads import allowing, cached\nwith allowing(True): cached({url!r}, {DIGEST!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while not server.asked and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    (part,) = kept(cache)
    assert part.startswith(".") and part.endswith(".part")
    with pytest.raises(ValueError, match="it was not fetched before"):
        cached(url, DIGEST)
    os.utime(cache / part, (0, 0))  # a day later
    with allowing(True):
        found = cached(server.url("/good.pth"), DIGEST)
    assert kept(cache) == [found.name]


def test_places_where_nothing_can_be_kept(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file, not a folder")
    with allowing(True), pytest.raises(ValueError, match=r"cannot be kept in .*cache: File exists$"):
        cached(server.url("/good.pth"), DIGEST)
    for name in ("RDIFF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert downloads.folder() == Path("/home/me/.cache/rdiff")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert downloads.folder() == Path("/caches/rdiff")


def test_the_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with allowing(False):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with allowing(False), allowing(True):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in os.environ


def test_the_flag(server: Server, cache: Path, rdiff: Rdiff, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every command that reads weights; also as an environment variable."""
    zoo = path_of("rdiff:zoo/resnet-standard.safetensors")
    server.bodies["/zoo.safetensors"] = zoo.read_bytes()
    url, digest = server.url("/zoo.safetensors"), weight_files.sha256(zoo)
    entry = f"""
    kind: timm
    id: fetched
    arch: resnet10t
    args: {{channels: [16, 32, 64, 128]}}
    preprocess: {{mean: [0.5], std: [0.5]}}
    weights: {{uri: "{url}", sha256: {digest}}}
    """
    bench = "{name: plain, evaluator: {kind: shift}, datasets: [{kind: mnist5k, limit: 4}]}"
    Path("mine.yaml").write_text(entry)
    Path("suite.yaml").write_text(f"name: suite\nbenches: [{bench}]\ncheckpoints:\n  -{entry[4:]}")
    for words in (["check", "mine.yaml"], *([command, "suite.yaml"] for command in ("validate", "plan", "run"))):
        code, _, error = rdiff(*words)
        assert (code, error.count("\n")) == (2, 1) and "add --allow-download" in error and ".yaml:" in error, error
    assert not server.asked and not Path("reports").exists()
    code, shown, error = rdiff("validate", "suite.yaml", "--allow-download")
    assert (code, error, server.asked) == (0, "", ["/zoo.safetensors"])
    server.bodies.clear()
    code, shown, error = rdiff("check", "mine.yaml")
    assert code == 0 and "fetched" in shown and digest in shown, error
    text = Path("suite.yaml").read_text()
    Path("suite.yaml").write_text(text.replace("zoo.safetensors", "other.safetensors"))
    server.bodies["/other.safetensors"] = zoo.read_bytes()
    monkeypatch.setenv("RDIFF_ALLOW_DOWNLOAD", "1")
    assert rdiff("plan", "suite.yaml")[0] == 0
    assert server.asked == ["/zoo.safetensors", "/other.safetensors"]
