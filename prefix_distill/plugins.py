"""Load the modules that ``--plugin`` names: a Python file, or an installed entry point.

A plugin registers divergences and prefix schedules (``maths.registered``) when it is imported. It
is one file: its SHA-256 and a copy go into the run folder.
"""

import functools
import hashlib
import inspect
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GraderError, PluginError, Stopped, UserError
from .files import describe_special
from .maths.formulas import DIVERGENCES, Divergence
from .maths.registry import PROGRAM, describe_error, registering
from .maths.schedule import SCHEDULES

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "prefix_distill.plugins"  # entry points


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A loaded plugin. ``name``: as given on the command line; ``source``: its file's text."""

    name: str
    file: Path
    source: bytes
    divergences: dict[str, Divergence]
    schedules: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    def describe(self) -> str:
        """Return the plugin, its hash and what it registers, in one line."""
        registered = [f"--divergence {name}" for name in self.divergences]
        registered += [f"--prefix {name}" for name in self.schedules]
        return f"plugin {self.name} (sha256 {self.sha256[:12]}): {', '.join(registered)}"

    def activate(self) -> None:
        """Register the plugin's names. UserError: another plugin uses one of them."""
        with registering(str(self.file)):
            for name, divergence in self.divergences.items():
                DIVERGENCES.add(name, divergence)
            for name, schedule in self.schedules.items():
                SCHEDULES.add(name, schedule)


_loaded: dict[tuple[str, bytes], Plugin] = {}  # by file and text: a file is executed once
_active: list[str] = []  # files whose names are registered


def load_plugins(text: str | None) -> tuple[Plugin, ...]:
    """Load the plugins of a comma-separated list, and register only their names.

    Names of other plugins are removed. UserError, with the file and the line: a plugin is missing,
    cannot be imported, registers nothing, or registers a name that is in use.
    """
    _forget()
    names = [name.strip() for name in (text or "").split(",")]
    plugins = []
    for name in dict.fromkeys(filter(None, names)):
        file, entry = _locate(name)
        if str(file) in _active:
            continue
        _active.append(str(file))
        plugins.append(_load(name, file, entry))
    return tuple(plugins)


def find_unfiled(divergence: str, prefix: str) -> tuple[Plugin, ...]:
    """Return what this program itself registered under the names that a run uses.

    A notebook registers functions in a cell. Their text stands for the file of a plugin; it is
    empty if Python does not have it.
    """
    unfiled = []
    name = divergence.partition(":")[0]
    entry = DIVERGENCES.find(name)
    if entry is not None and DIVERGENCES.source(name) == PROGRAM:
        source = _read_source([entry.value, entry.gradient])
        unfiled.append(_unfiled(f"divergence-{name}", source))
    name = prefix.partition(":")[0]
    schedule = SCHEDULES.find(name)
    if isinstance(schedule, functools.partial) and SCHEDULES.source(name) == PROGRAM:
        source = _read_source([schedule.args[-1]])
        unfiled.append(_unfiled(f"prefix-{name}", source))
    return tuple(unfiled)


def _unfiled(name: str, source: bytes) -> Plugin:
    return Plugin(name=name, file=Path(f"{name}.py"), source=source, divergences={}, schedules={})


def _read_source(functions: list[Any]) -> bytes:
    """Return the text of functions; empty if it is not known."""
    texts = []
    for function in functions:
        if function is not None:
            try:
                texts.append(inspect.getsource(function))
            except (OSError, TypeError):  # typed at a prompt, or an instance of a class
                return b""
    return "\n".join(texts).encode()


def _forget() -> None:
    """Remove the names of all plugins from the registries."""
    for file in _active:
        DIVERGENCES.drop(file)
        SCHEDULES.drop(file)
    _active.clear()


def _locate(name: str) -> tuple[Path, "EntryPoint | None"]:
    """Return the file of a plugin, and its entry point if it is an installed one."""
    if name.endswith(".py") or Path(name).is_file():
        return Path(name).absolute(), None
    from importlib.metadata import entry_points  # imported here, because it slows --help

    installed = entry_points(group=GROUP)
    for entry in installed:
        if entry.name == name:
            return _file_of(entry), entry
    known = ", ".join(sorted(installed.names)) or "none"
    raise UserError(
        f"plugin '{name}': expected a .py file, or an entry point of the group {GROUP} "
        f"(installed: {known}); check --plugin"
    )


def _file_of(entry: "EntryPoint") -> Path:
    """Return the file of an entry point's module."""
    from importlib.util import find_spec

    try:
        spec = find_spec(entry.module)
    except (ImportError, ValueError) as error:
        raise UserError(f"plugin '{entry.name}': {entry.module} has no module: {error}") from None
    if spec is None or spec.origin is None:
        raise UserError(
            f"plugin '{entry.name}': the module {entry.module} has no file; reinstall its package"
        )
    return Path(spec.origin)


def _load(name: str, file: Path, entry: "EntryPoint | None") -> Plugin:
    """Import a plugin, or register its names again if this process has imported it before."""
    special = describe_special(file)
    if special is not None:
        raise UserError(f"plugin {name}: expected a .py file, got {special}; name a regular file")
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"plugin {name}: cannot be read ({error.strerror}); check --plugin (a run folder keeps "
            "copies in plugins/)"
        ) from None
    known = _loaded.get((str(file), source))
    if known is not None:
        known.activate()
        return known
    try:
        with registering(str(file)):
            _execute(file, source, entry)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may also exit
        raise UserError(f"plugin {describe_error(error, str(file))}") from None
    plugin = Plugin(
        name=name,
        file=file,
        source=source,
        divergences=DIVERGENCES.entries_of(str(file)),
        schedules=SCHEDULES.entries_of(str(file)),
    )
    if not plugin.divergences and not plugin.schedules:
        raise UserError(
            f"plugin {name}: it registers no divergence and no prefix schedule; call "
            "register_divergence or register_schedule in it"
        )
    _loaded[str(file), source] = plugin
    return plugin


def _execute(file: Path, source: bytes, entry: "EntryPoint | None") -> None:
    """Run a plugin's code: of an entry point as an import, else the text that was read."""
    if entry is not None:
        entry.load()
        return
    module = types.ModuleType(f"prefix_distill_plugin_{hashlib.sha256(source).hexdigest()[:12]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    # compiled here, so that the text that runs is the text that is hashed
    exec(compile(source, str(file), "exec"), module.__dict__)


def find_fault(error: BaseException) -> str | None:
    """Describe an error that a plugin's code caused, in one line; None: no plugin is at fault."""
    if isinstance(error, GraderError):
        return str(error)
    if isinstance(error, PluginError):
        return f"plugin {error}"
    if isinstance(error, UserError | Stopped | KeyboardInterrupt):
        return None
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    for file in reversed(files):
        if file in _active:
            return f"plugin {describe_error(error, file)}"
    return None
