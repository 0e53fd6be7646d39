"""Translate option names of transformers and TRL into our flags.

A name has the meaning that it has there (transformers 5, TRL 1.16). It becomes the same setting
under another name or with a converted value, or an error that says what to use instead.
`prefix-distill help migration` shows the table.
"""

import fnmatch
from dataclasses import dataclass, field

from ..errors import UserError, nearest
from .renamed import NEAR_IN_EVAL, ONLY_OF
from .spelling_tables import (
    ALREADY,
    BATCH,
    CONVERTED,
    DEPENDENT,
    EPOCHS,
    FALSE,
    FORMER,
    LISTS,
    LORA,
    OF_EVAL,
    OFF,
    PRIVATE,
    PROGRAM_SWITCHES,
    PUSH,
    REFUSED,
    RENAMED,
    REPOSITORY,
    RESUME,
    SWITCHES,
    TRUE,
    read_switch,
)

TARGETS = {**RENAMED, **FORMER, **OF_EVAL}


def hint(name: str) -> str | None:
    """Return what to use instead of a name without counterpart; None for any other name."""
    if name in REFUSED:
        return REFUSED[name]
    for pattern, advice in REFUSED.items():
        if "*" in pattern and fnmatch.fnmatch(name, pattern):
            return advice
    return None


def known(name: str) -> bool:
    """Return whether transformers or TRL have this name: it is translated, or refused by hint."""
    return name in {*TARGETS, *CONVERTED, *DEPENDENT} or hint(name) is not None


def _is_equal(value: str, expected: str) -> bool:
    """Return whether two values are the same number, the same truth value or the same word."""
    try:
        return float(value) == float(expected)
    except ValueError:
        words = {"true": TRUE, "false": FALSE}.get(expected, (expected,))
        return value.lower() in words


def _last_value(words: list[str], flag: str) -> str | None:
    """Return the last value that ``words`` give to ``flag``; None if they give none."""
    value = None
    for i, word in enumerate(words):
        if word == flag:
            value = next(iter(words[i + 1 :]), value)
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def translate(
    arguments: list[str], valued: set[str], switches: dict[str, str | None], world: int = 1
) -> tuple[list[str], list[str]]:
    """Return the arguments of a command in our flags, and a note on each translated option.

    ``valued``: the command's flags that take a value. ``switches``: its flags that take none, with
    their config key, if they have one. Our flags may also have underscores, and our switches may be
    followed by True or False. ``world``: number of ranks, unless --gpus gives it.

    UserError, one line for all: names that are unknown, or whose flag this command does not have,
    with the nearest known ones; names without counterpart; a value that cannot be converted. Two
    names for one flag are an error as well.
    """
    line = _Line(valued=valued, switches=switches, rest=list(arguments))
    while line.rest:
        line.translate_word()
    if len(line.errors) > 1:
        raise UserError("; ".join(f"({n}) {text}" for n, text in enumerate(line.errors, start=1)))
    if line.errors:
        raise UserError(line.errors[0])
    line.settle_batch(world)
    line.settle_epochs()
    line.settle_resume()
    line.settle_lora()
    line.settle_hub()
    return line.words, line.notes


@dataclass(kw_only=True)
class _Line:
    """A command line during its translation.

    ``rest``: words not read yet; ``words``: words in our flags; ``notes``: what was translated;
    ``errors``: what was rejected; ``given``: flag → the spelling that set it; ``dependent``: name →
    (spelling, value) of the options in DEPENDENT.
    """

    valued: set[str]
    switches: dict[str, str | None]
    rest: list[str]
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)
    dependent: dict[str, tuple[str, str]] = field(default_factory=dict)

    def translate_word(self) -> None:
        """Translate the next word together with its values."""
        word = self.rest.pop(0)
        spelling = word.partition("=")[0]
        name = spelling[2:].replace("-", "_")
        flag = "--" + spelling[2:].replace("_", "-")
        if word == "--":
            self.words += [word, *self.rest]
            self.rest.clear()
        elif word in PROGRAM_SWITCHES:
            self.words.insert(0, word)
        elif not word.startswith("--"):
            self.words.append(word)
        elif name == PUSH and flag in self.valued:
            self.translate_push(spelling, word)
        elif flag in self.valued:
            self.put_valued(flag, name, word)
        elif flag in self.switches:
            self.put_switch(flag, name, word)
        elif known(name):
            self.translate_option(spelling, name, word)
        else:
            self.refuse(spelling, name)

    def refuse(self, spelling: str, name: str) -> None:
        """Record that the command has no such option, with the nearest one that it has."""
        names = {}
        for flag in (*self.valued, *self.switches):
            names[flag[2:].replace("-", "_")] = flag
        for other, target in TARGETS.items():
            if target in self.valued:
                names[other] = f"--{other}"
        if "--student" not in self.valued:
            for other, target in NEAR_IN_EVAL.items():
                if target in self.valued:
                    names[other] = target
        if "--divergence" in self.valued:  # a command that trains
            names |= {other: f"--{other}" for other in (*CONVERTED, *DEPENDENT, *ALREADY)}
        text = f"{spelling}: no such option of this command"
        near = nearest(name, names)
        if near is not None:
            text += f"; did you mean {names[near]}?"
        elif name in ONLY_OF:
            text += f"; it is an option of prefix-distill {ONLY_OF[name]}"
        self.errors.append(text)

    def put(self, words: list[str], spelling: str) -> None:
        """Append a flag and its value; raise UserError if another spelling has set the flag."""
        flag = words[0].partition("=")[0]
        if flag != "--set" and self.given.setdefault(flag, spelling) != spelling:
            raise UserError(f"{self.given[flag]} and {spelling} both set {flag}; use only one")
        self.words.extend(words)

    def note(self, spelling: str, words: list[str]) -> None:
        """Record what an option was translated to."""
        if words:
            self.notes.append(f"{spelling} → {' '.join(words)}")
        else:
            self.notes.append(f"{spelling} → nothing (already the default)")

    def put_valued(self, flag: str, name: str, word: str) -> None:
        """Append one of our flags that takes a value."""
        _, equals, value = word.partition("=")
        words = [f"{flag}={value}"]
        if not equals:
            words = [flag, *self.rest[:1]]
            del self.rest[:1]
        words[-1] += self.take_list(name)
        self.put(words, flag)

    def put_switch(self, flag: str, name: str, word: str) -> None:
        """Append one of our switches; True or False may follow it."""
        _, equals, value = word.partition("=")
        is_on = not equals or read_switch(name, value)
        if not equals and self.rest and self.rest[0] in ("True", "False", "true", "false"):
            is_on = read_switch(name, self.rest.pop(0))
        key = self.switches[flag]
        if is_on and flag in PROGRAM_SWITCHES:
            self.words.insert(0, flag)
        elif is_on:
            self.put([flag], flag)
        elif key is not None and "--set" in self.valued:
            self.words += ["--set", f"{key}=false"]

    def take_list(self, name: str) -> str:
        """Return the remaining words of a list, each after a comma."""
        words = ""
        while name in LISTS and self.rest and not self.rest[0].startswith("-"):
            words += f",{self.rest.pop(0)}"
        return words

    def translate_option(self, flag: str, name: str, word: str) -> None:
        """Translate another tool's option and its value."""
        value = self.take_value(flag, name, word)
        spelling = f"{flag} {value}"
        if DEPENDENT.get(name) in self.valued | self.switches.keys():
            self.dependent[name] = spelling, value
            return
        if name in DEPENDENT:
            self.refuse(flag, name)
            return
        try:
            words = self.convert(name, value, spelling)
        except UserError as error:
            self.errors.append(str(error))
            return
        if words[:1] == ["--set"] and "--set" not in self.valued and self._has_key(words[1]):
            words = []  # without a config file, a switch is off by default
        if words and words[0] not in self.valued | self.switches.keys():
            self.refuse(flag, name)
            return
        if words:
            self.put(words, flag)
        self.note(spelling, words)

    def _has_key(self, assignment: str) -> bool:
        """Return whether this command has the switch of an assignment ``key=value``."""
        return assignment.partition("=")[0] in self.switches.values()

    def take_value(self, flag: str, name: str, word: str) -> str:
        """Return the value of another tool's option."""
        _, equals, value = word.partition("=")
        if equals:
            return value
        if self.rest and not self.rest[0].startswith("--"):
            value = self.rest.pop(0)
            return value + self.take_list(name)
        if name not in SWITCHES and name in {*TARGETS, *CONVERTED, *DEPENDENT}:
            raise UserError(f"{flag}: expected a value; see prefix-distill help migration")
        return "True"

    def translate_push(self, spelling: str, word: str) -> None:
        """Translate --push-to-hub: a repository, or a switch as in transformers."""
        value = self.take_value(spelling, PUSH, word)
        if value.lower() in (*TRUE, *FALSE, *OFF):
            self.dependent[PUSH] = f"{spelling} {value}", value
        else:
            self.put(["--push-to-hub", value], "--push-to-hub")

    def convert(self, name: str, value: str, spelling: str) -> list[str]:
        """Return another tool's option in our flags; an empty list if it is already the default."""
        if name in CONVERTED:
            return CONVERTED[name][0](value)
        target = TARGETS.get(name)
        if name == "model_name_or_path" and "--model" in self.valued:
            target = "--model"
        if name == "max_steps" and value.startswith("-"):
            return []  # transformers' default, with which the epochs count
        if target is not None:
            return [target, value]
        if name in ALREADY:
            is_default = any(_is_equal(value, only) for only in ALREADY[name])
        else:
            is_default = value.lower() in OFF
        if not is_default:
            raise UserError(f"{spelling}: {hint(name)}")
        return []

    def settle_batch(self, world: int) -> None:
        """Translate the batch size, which is a product of two numbers there.

        Ours counts the prompts of a step over all ranks: per device × accumulation × ranks.
        """
        spellings = [self.dependent[name][0] for name in BATCH if name in self.dependent]
        if not spellings:
            return
        per_device, accumulation = (self.read_batch(name) for name in BATCH)
        ranks = world
        gpus = _last_value(self.words, "--gpus")
        if gpus and gpus.isdecimal():
            ranks = int(gpus)
        names = " ".join(spellings)
        prompts = per_device * accumulation * ranks
        self.put(["--batch-size", str(prompts)], names)
        self.put(["--micro-batch-size", str(per_device)], names)
        self.notes.append(
            f"{names} → --batch-size {prompts} --micro-batch-size {per_device} ({ranks} "
            f"rank{'s' * (ranks > 1)}; every prompt has --samples rollouts)"
        )

    def read_batch(self, name: str) -> int:
        """Return one factor of the batch size: the given one, or the default there."""
        spelling, value = self.dependent.get(name, ("", str(BATCH[name])))
        is_number = value.isascii() and value.isdecimal()
        if not (is_number and 0 < int(value) < 1 << 31):
            raise UserError(f"{spelling}: expected a whole number of at least 1")
        return int(value)

    def settle_resume(self) -> None:
        """Translate resuming. True resumes the run in --out; a folder resumes the run in it."""
        if RESUME not in self.dependent:
            return
        spelling, value = self.dependent[RESUME]
        if value.lower() in OFF:
            self.note(spelling, [])
            return
        words = ["--resume"]
        if value.lower() not in TRUE:
            out = _last_value(self.words, "--out")
            if out is None:
                words += ["--out", value]
            elif value.rstrip("/\\") != out.rstrip("/\\"):
                raise UserError(
                    f"{spelling}: a run resumes in its own folder, from its newest complete "
                    "checkpoint; use --resume --out with that folder"
                )
        if "--resume" not in self.words:
            self.words += words
        self.note(spelling, words)

    def settle_lora(self) -> None:
        """Translate the LoRA switch. True adds an adapter of rank 16 unless --lora is given."""
        if LORA not in self.dependent:
            return
        spelling, value = self.dependent[LORA]
        words = []
        if read_switch(LORA, value) and _last_value(self.words, "--lora") is None:
            words = ["--lora", "16"]
        self.words += words
        self.note(spelling, words)

    def settle_epochs(self) -> None:
        """Translate the number of epochs, which does not count beside max_steps."""
        if EPOCHS not in self.dependent:
            return
        spelling, value = self.dependent[EPOCHS]
        if self.given.get("--steps") == "--max_steps":
            self.notes.append(f"{spelling} → nothing (--max_steps counts, as in transformers)")
            return
        words = ["--epochs", value]
        self.put(words, f"--{EPOCHS}")
        self.note(spelling, words)

    def settle_hub(self) -> None:
        """Translate the upload, which is a switch and a name in transformers."""
        given = [name for name in (PUSH, REPOSITORY) if name in self.dependent]
        names = " ".join(self.dependent[name][0] for name in given)
        is_on = PUSH in self.dependent and read_switch(PUSH, self.dependent[PUSH][1])
        repository = self.dependent.get(REPOSITORY, ("", None))[1]
        if is_on and repository is None:
            raise UserError(
                f"--{PUSH}: expected a repository; add --{REPOSITORY} USER/NAME, or use "
                "--push-to-hub USER/NAME"
            )
        words = []
        if is_on:
            words = ["--push-to-hub", str(repository)]
            self.put(words, names)
        if given:
            self.note(names, words)
        if PRIVATE not in self.dependent:
            return
        spelling, value = self.dependent[PRIVATE]
        words = []
        if not read_switch(PRIVATE, value) and "--push-to-hub" in self.given:
            words = ["--hub-public"]
            self.put(words, spelling)
        self.note(spelling, words)
