"""Runs joined into one: which benches share columns, which checkpoints a row, and where the records of each lie."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from robustbench_diffaug.boards.agreement import Agreement, agreement
from robustbench_diffaug.boards.folders import Folder
from robustbench_diffaug.boards.sides import Side, checkpoints, imports
from robustbench_diffaug.engine import cells
from robustbench_diffaug.protocols import Difference, benches, merged, unlike
from robustbench_diffaug.records import Records
from robustbench_diffaug.store import Cell, Store
from robustbench_diffaug.suite import Suite

__all__ = ["Column", "Joined", "Source", "Spread", "join"]

SEPARATE = "--separate shows them apart"


class Source(NamedTuple):
    """Where the figures of a checkpoint in a bench are from: a run, its name of the bench, its id of the checkpoint."""

    folder: Folder
    bench: str
    id: str


@dataclass
class Column:
    """Benches of several runs that are of one protocol, and share the columns of the board.

    Arguments:
        named: What they are called in the first run.
        sides: The runs, each with its name of the bench.
        name: What the board calls them.
    """

    named: str
    sides: list[Side]
    name: str = ""

    @property
    def measured(self) -> bool:
        """Whether there are records."""
        return self.sides[0].folder.run is not None

    def of(self, folder: Folder) -> str | None:
        """A run's name of the bench."""
        return next((side.bench for side in self.sides if side.folder is folder), None)


@dataclass
class Network:
    """A checkpoint of several runs that is one network, and has one row of the board."""

    id: str
    folders: list[Folder]
    name: str = ""


@dataclass(frozen=True)
class Spread(Store):
    """The records of several run folders, found by the names that a board has for benches and checkpoints.

    Arguments:
        places: The run of each bench and checkpoint, and its own cells by dataset.
    """

    places: Mapping[tuple[str, str], tuple[Store, Mapping[str, Cell]]] = field(default_factory=dict)

    def read(self, cells: Iterable[Cell], whole: bool = False) -> Records:
        """As of the run that holds the records."""
        found = [self._own(cell) for cell in cells]
        return found[0][0].read([cell for _, cell in found], whole)

    def costs(self, cell: Cell) -> list[dict[str, Any]]:
        """As of the run that holds the records."""
        store, own = self._own(cell)
        return store.costs(own)

    def _own(self, cell: Cell) -> tuple[Store, Cell]:
        store, own = self.places[cell.bench, cell.checkpoint.id]
        return store, own[cell.dataset.name]


@dataclass(frozen=True, eq=False)
class Joined:
    """Runs as one.

    Arguments:
        suite: The checkpoints and benches of all that have records, under the names of the board.
        store: Their records.
        columns: The benches, imported ones too.
        sources: Where the figures of each bench and checkpoint are from, imported ones too.
        names: The board's name of each checkpoint of each run.
        notices: What a reader must know of what was joined.
    """

    suite: Suite
    store: Spread
    columns: list[Column]
    sources: dict[tuple[str, str], Source]
    names: dict[tuple[Folder, str], str]
    notices: list[str]


def join(folders: Sequence[Folder], separate: bool) -> Joined:
    """Joins runs.

    Benches that have one name must be of one protocol, and checkpoints of one id the same network, with the same
    records where a bench of several runs has them. Benches of one protocol share columns, whatever their names.

    Arguments:
        folders: The runs, in the order of their labels.
        separate: Whether what differs is shown apart, under names with the labels of its runs, and not refused.

    Raises:
        ValueError: If what has one name differs; the first field that does is named, and both runs.
    """
    columns, networks, notices = _columns(folders, separate), _networks(folders, separate), list[str]()
    for column in columns:  # of which there may be more, as they are found to differ
        for side, odd in list(_apart(column)) if column.measured else ():
            if not separate:
                raise ValueError(f"{odd}; {SEPARATE}")
            column.sides.remove(side)
            columns.append(Column(column.named, [side]))
    for column in (column for column in columns if column.measured):
        for network in tuple(networks):
            compared = _agree(column, network)
            notices += [compared.said] if compared.said else []
            if compared.wrong:
                if not separate:
                    raise ValueError(f"{compared.wrong}; {SEPARATE}")
                networks[networks.index(network) : networks.index(network) + 1] = [
                    Network(network.id, [folder]) for folder in network.folders
                ]
    _name(columns, networks)
    sources: dict[tuple[str, str], Source] = {}
    for column in columns:
        for network in networks:
            found = [(_size(source), source) for source in _holding(column, network)]
            if found:  # of equal records those of the run that has most
                sources[column.name, network.name] = max(found, key=lambda each: each[0])[1]
        notices += [
            f"{column.name}: {side.folder.label} calls this bench {side.bench}"
            for side in column.sides
            if side.bench != column.named
        ]
    names = {(folder, network.id): network.name for network in networks for folder in network.folders}
    return Joined(*_united(columns, networks, sources), columns, sources, names, notices)


def _columns(folders: Sequence[Folder], separate: bool) -> list[Column]:
    found: list[Column] = []
    for folder in folders:
        sides = [Side(folder, name) for name in _benches(folder)]
        for side in sorted(sides, key=lambda side: not any(side.bench == column.named for column in found)):
            named = [column for column in found if column.named == side.bench]
            free = [column for column in found if column not in named and column.of(folder) is None]
            apart = [_unlike(column.sides[0], side) for column in named]
            if None in apart:
                named[apart.index(None)].sides.append(side)
            elif named and not separate:
                assert apart[0] is not None
                raise ValueError(_refusal(apart[0], named[0].sides[0].folder, folder))
            elif not named and (twin := next((c for c in free if _unlike(c.sides[0], side) is None), None)):
                twin.sides.append(side)
            else:
                found.append(Column(side.bench, [side]))
    return found


def _refusal(odd: Difference, one: Folder, other: Folder) -> str:
    return f"these runs cannot share a board: {odd.said(one.root, other.root)}; {SEPARATE}"


def _benches(folder: Folder) -> list[str]:
    if folder.run:
        return [bench.name for bench in folder.run.suite.benches]
    return [str(name) for name in folder.imported["bench"].unique()]


def _unlike(one: Side, other: Side) -> Difference | None:
    """The first field in which two benches differ; None where they are of one protocol."""
    mine, theirs = (side.folder.run is not None for side in (one, other))
    if mine != theirs:
        words = {True: "measured, with records", False: "imported, without records"}
        return Difference(f"benches.{one.bench}", words[mine], words[theirs])
    if mine:
        return next(benches(one.measured, other.measured), None)
    if one.bench != other.bench:
        return Difference("benches", one.bench, other.bench)
    return next(imports(one.folder, other.folder, one.bench), None)


def _networks(folders: Sequence[Folder], separate: bool) -> list[Network]:
    found: list[Network] = []
    for folder in folders:
        for id in _ids(folder):
            named = [network for network in found if network.id == id]
            apart = [next(checkpoints(network.folders[0], folder, id), None) for network in named]
            if folder.run is None:  # of an import nobody knows which network it is
                apart = [Difference(f"checkpoints.{id}", "of this id", "imported, and may be another") for _ in named]
            elif any(network.folders[0].run is None for network in named):
                apart = [Difference(f"checkpoints.{id}", "imported, and may be another", "of this id") for _ in named]
            if None in apart:
                named[apart.index(None)].folders.append(folder)
            elif named and not separate:
                assert apart[0] is not None
                said = apart[0].said(named[0].folders[0].root, folder.root)
                raise ValueError(f"one id, two networks: {said}; {SEPARATE}")
            else:
                found.append(Network(id, [folder]))
    return found


def _ids(folder: Folder) -> list[str]:
    if folder.run:
        return [entry.id for entry in folder.run.suite.checkpoints]
    return [str(name) for name in folder.imported["checkpoint"].unique()]


def _name(columns: Sequence[Column], networks: Sequence[Network]) -> None:
    """Gives what shares a name the labels of its runs.

    Raises:
        ValueError: If two have one name even so.
    """
    for column in columns:
        labels = "+".join(side.folder.label for side in column.sides)
        single = [each.named for each in columns].count(column.named) == 1
        column.name = column.named if single else f"{column.named}@{labels}"
    for network in networks:
        labels = "+".join(folder.label for folder in network.folders)
        single = [each.id for each in networks].count(network.id) == 1
        network.name = network.id if single else f"{network.id}@{labels}"
    for what, names in (
        ("benches", [each.name for each in columns]),
        ("checkpoints", [each.name for each in networks]),
    ):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two {what} of the board would be called {twice[0]!r}; rename the folder of one run")


def _holding(column: Column, network: Network) -> Iterator[Source]:
    """The runs that have a checkpoint in a bench."""
    for folder in network.folders:
        bench = column.of(folder)
        if bench is None:
            continue
        if folder.run is None:
            rows = folder.imported
            there = ((rows["bench"] == bench) & (rows["checkpoint"] == network.id)).any().item()
        else:
            chosen = Side(folder, bench).measured.found.chosen(folder.run.suite.checkpoints)
            there = any(entry.id == network.id for entry in chosen)
        if there:
            yield Source(folder, bench, network.id)


def _cells(source: Source) -> list[Cell]:
    """A run's own cells of a checkpoint in a bench."""
    run = source.folder.run
    assert run is not None
    bench = next(bench for bench in run.bare.benches if bench.name == source.bench)
    return [cell for _, row in cells(run.bare, bench) for cell in row if cell.checkpoint.id == source.id]


def _size(source: Source) -> int:
    """How many samples a run has recorded, as the names of the files say; 0 of an import."""
    run = source.folder.run
    if run is None:
        return 0
    return sum(last - first + 1 for cell in _cells(source) for first, last, _ in run.archive.files(cell))


def _read(source: Source, whole: bool = False) -> Records:
    assert source.folder.run is not None
    return source.folder.run.archive.read(_cells(source), whole)


def _apart(column: Column) -> Iterator[tuple[Side, str]]:
    """The runs in which samples have not the pixels or the label that they have in the first, and what differs."""
    if len(column.sides) < 2:
        return
    first: tuple[Side, Records] | None = None
    for side in column.sides:
        chosen = side.measured.found.chosen(side.measured.run.suite.checkpoints)
        source = max((Source(side.folder, side.bench, entry.id) for entry in chosen), key=_size, default=None)
        if source is None or not len(found := _read(source)):
            continue
        if first is None:
            first = side, found
        elif odd := unlike(first[1], found):
            there = f"{first[0].folder.root} and {side.folder.root}"
            yield side, f"these runs cannot share a board: benches.{column.named}: {odd} differs between {there}"


def _agree(column: Column, network: Network) -> Agreement:
    """How the records of one checkpoint in several runs compare with those of the first of them."""
    sources, said = list(_holding(column, network)), list[str]()
    kept = _read(sources[0], whole=True) if len(sources) > 1 else None
    for source in sources[1:]:
        found = _read(source, whole=True)
        if kept is None or not len(kept) or not len(found):
            continue
        there = f"{sources[0].folder.root} and {source.folder.root}"
        compared = agreement(kept, found)
        if compared.wrong:
            what = f"the records of {network.id} in bench {column.named} do not agree"
            return Agreement(f"{what}: {compared.wrong} differs between {there}")
        if compared.said:
            labels = f"{sources[0].folder.label} and {source.folder.label}"
            said.append(f"{column.named}: the records of {network.id} in {labels} differ in {compared.said}")
    return Agreement(said="; ".join(said))


def _united(
    columns: Sequence[Column], networks: Sequence[Network], sources: Mapping[tuple[str, str], Source]
) -> tuple[Suite, Spread]:
    """One suite of all that has records, and where these are."""
    entries, benches, places = [], [], {}
    for network in networks:
        if (run := network.folders[0].run) is not None:
            entry = next(entry for entry in run.suite.checkpoints if entry.id == network.id)
            entries.append(entry.model_copy(update={"id": network.name}))
    for column in (column for column in columns if column.measured):
        first = column.sides[0]
        evaluator = first.measured.found.evaluator
        for side in column.sides[1:]:
            evaluator = merged(evaluator, side.measured.found.evaluator)
        datasets = next(bench.datasets for bench in first.measured.run.bare.benches if bench.name == first.bench)
        ids = tuple(name for bench, name in sources if bench == column.name)
        names = {"name": column.name, "evaluator": evaluator, "datasets": datasets, "checkpoints": ids}
        benches.append(first.measured.found.model_copy(update=names))
        for id in ids:
            source = sources[column.name, id]
            assert source.folder.run is not None
            own = {cell.dataset.name: cell for cell in _cells(source)}
            places[column.name, id] = (source.folder.run.archive, own)
    runs = [side.measured.run for column in columns if column.measured for side in column.sides]
    suites = list(dict.fromkeys(run.suite.name for run in runs)) or ["board"]
    # Not validated: the names of a board are longer than those of a suite.
    rows, seed = tuple(entries), runs[0].suite.seed if runs else 0
    suite = Suite.model_construct(name=" + ".join(suites), seed=seed, checkpoints=rows, benches=tuple(benches))
    root = runs[0].root if runs else columns[0].sides[0].folder.root
    return suite, Spread(root, places)
