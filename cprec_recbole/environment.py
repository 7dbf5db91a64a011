"""On what something was run: versions and hardware; and why it failed, in a line."""

from __future__ import annotations

import os
import platform
import re
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cprec_recbole.config import CompressionError


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware; the device is what was run on, None a GPU where there is one."""
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    packages = ("cprec_recbole", "recbole", "torch", "numpy", "pandas")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


def in_a_line(error: Exception) -> str:
    """Why something failed: what the user's own errors say, of all others their place as well."""
    if isinstance(error, CompressionError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
