"""Test that wheel and sdist contain every module and data file and run outside the checkout."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, last_json

BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, "
    "sys.argv[1])(sys.argv[2]))"
)  # the build backend of pyproject.toml


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def built(kind: str, source: Path, folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a copy of the packaged files, so that a build writes nothing to the checkout."""
    import setuptools

    if version(setuptools.__version__) < (77, 0):
        pytest.skip("pyproject.toml requires setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(
        ROOT / "prefix_distill",
        folder / "prefix_distill",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def contents(source: Path) -> set[str]:
    return {
        str(file.relative_to(source))
        for file in (source / "prefix_distill").rglob("*")
        if file.is_file()
    }


def test_the_wheel_has_every_module_and_data_file(source, tmp_path):
    expected = contents(source)
    with zipfile.ZipFile(built("wheel", source, tmp_path)) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(
            next(name for name in wheel.namelist() if name.endswith("METADATA"))
        ).decode()
        scripts = wheel.read(
            next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        ).decode()
    assert (
        found == expected and len([name for name in found if name.endswith(".safetensors")]) == 10
    )
    assert (
        "prefix-distill = prefix_distill.__main__:main" in scripts
        and "License-File: LICENSE" in metadata
    )


@pytest.mark.long
def test_wheel_and_sdist_install_into_an_empty_environment_and_run_from_anywhere(source, tmp_path):
    """Install only the package; a .pth file adds the dependencies of this environment.

    This avoids downloads.
    """
    with tarfile.open(built("sdist", source, tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    assert contents(unpacked) == contents(source) and (unpacked / "LICENSE").is_file()
    for name, tree in (("from-wheel", source), ("from-sdist", unpacked)):
        wheel = built("wheel", tree, tmp_path)
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / name)], check=True
        )
        python = tmp_path / name / ("Scripts" if os.name == "nt" else "bin") / "python"
        purelib = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        )
        own = Path(purelib.stdout.strip())
        (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "--python",
                str(python),
                "install",
                "--quiet",
                "--no-deps",
                "--no-index",
                str(wheel),
            ],
            check=True,
        )
        outside = tmp_path / f"{name}-work"
        outside.mkdir()
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

        def run(*words, python=python, outside=outside, clean=clean):
            done = subprocess.run(
                [str(python.with_name("prefix-distill")), *words],
                cwd=outside,
                env=clean,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        where = subprocess.run(
            [python, "-c", "import prefix_distill; print(prefix_distill.__file__)"],
            cwd=outside,
            env=clean,
            capture_output=True,
            text=True,
            check=True,
        )
        assert Path(where.stdout.strip()).is_relative_to(own)
        assert "--seed" in run("demo", "--help") and run("help", "recipes") == (
            ROOT / "prefix_distill/help/recipes.md"
        ).read_text(encoding="utf-8")
        document = last_json(
            run(
                "run",
                "--prefix",
                "4",
                "--steps",
                "1",
                "--batch-size",
                "2",
                "--problems",
                "2",
                "--kl-prompts",
                "2",
                "--out",
                "first",
            )
        )
        assert document["steps"] == 1 and (outside / "first/model/model.safetensors").is_file()
