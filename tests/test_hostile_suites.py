"""Suites and entries that attack: exit code 2 and one line, in bounded time and memory, and nothing runs."""

import contextlib
import io
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from robustbench_diffaug import cli, document
from robustbench_diffaug.document import DEEPEST, LARGEST, NODES, parse

HEAD = "name: a\nbenches: []\ncheckpoints: "
TAGS = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object/apply:builtins.eval [\"open('{canary}', 'w')\"]",
    "!!python/object/apply:subprocess.Popen [[touch, '{canary}']]",
    "!!python/object:pathlib.PosixPath {{_str: '{canary}'}}",
    "!!python/module:antigravity ''",
    "!!python/name:os.system ''",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "!!binary aGk=",
    "!!set {{a, b}}",
    "!!timestamp 2020-01-01",
    "!!omap [a: 1]",
    "!include /etc/passwd",
    "! plain",
)


def bombs() -> Iterator[tuple[str, str]]:
    """Texts that grow when they are read."""
    for name, form in {"laughs": "[{}]", "keys": "{{k: [{}]}}", "merges": "{{<<: [{}]}}"}.items():
        lines = ["a: &a {x: 1, y: 2}"]
        lines += [
            f"{chr(98 + i)}: &{chr(98 + i)} " + form.format(", ".join([f"*{chr(97 + i)}"] * 9)) for i in range(12)
        ]
        yield name, "\n".join(lines)
    chain = "\n".join([f"a0: &a0 [x]\n{''.join(f'a{i}: &a{i} [*a{i - 1}]{chr(10)}' for i in range(1, 3000))}"])
    yield "chain-of-anchors", chain
    yield "itself", "a: &a [*a]"
    yield "itself-merged", "a: &a {<<: *a}"
    yield "itself-key", "&a {*a : 1}"


def texts() -> Iterator[tuple[str, str]]:
    """Texts by name."""
    for index, tag in enumerate(TAGS):
        yield f"tag-{index}", HEAD + tag
        yield f"tag-below-{index}", f"kind: timm\nid: a\nweights: {{uri: {tag}}}"
    yield from bombs()
    deep = {"flow": "[", "mapping": "{a: ", "block": "- ", "keys": "? ", "both": "[{a: ", "quotes": "- - ? - "}
    for name, opening in deep.items():
        yield f"deep-{name}", opening * 10_000
        yield f"deeper-than-allowed-{name}", opening * DEEPEST * 2
    yield "values", "[" + "a," * NODES * 4 + "]"
    yield "anchors", "\n".join(f"- &a{i} x" for i in range(NODES))
    yield "keys-twice", "name: a\nname: b"
    yield "keys-twice-below", f"{HEAD}[{{id: a, id: b}}]"
    yield "keys-of-lists", "? [a, b]\n: c"
    yield "keys-of-mappings", "{{a: b}: c}"
    yield "integer", "name: a\nseed: " + "9" * 100_000
    yield "integer-hexadecimal", "name: a\nseed: 0xffffffffffffffff"
    yield "integer-underscores", "seed: " + "1_" * 50_000 + "1"
    for index, number in enumerate(("1e999", "-.inf", ".nan", "1." + "9" * 100_000, "1e" + "9" * 100_000, "-1", "1.5")):
        yield f"number-{index}", f"name: a\nseed: {number}"
    yield "text", "name: " + "a" * 500_000
    yield "text-as-key", "a" * 500 + ": 1"
    yield "text-as-long-key", "? " + "a" * 500_000 + "\n: 1"
    yield "text-of-controls", 'name: "\\0\\a\\e[31m\\x1b]0;x\\a\\n\\u2028"'
    yield "text-of-surrogates", 'name: "\\ud800"'
    yield "kind-of-surrogates", HEAD + '[{kind: "\\udfff", id: a}]'
    yield "kind-unknown", HEAD + "[{kind: " + "k" * 100_000 + "}]"
    for index, kind in enumerate(
        ("os:system", "builtins:eval", "antigravity:x", "local", "a:b:c", ":", "..:x", "torchscript")
    ):
        yield f"kind-{index}", HEAD + f"[{{kind: '{kind}', id: a, classes: 2, file: x.py, function: y}}]"
    for index, uri in enumerate(
        (
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            "/",
            "..",
            "",
            "~nobody-here/x",
            "rdiff:../../x",
            "a\\0b",
            "x" * 5000,
        )
        + ("https://192.0.2.1/w", "file:///etc/passwd", "timm:resnet18", "\\ud800", "/dev/full", "$HOME/x", "|touch x")
    ):
        yield f"weights-{index}", f'kind: timm\nid: a\narch: resnet18\nclasses: 2\nweights: "{uri}"'
        yield (
            f"suite-weights-{index}",
            HEAD.replace("[]", "[{name: a, evaluator: {kind: shift}, datasets: [{kind: mnist5k}]}]")
            + (f'[{{kind: timm, id: a, arch: resnet18, classes: 10, weights: "{uri}"}}]'),
        )
    for index, plain in enumerate(
        ("", "a", "[]", "[a]", "null", "3", "--- a\n--- b", "%YAML 9.9\n---\na", "\t", "a: b: c", "*a", "|", "&a", "%")
    ):
        yield f"plain-{index}", plain


def contents(canary: Path) -> dict[str, bytes]:
    """The bytes of files by name."""
    found = {name: text.replace("{canary}", str(canary)).encode("utf-8", "surrogatepass") for name, text in texts()}
    found |= {
        f"bytes-{index}": content
        for index, content in enumerate((b"\0", b"\xff\xfe", b"\xc0\x80", b"name: \xff", b"\x7fELF"))
    }
    found["utf-16"] = "name: a".encode("utf-16")
    found["utf-32"] = "name: a".encode("utf-32")
    found["two-marks"] = b"\xef\xbb\xbf\xef\xbb\xbfname: a"
    found["pickle"] = b"\x80\x02cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    found["too-large"] = b"#" * (LARGEST + 1)
    return found


def places(folder: Path) -> Iterator[Path]:
    """Paths that are no files."""
    for name in ("pipe", "folder", "loop", "dangling", "zero", "memory", "link-to-pipe"):
        path = folder / f"{name}.yaml"
        if name == "pipe":
            os.mkfifo(path)
        elif name == "folder":
            path.mkdir()
        else:
            to = {"loop": path.name, "zero": "/dev/zero", "memory": "/proc/self/mem", "link-to-pipe": "pipe.yaml"}
            path.symlink_to(to.get(name, "nowhere"))
        yield path


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("ten seconds are over")


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends what waits for ever."""
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def wrong(words: list[str], path: Path) -> str:
    """What is wrong with the answer to a command; empty for code 2 and one line that names the file."""
    errors, began = io.StringIO(), time.process_time()
    try:
        with alarm(60), contextlib.redirect_stderr(errors):
            cli.main(words)
        code: object = None
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    lines = errors.getvalue().splitlines()
    if code != 2 or len(lines) != 1 or not lines[0].startswith("rdiff: ") or "a fault of rdiff" in lines[0]:
        return f"code {code}, {errors.getvalue()[:600]!r}"
    if len(lines[0]) > 2100 or not lines[0].isprintable() or path.name not in lines[0]:
        return f"an odd line: {lines[0][:600]!r}"
    seconds = time.process_time() - began  # of this process, however many others there are
    return f"{seconds:.0f} seconds" if seconds > 10 else ""


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What is imported late takes longer than any file."""
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(["plan", "smoke"])


def test_hostile_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """As a suite, as more checkpoints, and alone: each in one of these ways in turn, with --full in all."""
    monkeypatch.chdir(tmp_path)
    canary, path = tmp_path / "canary", tmp_path / "mine.yaml"
    found, largest = contents(canary), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(found) >= 120
    odd = []
    ways = (["validate", "mine.yaml"], ["validate", "smoke", "--with", "mine.yaml"], ["check", "mine.yaml"])
    for index, (name, content) in enumerate(found.items()):
        path.write_bytes(content)
        for words in ways if full else (ways[index % 3],):
            if complaint := wrong(words, path):
                odd.append(f"{name}, {' '.join(words)}: {complaint}")
    assert not odd, "\n".join(odd)
    assert not canary.exists() and sorted(each.name for each in tmp_path.iterdir()) == ["mine.yaml"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 2**20  # KiB


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = []
    for path in places(tmp_path):
        for words in (
            ["validate", path.name],
            ["plan", path.name],
            ["validate", "smoke", "--with", path.name],
            ["check", path.name],
            ["train", path.name],
            ["corrupt", path.name, "-o", "copy"],
        ):
            if complaint := wrong(words, path):
                odd.append(f"{' '.join(words)}: {complaint}")
    assert not odd, "\n".join(odd)


def test_hostile_locks_of_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder may come from anybody."""
    monkeypatch.chdir(tmp_path)
    lock = tmp_path / "run/suite.lock.yaml"
    lock.parent.mkdir()
    (lock.parent / "manifest.json").write_text("{}")
    odd = []
    for name, content in contents(tmp_path / "canary").items():
        if name.startswith(("deep-", "tag-0", "itself", "bytes")):
            lock.write_bytes(content)
            for words in (["plan", "smoke", "-o", "run"], ["report", "run"]):
                if complaint := wrong(words, lock):
                    odd.append(f"{name}, {' '.join(words)}: {complaint}")
    assert not odd, "\n".join(odd)
    assert not (tmp_path / "canary").exists()


def test_weights_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a suite and alone; a pipe must not be waited for, nor a device be read to its end."""
    monkeypatch.chdir(tmp_path)
    odd = []
    for path in places(tmp_path):
        for kind in ("timm", "torchvision"):
            entry = f"kind: {kind}\nid: a\narch: resnet18\nclasses: 10\nweights: {path.name}"
            Path("entry.yaml").write_text(entry)
            for words in (["check", "entry.yaml"], ["validate", "smoke", "--with", "entry.yaml"]):
                if complaint := wrong(words, path):
                    odd.append(f"{path.name}, {' '.join(words)}: {complaint}")
    assert not odd, "\n".join(odd)


def test_only_so_many_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "NODES", 10)
    assert parse("[" + "a," * 9 + "]")[0] == ["a"] * 9
    with pytest.raises(ValueError, match=r"^2: holds more than 10 values, which no suite needs$"):
        parse("[\n" + "a," * 10 + "]")


def test_a_byte_order_mark_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors of Windows write one, with their line ends."""
    suite = Path(__file__).parent.parent / "suites/smoke.yaml"
    (tmp_path / "suite.yaml").write_bytes(b"\xef\xbb\xbf" + suite.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", "suite.yaml"])
    assert caught.value.code == 0
