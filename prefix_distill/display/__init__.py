"""What a person sees while a command works: lines, tables, the live line, and the phases it names.

`phases`: what the program is doing, told from any layer. `screen`: the live line of a terminal, or
the lines of a log. `training`: the progress of one run. `observers`: the protocols of progress.
"""

from .lines import is_plain, is_rich, is_verbose, print_line, print_text, render_tables
from .observers import Observer, RankWarnings, Reporter, Terminal
from .pace import EVALUATION, SAVING, TAIL_PROBE, Outline
from .phases import Phase, close_phase, find_phase, listening, open_phase, phase
from .screen import RUNS, Screen, close_screens
from .summary import Summary, flags_text, lay_out, render_summary
from .texts import (
    accuracy_text,
    count_text,
    flops_text,
    memory_text,
    phase_text,
    short_time_text,
    time_text,
)
from .training import Display
from .wrapping import fit_text

__all__ = [
    "EVALUATION",
    "RUNS",
    "SAVING",
    "TAIL_PROBE",
    "Display",
    "Observer",
    "Outline",
    "Phase",
    "RankWarnings",
    "Reporter",
    "Screen",
    "Summary",
    "Terminal",
    "accuracy_text",
    "close_phase",
    "close_screens",
    "count_text",
    "find_phase",
    "fit_text",
    "flags_text",
    "flops_text",
    "is_plain",
    "is_rich",
    "is_verbose",
    "lay_out",
    "listening",
    "memory_text",
    "open_phase",
    "phase",
    "phase_text",
    "print_line",
    "print_text",
    "render_summary",
    "render_tables",
    "short_time_text",
    "time_text",
]
