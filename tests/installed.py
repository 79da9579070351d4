"""Packages with entry points, as an installer leaves them, for tests of plug-ins."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from robustbench_diffaug import component

Install = Callable[..., None]


def install(folder: Path, name: str, points: Mapping[str, Mapping[str, str]], source: str = "") -> None:
    """Writes a package of one module and what importlib.metadata reads of it.

    Arguments:
        folder: On the path of Python.
        name: Of the package and, with underscores, of its module; its version is 2.5.
        points: The entry points by family, as {"evaluators": {"shake": "module:Class"}}.
        source: Of the module.
    """
    told = folder / f"{name.replace('-', '_')}-2.5.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
    sections = (
        f"[robustbench_diffaug.{family}]\n" + "".join(f"{kind} = {value}\n" for kind, value in each.items())
        for family, each in points.items()
    )
    (told / "entry_points.txt").write_text("\n".join(sections))
    (folder / f"{name.replace('-', '_')}.py").write_text(source)


@contextmanager
def installing(folder: Path) -> Iterator[Install]:
    """`install` into a folder that Python looks into, forgotten afterwards."""

    def call(name: str, points: Mapping[str, Mapping[str, str]], source: str = "") -> None:
        install(folder, name, points, source)
        component.offers.cache_clear()
        importlib.invalidate_caches()

    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            yield call
        finally:
            component.offers.cache_clear()
            for name in set(sys.modules) - before:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
                    del sys.modules[name]
