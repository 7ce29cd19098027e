"""The modules in which plug-ins are: imports them, from files too, and tells which files they consist of."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout, suppress
from itertools import accumulate
from pathlib import Path
from types import ModuleType

from dist_train.outcome import UsageError

_INSTALLED = frozenset({"site-packages", "dist-packages"})

_NEVER_BESIDE = sys.stdlib_module_names | {"dist_train"}
"""Modules that a plug-in does not mean to import from its own folder."""

_ELSEWHERE = "{} was imported from {}, not from {}, beside the plug-in: rename one of them, or use a new process"

_folders: list[str] = []
"""The folders of plug-ins imported from files, the latest first; `sys.path` ends with them."""

_DIGEST, _FOLDER = "_dist_train_digest", "_dist_train_folder"
"""Attributes set in modules of a plug-in's folder when they are imported: the file's digest, and the folder."""


def plugin_module(place: str) -> ModuleType:
    """Return the module of a file or a dotted name. Raises UsageError if it cannot be imported."""
    try:
        with redirect_stdout(sys.stderr):  # scripts read what a command such as `config run-directory` prints
            return _import(place)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, SystemExit):  # of a script that parses the command line, or runs, as it is imported
            reason = f'it ends the program ({reason}): put what it runs below `if __name__ == "__main__":`'
        elif "no known parent package" in reason:
            reason = f"{reason}: name it package.module:NAME, in the folder that holds the package"
        raise UsageError(f"the plug-in {place} cannot be imported: {reason}", code="plugin-import") from error


def _import(place: str) -> ModuleType:
    if place == "__main__":  # which another process, and a resume, would not find
        raise ImportError("put it into a file, and name it FILE.py:NAME")
    if not place.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return importlib.import_module(place)
    path = os.path.abspath(place)
    name = f"{Path(path).stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        if not hasattr(sys.modules[name], _DIGEST):
            raise ImportError('it names itself while it is imported: train below `if __name__ == "__main__":`')
        return sys.modules[name]
    if not os.path.isfile(path):
        raise ImportError("there is no such file; if it has moved, set its new place")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    _let_import_beside(path)
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _note_imported(sys.modules.keys() - before, os.path.dirname(path))
    return module


def _note_imported(names: Collection[str], folder: str) -> None:
    """Note the digests of those of the modules `names` that are in the `folder` of the plug-in that imported them."""
    for name in names:
        if sys.modules[name] is sys.modules["__main__"]:  # as __mp_main__, which multiprocessing adds as it is imported
            continue
        file = Path(getattr(sys.modules[name], "__file__", None) or "")
        is_beside = file.suffix == ".py" and file.is_relative_to(folder) and not is_installed(file.relative_to(folder))
        if is_beside and name.partition(".")[0] not in _NEVER_BESIDE:
            vars(sys.modules[name]).update({_DIGEST: _digest(file), _FOLDER: folder})


def _let_import_beside(path: str) -> None:
    """Let the plug-in at `path` import the modules beside it, not those beside other plug-ins. Raises ImportError."""
    for other, file, beside in list(_taken_from_elsewhere(path)):
        if not any(Path(file).is_relative_to(folder) for folder in _folders):
            raise ImportError(_ELSEWHERE.format(other, file, beside))
        # another plug-in's, which keeps what it has imported
        for each in [each for each in sys.modules if each.partition(".")[0] == other.partition(".")[0]]:
            del sys.modules[each]
    if (folder := os.path.dirname(path)) not in sys.path or folder in _folders:
        _folders[:] = [folder, *(each for each in _folders if each != folder)]
        sys.path[:] = [*(each for each in sys.path if each not in _folders), *_folders]


def _taken_from_elsewhere(path: str) -> Iterator[tuple[str, str, str]]:
    """Yield each module beside the plug-in at `path` in whose place another one is imported, with that one's file."""
    paths, seen = [path], set[str]()
    while paths:
        for name in sorted(_imports(paths.pop()) - seen):
            seen.add(name)
            base = os.path.join(os.path.dirname(path), *name.split("."))
            beside = next(filter(os.path.isfile, (f"{base}/__init__.py", f"{base}.py")), None)
            if beside is None or name.partition(".")[0] in _NEVER_BESIDE:
                continue
            paths.append(beside)
            file = os.path.realpath(getattr(sys.modules.get(name), "__file__", None) or beside)
            is_own_package = Path(file).name == "__init__.py" and Path(path).is_relative_to(Path(file).parent)
            if not is_own_package and not _INSTALLED & set(Path(file).parts) and file != os.path.realpath(beside):
                yield name, file, beside


def _imports(path: str) -> set[str]:
    """Return the modules, and their packages, that the file at `path` may import, anywhere in it."""
    names: set[str] = set()
    with suppress(OSError, SyntaxError, ValueError):  # which are reported when it is imported
        for node in ast.walk(ast.parse(Path(path).read_bytes())):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    names.update(accumulate(f"{package}{alias.name}".split("."), "{}.{}".format))
    return names


def source_digests(places: Collection[str]) -> dict[str, str]:
    """Return the digests of the source files of the plug-ins at `places`, and of those beside them that they import.

    The keys are the files' paths, beginning with the name of the plug-in's folder; installed packages are left out.
    Raises UsageError if a plug-in imports a module that has been taken from another one's folder.
    """
    folders = {folder for place in places if (folder := _folder(plugin_module(place))) is not None}
    # by now it may have imported what is in functions, too
    for place in sorted(each for each in places if each.endswith(".py")):
        for taken in _taken_from_elsewhere(place):
            raise UsageError(_ELSEWHERE.format(*taken), code="plugin-import")
    found: dict[str, str] = {}
    # a script that trains may lie beside a plug-in, and is no part of it
    script = sys.modules["__main__"]
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) if module is not script else None
        for folder in folders:
            if file and file.endswith(".py") and Path(file).is_relative_to(folder):
                name = Path(file).relative_to(folder.parent)
                if not is_installed(name):  # the folder may hold a virtual environment
                    found[str(name)] = vars(module).get(_DIGEST) or _digest(Path(file))
    return dict(sorted(found.items()))


def _folder(module: ModuleType) -> Path | None:
    """Return the folder of a single-file module, or of its top-level package; None if it is installed."""
    top = sys.modules[module.__name__.partition(".")[0]]
    file = getattr(top, "__file__", None)
    return None if file is None or is_installed(file) else Path(file).parent


def is_installed(file: str | Path) -> bool:
    """Whether `file` is of an installed package."""
    return bool(_INSTALLED & set(Path(file).parts))


def forget_edited() -> None:
    """Let plug-ins be imported again, with what they import from their folder, if any of these files was edited."""
    folders = {folder for folder, _ in edited_files()}
    forgotten = {name.partition(".")[0] for name, module in _noted() if vars(module)[_FOLDER] in folders}
    for name in [each for each in sys.modules if each.partition(".")[0] in forgotten]:
        file = getattr(sys.modules.pop(name), "__file__", None) or ""
        if file.endswith(".py"):  # not a module that is bytecode alone
            # Python would take the old bytecode for that of a file of the same size edited within the same second.
            with suppress(OSError):
                os.unlink(importlib.util.cache_from_source(file))


def edited_files() -> Iterator[tuple[str, Path]]:
    """Yield each file that a plug-in consists of, and the plug-in's folder, if it was edited since it was imported."""
    for _, module in _noted():
        if (file := Path(str(module.__file__))).is_file() and _digest(file) != vars(module)[_DIGEST]:
            yield vars(module)[_FOLDER], file


def _noted() -> list[tuple[str, ModuleType]]:
    modules = ((name, each) for name, each in sys.modules.items() if isinstance(each, ModuleType))  # not all are
    return [(name, each) for name, each in modules if _FOLDER in vars(each)]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
