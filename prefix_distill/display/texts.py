"""Write numbers as text: FLOPs, accuracies, times, divergences."""

PHASES = {"teacher_score": "teacher scoring", "teacher_text": "the teacher's text"}
NAMES = {"kl": "KL", "jsd": "JSD"}  # words of a divergence's name that are abbreviations


def flops_text(value: float) -> str:
    """Return a number of FLOPs with its unit: 1.5e12 → "1.5 TFLOP"."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def accuracy_text(score: dict | None) -> str:
    """Return an accuracy {value, low, high, n} as text, in percent."""
    if score is None:
        return "–"
    return f"{score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}] of {score['n']}"


def time_text(seconds: float) -> str:
    """Return a duration in its two largest units: "12 s", "4 min", "1 h 20 min"."""
    if seconds < 59.5:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def elapsed_text(seconds: float) -> str:
    """Return a duration to the second: "12 s", "4 min 3 s", "1 h 20 min 5 s"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min {rest} s"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{rest} s"


def short_time_text(seconds: float) -> str:
    """Return a duration in one unit, for tables: "45 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{number_text(seconds)} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun: "1 step", "2,000 steps"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"


def memory_text(size: float) -> str:
    """Return a number of bytes with three digits and its unit: "19.5 GiB", "6.02 MiB"."""
    if size >= 1000 * 2**20:
        return f"{size / 2**30:.3g} GiB"
    if size >= 1000 * 2**10:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / 2**10:.3g} KiB"


def phase_text(phase: str) -> str:
    """Return the phase of a run in words: "student_update" → "student update"."""
    return PHASES.get(phase, phase.replace("_", " "))


def share_text(value: float) -> str:
    """Return a share in percent: 0.895 → "89.5%"."""
    return f"{value:.1%}"


def percent_text(share: float) -> str:
    """Return how much of a work is done, in whole percent; 100% only when all of it is."""
    return f"{int(100 * share)}%"


def number_text(value: float) -> str:
    """Return a number with two significant digits, without an exponent from 0.0001 on."""
    if abs(value) >= 9.95:
        return f"{value:.0f}"
    return f"{value:.2g}"


def divergence_name(column: str) -> str:
    """Return the name of a divergence from its metric: loss/reverse_kl_nats → "reverse KL"."""
    words = column.removeprefix("loss/").removesuffix("_nats").split("_")
    return " ".join(NAMES.get(word, word) for word in words)


def find_divergence(row: dict) -> tuple[str, float]:
    """Return the name and the mean of a step's divergence, from its metrics row."""
    for column, value in row.items():
        if column.startswith("loss/") and column.endswith("_nats") and value is not None:
            return divergence_name(column), value
    raise ValueError("a metrics row has at least one divergence")
