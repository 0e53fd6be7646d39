"""Silence the libraries during a call and restore their settings after it; name memory errors."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

from .. import plugins
from ..display import phase
from ..errors import MemoryShortage, Stopped, UserError

LOADING = "loading libraries"  # a phase: these imports take seconds
OUT_OF_MEMORY = "out of memory; free memory on the device, or use dtype bfloat16 or a smaller model"


def hide_deprecations() -> None:
    """Hide FutureWarning and DeprecationWarning, which a user cannot act on.

    They report uses of old names by this package or by a library. Python's own ``-W``, ``-X dev``
    and ``PYTHONWARNINGS`` still show them or turn them into errors.
    """
    if sys.warnoptions:
        return
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def quiet_libraries() -> None:
    """Import transformers and switch off the messages and progress bars of the libraries."""
    with phase(LOADING):
        import transformers

    hide_deprecations()  # again, because the import may add filters before ours
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class _Silence:
    """The settings of the libraries, saved by the outermost of several nested calls.

    Calls in several threads run one after another. While transformers builds a network it replaces
    functions and the default dtype of torch for the whole process, so two at once would leave them
    replaced.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.restore = contextlib.ExitStack()

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Hold the lock and keep the libraries silent."""
        with self.lock:
            if self.depth == 0:
                self._save()
                quiet_libraries()
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.restore.close()

    def _save(self) -> None:
        self.restore.enter_context(warnings.catch_warnings())
        # in a notebook without ipywidgets, importing tqdm would print this
        warnings.filterwarnings("ignore", "IProgress not found")
        with phase(LOADING):
            import transformers
            from datasets.utils import logging as datasets_logging
            from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

        bars = transformers.utils.logging
        hub = logging.getLogger("huggingface_hub")
        self.restore.callback(hub.setLevel, hub.level)
        self.restore.callback(transformers.logging.set_verbosity, bars.get_verbosity())
        self.restore.callback(datasets_logging.set_verbosity, datasets_logging.get_verbosity())
        if datasets_logging.is_progress_bar_enabled():
            self.restore.callback(datasets_logging.enable_progress_bar)
        if are_progress_bars_disabled():
            self.restore.callback(disable_progress_bars)
        if bars.is_progress_bar_enabled():
            self.restore.callback(bars.enable_progress_bar)


_silence = _Silence()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Silence the libraries; turn their memory errors, and the errors of plugins, into ours.

    One call at a time: other threads wait.

    MemoryShortage: a library ran out of memory. UserError: a plugin raised an exception or exited.
    """
    with phase(LOADING):
        from ..engine.device import is_out_of_memory

    with _silence.during():
        try:
            yield
        except (UserError, Stopped, KeyboardInterrupt):
            raise
        except BaseException as error:  # a plugin may also exit
            if isinstance(error, Exception) and is_out_of_memory(error):
                raise MemoryShortage(OUT_OF_MEMORY) from error
            fault = plugins.find_fault(error)
            if fault is not None:
                raise UserError(fault) from error
            raise
