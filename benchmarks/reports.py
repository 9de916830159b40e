"""Files of results: where they are, what the numbers in them depend on, how they are written."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

RESULTS = Path(__file__).parent / "results"


def write(path: Path, report: Any) -> None:
    """Write ``report`` as JSON, whole or not at all: who is interrupted keeps the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def processor() -> str:
    """Return the CPU's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
