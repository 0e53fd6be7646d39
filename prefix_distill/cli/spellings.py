"""Names of transformers' and TRL's command lines → our flags, so that a line written for them is
understood or refused by name.

A name stands for what it means there (transformers 5, TRL 1.16): the same setting under another
name, a conversion of its value, or one line that says what to use instead. `prefix-distill help
migration` shows the table.
"""

import fnmatch
from dataclasses import dataclass, field

from ..errors import UserError
from .spelling_tables import (
    ALREADY,
    BATCH,
    CONVERTED,
    FALSE,
    LISTS,
    LORA,
    OFF,
    REFUSED,
    RENAMED,
    RESUME,
    SWITCHES,
    TRUE,
    read_switch,
)


def hint(name: str) -> str | None:
    """What to use instead of ``name``, where it has no counterpart; None where it is not known."""
    return REFUSED.get(name) or next(
        (
            REFUSED[pattern]
            for pattern in REFUSED
            if "*" in pattern and fnmatch.fnmatch(name, pattern)
        ),
        None,
    )


def known(name: str) -> bool:
    """Is ``name`` one of transformers' or TRL's that is understood or refused with a hint?"""
    return (
        any(name in names for names in (RENAMED, CONVERTED, BATCH, (RESUME, LORA)))
        or hint(name) is not None
    )


def _same(value: str, so: str) -> bool:
    try:
        return float(value) == float(so)
    except ValueError:
        return value.lower() in {"true": TRUE, "false": FALSE}.get(so, (so,))


def _value(made: list[str], flag: str) -> str | None:
    """What ``flag`` was given, last."""
    found = [
        made[i + 1] if word == flag else word.partition("=")[2]
        for i, word in enumerate(made)
        if (word == flag and i + 1 < len(made)) or word.startswith(f"{flag}=")
    ]
    return found[-1] if found else None


def translate(
    arguments: list[str], valued: set[str], switches: dict[str, str | None], world: int = 1
) -> tuple[list[str], list[str]]:
    """The arguments of one command → (the same in our flags, ["--learning_rate 1e-4 as --lr 1e-4",
    …] for what was another tool's).

    ``valued``: the command's flags that take a value; ``switches``: those that take none → their
    config key, if they have one. Our flags may be written with underscores, and our switches with
    True or False behind them. A name that neither we nor the tables know, or whose flag this
    command has not, is left for the parser to refuse. ``world``: ranks, where --gpus does not say
    it. UserError, one line for all: refused names, a value that cannot be converted, two names for
    one flag.
    """
    line = _Line(valued=valued, switches=switches, rest=list(arguments))
    while line.rest:
        line.translate_word()
    if line.wrong:
        raise UserError("; ".join(line.wrong))
    line.settle_batch(world)
    line.settle_resume()
    line.settle_lora()
    return line.made, line.said


@dataclass(kw_only=True)
class _Line:
    """A command line during its translation.

    ``rest``: words not read yet; ``made``: words in our flags; ``said``: what was translated;
    ``wrong``: what was rejected; ``given``: flag → the spelling that set it; ``apart``: options
    that depend on the whole line, name → (spelling, value).
    """

    valued: set[str]
    switches: dict[str, str | None]
    rest: list[str]
    made: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)
    apart: dict[str, tuple[str, str]] = field(default_factory=dict)

    def translate_word(self) -> None:
        """Translate the next word together with its values."""
        word = self.rest.pop(0)
        flag = word.partition("=")[0]
        name, own = flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")
        if word == "--":
            self.made += [word, *self.rest]
            self.rest.clear()
        elif not word.startswith("--"):
            self.made.append(word)
        elif own in self.valued:
            self.put_valued(own, name, word)
        elif own in self.switches:
            self.put_switch(own, name, word)
        elif not known(name):
            self.made.append(word)
        else:
            self.translate_other(flag, name, word)

    def put(self, words: list[str], spelled: str) -> None:
        flag = words[0].partition("=")[0]
        if flag != "--set" and self.given.setdefault(flag, spelled) != spelled:
            raise UserError(f"{self.given[flag]} and {spelled} both set {flag}; give one of them")
        self.made.extend(words)

    def put_valued(self, own: str, name: str, word: str) -> None:
        """Append one of our flags that takes a value."""
        _, equals, value = word.partition("=")
        words = [f"{own}={value}"] if equals else [own, *self.rest[:1]]
        del self.rest[: 0 if equals else 1]
        words[-1] += self.take_list(name)
        self.put(words, own)

    def put_switch(self, own: str, name: str, word: str) -> None:
        """Append one of our switches; True or False may follow it."""
        _, equals, value = word.partition("=")
        if not equals and self.rest and self.rest[0] in ("True", "False", "true", "false"):
            equals, value = "=", self.rest.pop(0)
        if own == "--plain":
            self.made.insert(0, own)
        elif not equals or read_switch(name, value):
            self.put([own], own)
        elif self.switches[own] is not None and "--set" in self.valued:
            self.made += ["--set", f"{self.switches[own]}=false"]

    def take_list(self, name: str) -> str:
        """Return the remaining words of a list, each after a comma."""
        words = ""
        while name in LISTS and self.rest and not self.rest[0].startswith("-"):
            words += f",{self.rest.pop(0)}"
        return words

    def translate_other(self, flag: str, name: str, word: str) -> None:
        """Translate another tool's option and its value."""
        _, equals, value = word.partition("=")
        verbatim = [word]
        if not equals and self.rest and not self.rest[0].startswith("--"):
            value = self.rest.pop(0)
            verbatim.append(value)
            value += self.take_list(name)
        elif not equals and (
            name in SWITCHES or name not in {*RENAMED, *CONVERTED, *BATCH, RESUME}
        ):
            value = "True"
        elif not equals:
            raise UserError(f"{flag}: expected a value; see prefix-distill help migration")
        spelled = f"{flag} {value}"
        if name in (*BATCH, RESUME, LORA):
            if "--resume" in self.switches:
                self.apart[name] = spelled, value
            else:
                self.made += verbatim
            return
        try:
            words = self.convert(name, value, spelled)
        except UserError as error:
            self.wrong.append(str(error))
            return
        if words and words[0] not in self.valued | self.switches.keys():
            self.made += verbatim
            return
        if words:
            self.put(words, flag)
        self.said.append(f"{spelled} as {' '.join(words) or 'what is so anyway'}")

    def convert(self, name: str, value: str, spelled: str) -> list[str]:
        """Return another tool's option in our flags; an empty list if it is already the default."""
        if name in CONVERTED:
            return CONVERTED[name][0](value)
        target = RENAMED.get(name)
        if name == "model_name_or_path" and "--model" in self.valued:
            target = "--model"
        if target is not None and not (name == "max_steps" and value.startswith("-")):
            return [target, value]
        if name in ALREADY:
            is_so = any(_same(value, so) for so in ALREADY[name])
        else:
            is_so = value.lower() in OFF
        if not is_so:
            raise UserError(f"{spelled}: {hint(name) or hint('num_train_epochs')}")
        return []

    def settle_batch(self, world: int) -> None:
        """Prompts per update over all ranks, and how many are read at once: there they are two
        factors of one number."""
        batch = {name: self.apart[name] for name in BATCH if name in self.apart}
        if not batch:
            return
        sizes = {}
        for name, default in BATCH.items():
            spelled, value = batch.get(name, ("", str(default)))
            if not (value.isascii() and value.isdecimal() and 0 < int(value) < 1 << 31):
                raise UserError(f"{spelled}: expected a whole number of at least 1")
            sizes[name] = int(value)
        each, turns = sizes.values()
        gpus = _value(self.made, "--gpus")
        ranks = int(gpus) if gpus and gpus.isdecimal() else world
        names = " ".join(spelled for spelled, _ in batch.values())
        self.put(["--batch-size", str(each * turns * ranks)], names)
        self.put(["--micro-batch-size", str(each)], names)
        self.said.append(
            f"{names} as --batch-size {each * turns * ranks} --micro-batch-size {each} ({ranks} "
            f"rank{'s' * (ranks > 1)}; every prompt has --samples rollouts)"
        )

    def settle_resume(self) -> None:
        """True: the run in --out; a folder: the run in it."""
        if RESUME not in self.apart:
            return
        spelled, value = self.apart[RESUME]
        if value.lower() in OFF:
            self.said.append(f"{spelled} as what is so anyway")
            return
        out = _value(self.made, "--out")
        words = ["--resume"]
        if value.lower() not in TRUE:
            if out is None:
                words = ["--resume", "--out", value]
            elif value.rstrip("/\\") != out.rstrip("/\\"):
                raise UserError(
                    f"{spelled}: a run goes on in its own folder, from its newest whole "
                    "checkpoint; use --resume --out with that folder"
                )
        if "--resume" not in self.made:
            self.made.extend(words)
        self.said.append(f"{spelled} as {' '.join(words)}")

    def settle_lora(self) -> None:
        """Translate the LoRA switch: True adds an adapter, of rank 16 unless --lora is given."""
        if LORA not in self.apart:
            return
        spelled, value = self.apart[LORA]
        words = []
        if read_switch(LORA, value) and _value(self.made, "--lora") is None:
            words = ["--lora", "16"]
        self.made += words
        self.said.append(f"{spelled} as {' '.join(words) or 'what is so anyway'}")
