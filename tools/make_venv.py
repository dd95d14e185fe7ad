"""Makes the virtual environment of the Makefile: `python3 tools/make_venv.py FOLDER TORCH_REQUIREMENT`.

If the Python that runs this has a torch that will do, the environment sees its packages: a GPU machine's torch is large
and fits its driver, and the machine may have no network. Otherwise pip installs the requirement.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

MIN_TORCH = (2, 11)


def has_torch() -> bool:
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return False
    return found is not None and (int(found[1]), int(found[2])) >= MIN_TORCH


def main(folder: Path, torch: str) -> None:
    pip = [folder / "bin" / "python", "-m", "pip"]
    if not has_torch():
        venv.create(folder, with_pip=True, clear=True, symlinks=True)
        subprocess.run([*pip, "install", *torch.split()], check=True)
        # The CUDA builds of torch bring their Triton; beside a CPU build it is for the interpreter, in the tests.
        if subprocess.run([*pip, "show", "--quiet", "triton"], stderr=subprocess.DEVNULL, check=False).returncode:
            subprocess.run([*pip, "install", "triton==3.6.0"], check=True)
        return
    # --system-site-packages would not see the packages of a Python that lives in a virtual environment itself.
    packages = [path for path in sys.path if path.endswith("-packages")]
    print(f"using torch {metadata.version('torch')} and what else is in {', '.join(packages)}", flush=True)
    venv.create(folder, with_pip=importlib.util.find_spec("pip") is None, clear=True, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in packages]
    (site / "outer.pth").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
